import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.own_memory import require_write_watch
from support.processes import ROOT, Process, environment
from support.require import require
from support.waiting import wait_until

COMMAND = (sys.executable, str(ROOT / "examples/two_hosts.py"), "--size", "16M")


@pytest.fixture
def namespaces() -> None:
    """The test is skipped where no network namespaces can be made, or fails under DIRTYLOG_REQUIRE=netns."""
    require_write_watch()
    users = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    tools = ("unshare", "nsenter", "setpriv", "openssl")
    lack = [name for name in tools if not shutil.which(name)]
    if not shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        lack.append("ip")
    require("netns", not lack, f"{', '.join(lack)} is not installed")
    made = subprocess.run(["unshare", *users, "--net", "true"], capture_output=True, text=True, check=False)
    require("netns", made.returncode == 0, f"no network namespace can be made here: {made.stderr.strip()}")


def _descendants(pid: int) -> set[int]:
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(_descendants, children))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["encrypted", "plain"])
def test_simulation_moved_to_another_host_loses_no_step(tmp_path: Path, options: list[str]) -> None:
    done = subprocess.run(
        [*COMMAND, "--steps", "800", *options],
        env=environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"waiting at {'tcp' if options else 'tls'}:10.0.0.2:4444" in done.stdout
    assert "it stood still for" in done.stdout
    match = re.search(r"it left at step (\d+) and went on at step (\d+)\n", done.stdout)
    assert match is not None
    assert match[1] == match[2]
    assert "an undisturbed simulation ends with the same cells" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["interrupted", "terminated", "killed"],
)
def test_two_hosts_that_are_ended_leave_no_process(number: signal.Signals, status: int) -> None:
    with Process([*COMMAND, "--steps", "1000000"]) as example:
        wait_until(lambda: "waiting" in example.out, "one of them waits for the other")
        begun = _descendants(example.pid)
        example.signal(number)
        assert example.wait() == status
        assert begun
        wait_until(lambda: not any(map(_lives, begun)), "all have ended")


@pytest.mark.usefixtures("namespaces")
def test_two_hosts_whose_simulation_cannot_start_say_why() -> None:
    done = subprocess.run([*COMMAND, "--size", "much"], env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "'much' is not a size" in done.stderr


def test_two_hosts_without_commands_say_which_packages_to_install(tmp_path: Path) -> None:
    everything = {"PATH": str(tmp_path)}
    done = subprocess.run(COMMAND, env=environment() | everything, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "no " in done.stderr
    assert "apt-get install" in done.stderr
    assert "util-linux" in done.stderr

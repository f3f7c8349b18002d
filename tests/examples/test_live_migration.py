import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, environment

_BOUND = 60.0


def _processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if str(folder) in line and entry.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.parametrize("accel", ["kvm", "unicorn"])
def test_demonstration_shows_both_proofs_and_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, accel: str
) -> None:
    if accel == "kvm":
        request.getfixturevalue("kvm")
    options = ("--memory", "32M", "--last", "4M", "--accel", accel)
    command = [sys.executable, str(ROOT / "examples/live_migration.py"), *options]
    done = subprocess.run(
        command, env=environment() | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=_BOUND
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "status completed" in done.stdout
    assert "memory is equal on both sides" in done.stdout
    assert "the source is postmigrate" in done.stdout
    match = re.search(r"the destination went from round (\d+) to round (\d+)", done.stdout)
    assert match is not None
    assert int(match[1]) < int(match[2])
    assert "no write was lost" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert _processes_of(tmp_path) == []


def test_demonstration_that_cannot_start_says_why(kvm: object, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/live_migration.py"), "--memory", "1000", "--last", "4M"]
    done = subprocess.run(
        command, env=environment() | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=_BOUND
    )

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "memory of 1000 bytes" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert _processes_of(tmp_path) == []

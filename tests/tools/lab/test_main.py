"""The command, with a kernel of a few bytes and a program in QEMU's place that says what a guest would."""

import os
import sys
from pathlib import Path

import msgspec
import pytest

from dirtylog.errors import HostError
from tools.lab import __main__ as lab
from tools.lab import contents
from tools.lab.kernel import Kernel
from tools.lab.protocol import Ended, Event, Finished, Started

PASSED: list[Event] = [Started("a.py::one"), Finished("a.py::one", "passed", 0.5, "")]
SKIPPED: list[Event] = [Started("a.py::two"), Finished("a.py::two", "skipped", 0.5, "no moon")]
FAILED: list[Event] = [Started("a.py::three"), Finished("a.py::three", "failed", 0.5, "assert 0")]


class Host:
    """Where the command finds what it needs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = folder / "cache"
        self._qemu = folder / "bin" / "qemu-system-x86_64"
        modules = self.cache / "kernel" / "lib" / "modules" / "6.1"
        for directory in (modules, self._qemu.parent):
            directory.mkdir(parents=True)
        (modules / "kvm-amd.ko").write_bytes(b"\0depends=\0")
        monkeypatch.setenv("PATH", f"{self._qemu.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(lab, "CACHE", self.cache)
        monkeypatch.setattr(lab, "fetch", lambda cache, say: Kernel("6.1", cache / "kernel"))
        monkeypatch.setattr(contents, "add_all", lambda archive: None)

    def guest(self, *events: Event, status: int = 0) -> None:
        """Have QEMU end after a guest told this."""
        told = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        self._qemu.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\npathlib.Path('events').write_bytes({told!r})\n"
            f"print('a console')\nsys.exit({status})\n"
        )
        self._qemu.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_success_is_shown_with_what_was_skipped(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.guest(*PASSED, *SKIPPED, Ended(0))
    assert lab.main([]) == 0
    out = capfd.readouterr().out
    assert "a console\n" in out
    assert "  1 x no moon (a.py)\n" in out
    assert out.endswith("lab: all went well\n")
    assert [path.name for path in host.cache.iterdir()] == ["kernel"]


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([*PASSED, *FAILED, Ended(1)], "1 failed"),
        (PASSED, "the guest died after a.py::one"),
        ([], "the guest died before the first test"),
    ],
)
def test_failure_is_the_exit_status(
    host: Host, capfd: pytest.CaptureFixture[str], events: list[Event], problem: str
) -> None:
    host.guest(*events)
    assert lab.main([]) == 1
    assert capfd.readouterr().out.endswith(f"lab: {problem}\n")


def test_qemu_that_fails_is_an_error_of_the_host(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.guest(status=1)
    assert lab.main([]) == 3
    assert capfd.readouterr().err.endswith("lab: error: QEMU ended with status 1\n")


def test_files_are_kept_on_request(host: Host) -> None:
    host.guest(*PASSED, Ended(0))
    (host.cache / "last").mkdir()
    (host.cache / "last" / "old").touch()
    assert lab.main(["--keep"]) == 0
    assert {path.name for path in (host.cache / "last").iterdir()} == {"initramfs", "events"}


def test_other_processors_are_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert lab.main([]) == 3
    assert "aarch64" in capfd.readouterr().err


def test_error_names_the_remedy(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fetch(cache: Path, say: object) -> Kernel:
        raise HostError("no kernel", remedy="get one")

    host.guest()
    monkeypatch.setattr(lab, "fetch", fetch)
    assert lab.main([]) == 3
    assert capfd.readouterr().err == "lab: error: no kernel; get one\n"


def test_what_runs_and_what_is_left_out_exists() -> None:
    assert all((contents.PROJECT / path).exists() for path in lab.PATHS)
    for node in lab.UNRELATED:
        path, _, test = node.partition("::")
        assert path.startswith(lab.PATHS)
        assert f"def {test.rstrip('[')}" in (contents.PROJECT / path).read_text()


def test_nothing_is_left_out_of_what_is_asked_for() -> None:
    assert any(argument.startswith("--deselect") for argument in lab.pytest_command(lab.PATHS, ()))
    command = lab.pytest_command(("tests/trackers",), ("-k", "ring"))
    assert not any(argument.startswith("--deselect") for argument in command)
    assert command[-3:] == ["tests/trackers", "-k", "ring"]

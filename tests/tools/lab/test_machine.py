"""How QEMU is started, followed and ended, with a program in its place that does as it is told."""

import sys
from pathlib import Path

import pytest

from dirtylog.errors import HostError, ProtocolError
from dirtylog.units import GIB
from tools.lab.machine import Machine
from tools.lab.protocol import Ended, Finished, Started

FOREVER = 1e6


def machine(folder: Path, program: str = "") -> Machine:
    """One whose QEMU is a Python program."""
    qemu = folder / "qemu"
    qemu.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{program}\n")
    qemu.chmod(0o755)
    return Machine(str(qemu), folder / "vmlinuz", folder / "initramfs", folder, 3 * GIB, 2)


def test_command_asks_for_emulation_and_ends_where_the_guest_restarts(tmp_path: Path) -> None:
    command = " ".join(machine(tmp_path).command)
    assert "-accel tcg,thread=multi -cpu max" in command
    assert "-m 3072 -smp 2" in command
    assert "-no-reboot" in command
    assert " panic=-1 " in command


def test_console_is_shown_to_its_end(tmp_path: Path) -> None:
    shown: list[bytes] = []
    talkative = machine(tmp_path, "for i in range(3): print(i, flush=True)\nprint('error', file=sys.stderr)")
    assert talkative.run(FOREVER, shown.append)
    assert b"".join(shown) == b"0\n1\n2\nerror\n"


def test_machine_that_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    endless = machine(tmp_path, "print(os.getpid(), flush=True)\nsignal.pause()")
    shown: list[bytes] = []
    assert not endless.run(2.0, shown.append)
    assert not is_running(int(b"".join(shown)))


def test_machine_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.lab.machine._GRACE_SECONDS", 0.1)
    stubborn = machine(
        tmp_path,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\nwhile True: signal.pause()",
    )
    with pytest.raises(KeyboardInterrupt):
        stubborn.run(FOREVER, interrupt := Interrupt())
    assert not is_running(interrupt.process)


def test_failure_of_qemu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="QEMU ended with status 1"):
        machine(tmp_path, "sys.exit(1)").run(FOREVER, lambda _: None)


def test_events_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(
        b'{"type":"started","test":"a"}\n'
        b'{"type":"finished","test":"a","outcome":"passed","seconds":1.5,"reason":""}\n'
        b'{"type":"ended","status":0}\n'
        b'{"type":"sta'
    )
    assert machine(tmp_path).events() == [Started("a"), Finished("a", "passed", 1.5, ""), Ended(0)]


def test_guest_that_told_nothing_has_no_events(tmp_path: Path) -> None:
    assert machine(tmp_path).events() == []


def test_line_that_is_no_event_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(b"[    1.5] Kernel panic\n")
    with pytest.raises(ProtocolError, match="no event"):
        machine(tmp_path).events()


class Interrupt:
    """Acts like Ctrl-C as soon as the machine shows its process's number."""

    def __init__(self) -> None:
        self.process = 0

    def __call__(self, data: bytes) -> None:
        self.process = int(data)
        raise KeyboardInterrupt


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()

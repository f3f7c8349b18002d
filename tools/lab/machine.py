"""The second kernel's machine: QEMU in software emulation, with AMD's virtualisation for guests of the guest."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from dirtylog.errors import HostError, ProtocolError
from dirtylog.units import MIB
from tools.lab.protocol import Event

QEMU: Final = "qemu-system-x86_64"
PACKAGE: Final = "qemu-system-x86"
"""Debian's, with QEMU in it."""

EVENTS: Final = "events"
"""The file, in the machine's folder, that events are in."""

_GRACE_SECONDS: Final = 5
_READ_BYTES: Final = 1 << 16
_KERNEL_ARGUMENTS: Final = (
    "console=ttyS0",
    "quiet",
    "panic=-1",  # at once; and a restart is what ends this machine
    "oops=panic",
    "nowatchdog",  # emulation may be slow enough to look like a lockup
    "rcupdate.rcu_cpu_stall_suppress=1",
    "mitigations=off",
)


@dataclass(frozen=True)
class Machine:
    """What is to be started.

    Attributes:
        qemu: the program.
        kernel: what boots.
        initramfs: its first root.
        folder: where it leaves what its serial ports sent.
        memory: bytes of RAM.
        cpus: how many.
    """

    qemu: str
    kernel: Path
    initramfs: Path
    folder: Path
    memory: int
    cpus: int

    @property
    def command(self) -> list[str]:
        """QEMU's command line. The console is standard input and output; Ctrl-A X ends it there."""
        return [
            *(self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-m", str(self.memory // MIB), "-smp", str(self.cpus)),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", " ".join(_KERNEL_ARGUMENTS)),
            *("-chardev", "stdio,id=console,signal=off,mux=on,logfile=console", "-serial", "chardev:console"),
            *("-serial", f"file:{EVENTS}"),
        ]

    def interact(self) -> None:
        """Run it with the terminal as its console."""
        with self._process() as process:
            process.wait()

    def run(self, timeout: float, show: Callable[[bytes], None]) -> bool:
        """Run it, and return whether it ended in time, which says nothing about what it did.

        Args:
            timeout: seconds.
            show: takes what appears on its console.

        Raises:
            HostError: QEMU failed.
        """
        deadline = time.monotonic() + timeout
        with self._process(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None  # noqa: S101 - so that mypy knows
            while (remaining := deadline - time.monotonic()) > 0:
                if select.select([process.stdout], [], [], remaining)[0]:
                    if not (data := os.read(process.stdout.fileno(), _READ_BYTES)):
                        break
                    show(data)
            else:
                return False
            if status := process.wait():
                raise HostError(f"QEMU ended with status {status}")
            return True

    def events(self) -> list[Event]:
        """What the guest told, up to the last whole line.

        Raises:
            ProtocolError: something else wrote there.
        """
        path = self.folder / EVENTS
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        try:
            return [msgspec.json.decode(line, type=Event) for line in lines]
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the guest sent a line that is no event: {error}") from error

    @contextmanager
    def _process(self, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(self.command, cwd=self.folder, bufsize=-1, **streams)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

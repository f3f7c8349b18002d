"""A process that runs a guest, or waits for one: started, driven over QMP, and ended here."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.child import running
from dirtylog.control.qmp import QMPClient
from dirtylog.errors import DisconnectedError, HostError, PeerError
from dirtylog.guests.dirtier import COUNTER_ADDRESS, STARTED
from dirtylog.units import MIB, PAGE_SIZE

STARTUP_SECONDS: Final = 30.0
GUEST_SECONDS: Final = 60.0
"""How long a guest may take for a few rounds. Hypervisors that emulate need seconds for a BIOS alone."""

_POLL_SECONDS: Final = 0.02
_REPLY_SECONDS: Final = 30.0
_SLAB: Final = 32 * MIB
_T = TypeVar("_T")


class Files:
    """The paths of one process, all in one directory; a Unix socket's path must be short.

    Attributes:
        qmp: its QMP socket.
        serial: the guest's serial output.
        log: its standard error.
        scratch: guest memory on its way to us.
        environment: has its own temporary files made there too.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.qmp: Final = directory / f"{name}.qmp"
        self.serial: Final = directory / f"{name}.serial"
        self.log: Final = directory / f"{name}.log"
        self.scratch: Final = directory / f"{name}.memory"
        self.environment: Final = os.environ | {"TMPDIR": str(directory)}


class Guest:
    """A process and its QMP session; see `started`.

    Attributes:
        pid: its process number.
        qmp: the session.
    """

    def __init__(self, process: subprocess.Popen[bytes], files: Files) -> None:
        self._process = process
        self._files = files
        self.pid = process.pid
        self.qmp = self.until(self._connect, STARTUP_SECONDS, "open its QMP socket")

    def until(self, condition: Callable[[], _T | None], seconds: float, what: str) -> _T:
        """Ask again and again until the answer is not None, and return it.

        Raises:
            PeerError: that took too long.
            HostError: the process has ended.
        """
        deadline = time.monotonic() + seconds
        while (answer := condition()) is None:
            if time.monotonic() > deadline:
                raise PeerError(f"{self._program} did not {what} within {seconds:.0f} s")
            self._wait_a_little()
        return answer

    def complaints(self) -> str:
        """What it wrote to standard error."""
        return self._files.log.read_text(errors="replace").strip()

    def read(self, address: int, size: int) -> bytes:
        """Guest physical memory."""
        scratch = self._files.scratch
        self.qmp.execute("pmemsave", val=address, size=size, filename=str(scratch))
        content = scratch.read_bytes()
        scratch.unlink()
        if len(content) != size:
            raise PeerError(f"{self._program} saved {len(content)} bytes of memory instead of {size}")
        return content

    def rounds(self) -> int | None:
        """The guest's count of rounds; None before it has begun to count."""
        status = self.read(COUNTER_ADDRESS, 12)
        return int.from_bytes(status[:8], "little") if status[8:] == STARTED else None

    def reach(self, rounds: int) -> int:
        """Wait until the guest has made that many rounds; how many it has made."""

        def enough() -> int | None:
            count = self.rounds()
            return None if count is None or count < rounds else count

        return self.until(enough, GUEST_SECONDS, f"make round {rounds}")

    def first_bytes(self, first: int, last: int) -> NDArray[np.uint8]:
        """Byte 0 of each page of a range; the guest has to be stopped."""
        slabs = ((low, min(_SLAB, last - low)) for low in range(first, last, _SLAB))
        return np.concatenate([np.frombuffer(self.read(low, size), np.uint8)[::PAGE_SIZE] for low, size in slabs])

    @property
    def _program(self) -> str:
        command = self._process.args
        return str(command[0]) if isinstance(command, list) else str(command)

    def _connect(self) -> QMPClient | None:
        try:
            return QMPClient(self._files.qmp, timeout=_REPLY_SECONDS)
        except DisconnectedError:  # it is not there yet
            return None

    def _wait_a_little(self) -> None:
        try:
            status = self._process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return
        raise HostError(f"{self._program} ended with status {status}: {self.complaints() or 'it did not say why'}")


@contextmanager
def started(command: Sequence[str], files: Files) -> Iterator[Guest]:
    """Start a process, see `running`, and its QMP session; both end with the block."""
    with files.log.open("wb") as log, running(command, log, environment=files.environment) as process:
        guest = Guest(process, files)
        with closing(guest.qmp):
            yield guest

"""Processes that tests start, speak to, and end."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from support.waiting import BOUND, wait_until

from dirtylog.control.qmp import QMPClient
from dirtylog.errors import DisconnectedError

ROOT: Final = Path(__file__).parents[2]
DIRTYLOG: Final = (sys.executable, "-m", "dirtylog.cli.main")


def environment() -> dict[str, str]:
    """This process's, with the project's own sources and the tests' helpers to be imported from."""
    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"}


class Process:
    """A process whose output goes to files; killed at the end of the ``with`` statement if it still runs then."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self.arguments = " ".join(arguments)
        self._popen = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=environment()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._out.close()
        self._err.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it as no process can prevent; idempotent."""
        self._popen.kill()
        self._popen.wait(BOUND)

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self._popen.wait(BOUND)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} did not end: {self.out[-200:]}{self.err}") from None

    @property
    def out(self) -> str:
        """What it wrote to standard output so far."""
        return _content(self._out.fileno())

    @property
    def err(self) -> str:
        """What it wrote to standard error so far."""
        return _content(self._err.fileno())

    def wait_for_line(self, line: str) -> None:
        """Return once it has written a line to standard output that starts so."""
        wait_until(
            lambda: any(one.startswith(line) for one in self.out.splitlines()) or not self.running,
            f"{self.arguments} wrote {line!r}",
        )
        assert any(one.startswith(line) for one in self.out.splitlines()), self.out[-200:] + self.err


def _content(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()


class Run(Process):
    """``dirtylog run`` with a QMP socket, ready for commands."""

    def __init__(self, qmp: Path, *arguments: str) -> None:
        super().__init__((*DIRTYLOG, "run", "--qmp", str(qmp), *arguments))
        self._qmp_path = qmp
        self.qmp: QMPClient
        try:
            wait_until(self._connects, f"{arguments} served QMP")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *exc: object) -> None:
        if hasattr(self, "qmp"):
            self.qmp.close()
        super().__exit__(*exc)

    def _connects(self) -> bool:
        assert self.running, self.err
        try:
            self.qmp = QMPClient(self._qmp_path)
        except DisconnectedError:
            return False
        return True

    @property
    def state(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def memory(self, address: int, size: int, scratch: Path) -> bytes:
        """Guest physical memory, through a file."""
        self.qmp.execute("pmemsave", val=address, size=size, filename=str(scratch))
        return scratch.read_bytes()


def dirtylog(*arguments: str) -> Process:
    """Any subcommand."""
    return Process((*DIRTYLOG, *arguments))


def child(
    side: str, kind: str, uri: str, checkpoint: object, *, shared: bool = False, postcopy: bool = False
) -> Process:
    """See `support.migration_child`."""
    way = "shared" if shared else "postcopy" if postcopy else "copied"
    return Process((sys.executable, "-m", "support.migration_child", side, kind, uri, str(checkpoint), way))

"""A pseudo-terminal as standard output."""

import contextlib
import os
import pty

import pytest
from support.waiting import Task, wait_until

_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Terminal:
    """A pseudo-terminal that is standard output in its ``with`` statement, and what was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "xterm") -> None:
        monkeypatch.setenv("TERM", kind)
        for name in _VARIABLES:
            monkeypatch.delenv(name, raising=False)
        self._master, slave = pty.openpty()
        self._slave = os.fdopen(slave, "w")
        self._data = bytearray()
        self._redirection = contextlib.redirect_stdout(self._slave)
        self._reader = Task(self._read)

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 4096):
                self._data += data
        except OSError:  # how a terminal says that nobody holds its other end any more
            return

    @property
    def text(self) -> str:
        return self._data.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text, f"the terminal shows {text!r}")

    def __enter__(self) -> None:
        self._redirection.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._redirection.__exit__(None, None, None)
        self._slave.close()
        self._reader.join()
        os.close(self._master)

"""Ending a command on SIGINT and SIGTERM, whatever its threads are doing."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final, Self

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_CLOSE: Final = b"\0"  # no signal has the number 0


class EndOnSignals:
    """Holds SIGINT and SIGTERM back; `watch` has something called when one comes, or has come. For the main thread.

    A Python handler alone would not do. It runs in the main thread, which waits on a lock, and the kernel may give the
    signal to any thread, a numerical library's for one, which wakes nobody. So the number that the interpreter's own
    handler writes into a pipe, in whichever thread, is what counts.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = [(number, signal.signal(number, _ignore)) for number in _SIGNALS]
        return self

    def watch(self, end: Callable[[], None]) -> None:
        """Call ``end``, from a thread of its own, at each signal."""
        self._thread = threading.Thread(target=self._main, args=(end,), name="signals", daemon=True)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.write(self._writer, _CLOSE)
        if self._thread is not None:
            self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _main(self, end: Callable[[], None]) -> None:
        while (byte := os.read(self._reader, 1)) != _CLOSE:
            if byte[0] in _SIGNALS:
                end()


def _ignore(number: int, frame: FrameType | None) -> None:
    """The pipe has it already."""

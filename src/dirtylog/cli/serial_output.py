"""Where a guest's serial output goes, without ever holding the guest up."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

_MAX_BACKLOG: Final = 1 << 20
_CLOSE_SECONDS: Final = 2.0


class SerialOutput:
    """Writes what it is given to a file descriptor, in a thread of its own.

    A reader that is too slow loses bytes while a MiB waits for it; a vCPU that waited for it could not be stopped.

    Args:
        fd: where to write; its owner closes it after this.
        on_error: told once when writing fails; what comes later is thrown away.
    """

    def __init__(self, fd: int, on_error: Callable[[OSError], None]) -> None:
        self._fd = fd
        self._on_error = on_error
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._taken = 0
        self._written = 0
        self._failed = False
        self._thread = threading.Thread(target=self._main, name="serial-output", daemon=True)
        self._thread.start()

    def __call__(self, data: bytes) -> None:
        """Take bytes; one thread at a time."""
        if not self._failed and self._taken - self._written < _MAX_BACKLOG:
            self._taken += len(data)
            self._queue.put(data)

    def close(self) -> None:
        """Write what waits, within a bound; idempotent."""
        self._queue.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _main(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                self._written += len(data)
        except OSError as error:
            self._failed = True
            self._on_error(error)

"""Waking a thread that waits in poll."""

import contextlib
import os
import select
from typing import Final


class Wakeup:
    """A flag that a thread can wait for together with files; owns its descriptor."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor, readable while the flag is set."""
        return self._fd

    def set(self) -> None:
        """Set the flag."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Clear the flag."""
        with contextlib.suppress(BlockingIOError):  # it was not set
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Give up the descriptor; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Waiter:
    """Waits for one file, or for a wake-up, whichever comes first.

    Args:
        fd: of the file.
        wakeup: the flag.
        also: of files that end the wait, too, when they can be read.
    """

    def __init__(self, fd: int, wakeup: Wakeup, *also: int) -> None:
        self._fd: Final = fd
        self._poll: Final = select.poll()
        self._poll.register(fd, 0)
        for other in (wakeup.fileno(), *also):
            self._poll.register(other, select.POLLIN)

    def wait(self, *, read: bool = False, write: bool = False, timeout: float | None = None) -> bool:
        """Wait until the file can be read or written, its peer is gone, the flag is set, or time is up.

        Returns:
            Whether anything happened before time was up.
        """
        self._poll.modify(self._fd, (select.POLLIN if read else 0) | (select.POLLOUT if write else 0))
        return bool(self._poll.poll(None if timeout is None else max(0.0, timeout * 1000)))

"""One thread that waits for many files."""

import select
import time
from collections.abc import Callable
from typing import Final, Protocol

_NO_FILE: Final = (-1, 0)


class File(Protocol):
    """Something with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class Attention:
    """Waits for one file, and meanwhile does what others call for.

    So one thread serves all of them. Had each a thread of its own, it would wait for the interpreter's lock, too; and
    where CPUs are few, who holds that may have none for milliseconds.
    """

    def __init__(self) -> None:
        self._handlers: Final[dict[int, Callable[[], None]]] = {}
        self._polls: Final[dict[tuple[int, int], select.poll]] = {}

    def add(self, file: File, handler: Callable[[], None]) -> None:
        """Have something done whenever a file can be read or is at its end. Before the first wait."""
        self._handlers[file.fileno()] = handler

    def remove(self, file: File) -> None:
        """Do nothing more for a file that was added, and is open still."""
        del self._handlers[file.fileno()]
        for poll in self._polls.values():
            poll.unregister(file.fileno())

    def wait(self, file: File, event: int, timeout: float) -> None:
        """Do what there is to do, until a file is ready or at its end.

        Args:
            file: one that was not added.
            event: ``select.POLLIN`` or ``select.POLLOUT``.
            timeout: seconds; 0 for ever.

        Raises:
            BlockingIOError: it was not in time.
        """
        fd = file.fileno()
        poll = self._polls.get((fd, event)) or self._new_poll(fd, event)
        deadline = time.monotonic() + timeout if timeout else None
        while fd not in (ready := self._serve(poll, deadline)):
            if not ready:
                raise BlockingIOError

    def serve(self) -> None:
        """Do what there is to do now."""
        poll = self._polls.get(_NO_FILE) or self._new_poll(*_NO_FILE)
        self._handle([fd for fd, _ in poll.poll(0)])

    def until(self, done: Callable[[], bool], timeout: float) -> bool:
        """Do what there is to do, until something is so or some seconds are over; whether it is."""
        poll = self._polls.get(_NO_FILE) or self._new_poll(*_NO_FILE)
        deadline = time.monotonic() + timeout
        while not done():
            if not self._serve(poll, deadline):
                return False
        return True

    def _new_poll(self, fd: int, event: int) -> select.poll:
        poll = self._polls[fd, event] = select.poll()
        for each in self._handlers:
            poll.register(each, select.POLLIN)
        if fd >= 0:
            poll.register(fd, event)
        return poll

    def _serve(self, poll: select.poll, deadline: float | None) -> list[int]:
        """Wait once; what was ready."""
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        fds = [fd for fd, _ in poll.poll(timeout)]
        self._handle(fds)
        return fds

    def _handle(self, fds: list[int]) -> None:
        for fd in fds:
            if handler := self._handlers.get(fd):
                handler()

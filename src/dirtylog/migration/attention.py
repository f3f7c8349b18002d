"""One thread that waits for many files."""

import os
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

_NO_FILE: Final = (-1, 0)
_LOOK_FOR: Final = 200e-6
"""Seconds after something came. A vCPU that got its page mostly asks for the next within that."""
_SHARE: Final = 0.25
"""Of the time. With 0.5, source, destination and guest on two CPUs took a quarter longer for all else."""
_MOST_CREDIT: Final = 0.01
"""Seconds of it that may be saved up."""


class File(Protocol):
    """Something with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class BusyPolling:
    """Looks again and again for a while after something came, before it lets its thread sleep.

    What comes next often comes at once, and to be woken takes a thread as long as to do what it is woken for: the CPU
    has to be called back from its sleep, and has forgotten what it did. KVM waits in this way for a halted vCPU
    (``halt_poll_ns``, 200 us).

    It takes a share of one CPU at most, in turns of some milliseconds, and lets others go first after each look: where
    CPUs are few, one of them may be the guest.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._credit = _MOST_CREDIT
        self._resting = False
        self._since = 0.0

    def extend(self) -> None:
        """Something came."""
        self._until = time.monotonic() + _LOOK_FOR

    def poll(self, poll: select.poll, deadline: float | None) -> list[tuple[int, int]]:
        """What is ready; nothing if it is time to sleep, or the deadline has passed."""
        began = time.monotonic()
        end = self._until if deadline is None else min(self._until, deadline)
        if began >= end:
            return []
        self._credit = min(_MOST_CREDIT, self._credit + (began - self._since) * _SHARE)
        self._since = now = began
        self._resting = self._credit < (_MOST_CREDIT / 2 if self._resting else 0.0)
        ready: list[tuple[int, int]] = []
        while not ready and not self._resting and now < end:
            ready = poll.poll(0)
            if not ready:
                os.sched_yield()
            now = time.monotonic()
        self._credit -= now - began
        return ready


class Attention:
    """Waits for one file, and meanwhile does what others call for.

    So one thread serves all of them. Had each a thread of its own, it would wait for the interpreter's lock, too; and
    where CPUs are few, who holds that may have none for milliseconds.

    Args:
        busy: how to wait after others were served, if not asleep.
    """

    def __init__(self, busy: BusyPolling | None = None) -> None:
        self._busy = busy
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
            if not self._serve(poll, deadline) or time.monotonic() >= deadline:
                return done()
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
        ready = self._busy.poll(poll, deadline) if self._busy else []
        fds = [fd for fd, _ in ready or poll.poll(_left(deadline))]
        self._handle(fds)
        return fds

    def _handle(self, fds: list[int]) -> None:
        for fd in fds:
            if handler := self._handlers.get(fd):
                handler()
                if self._busy:
                    self._busy.extend()


def _left(deadline: float | None) -> float | None:
    """Milliseconds."""
    return None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000

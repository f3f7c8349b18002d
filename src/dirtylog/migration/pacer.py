"""Keeping to a bandwidth."""

import time
from collections.abc import Callable
from typing import Final

from dirtylog.errors import CancelledError

_SLICE: Final = 0.1
"""Seconds after which a wait asks for the rate again: it may have been raised, or lifted."""


class Pacer:
    """Delays a sender so that it stays below a rate.

    Args:
        wait: waits for some seconds; whether it is over.
        rate: bytes a second, or 0 for no limit; asked again and again.
    """

    def __init__(self, wait: Callable[[float], bool], rate: Callable[[], int]) -> None:
        self._wait = wait
        self._rate = rate
        self._debt = 0.0
        self._since = 0.0

    def begin(self) -> None:
        """What comes next is a new pass. The time before it is no credit, and what was left of one is forgotten."""
        self._pay(self._rate())
        self._debt = max(0.0, self._debt)

    def pace(self, size: int) -> None:
        """Wait until the ``size`` bytes that were sent, and all before, fit under the rate.

        The time that sending took counts, and what a wait took too long is made up for, up to `_SLICE`.

        Raises:
            CancelledError: while waiting, or before.
        """
        rate = self._rate()
        self._pay(rate)
        self._debt += size
        while True:
            if self._wait(min(max(0.0, self._debt) / rate, _SLICE) if rate else 0.0):
                raise CancelledError("the migration was cancelled")
            self._pay(rate)
            rate = self._rate()
            if not rate or self._debt < 1:
                return

    def _pay(self, rate: int) -> None:
        """Take what fitted under the rate since the last time off the debt; without a rate, all."""
        now = time.monotonic()
        self._debt = max(-_SLICE * rate, self._debt - (now - self._since) * rate) if rate else 0.0
        self._since = now

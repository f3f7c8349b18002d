"""Keeping to a bandwidth."""

import threading
import time

from dirtylog.errors import CancelledError


class Pacer:
    """Delays a sender so that it stays below a rate.

    Args:
        cancelled: cuts waiting short.
    """

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled
        self._due = 0.0

    def pace(self, size: int, rate: int) -> None:
        """Wait until ``size`` more bytes fit under ``rate`` bytes a second; 0 is no limit.

        Raises:
            CancelledError: while waiting, or before.
        """
        now = time.monotonic()
        if rate:
            self._due = max(self._due, now) + size / rate
        if self._cancelled.wait(max(0.0, self._due - now) if rate else 0.0):
            raise CancelledError("the migration was cancelled")

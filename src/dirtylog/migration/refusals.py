"""What a destination tells the operator about connections that it turned away."""

import logging
import threading
import time
from typing import Final

LOGGER: Final = logging.getLogger("dirtylog.migration")
"""Silent unless the program configures it."""
LOGGER.addHandler(logging.NullHandler())

BURST: Final = 20
"""So many records are written at once."""
INTERVAL: Final = 1.0
"""Seconds a record after that: a flood of strangers does not fill a disk."""
_LONGEST: Final = 300


class Refusals:
    """Logs connections that were turned away, one record each, but no more than `BURST` and `INTERVAL` allow.

    The next record tells how many were left out, and so does `close`. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = float(BURST)
        self._last = time.monotonic()
        self._omitted = 0

    def add(self, what: str, reason: str, defect: BaseException | None = None) -> None:
        """Log one.

        Args:
            what: what happened to whom.
            reason: why. A peer may have had a part in it: it is shortened, and its control characters are escaped.
            defect: an error of ours that was the reason.
        """
        with self._lock:
            if not self._may_write():
                self._omitted += 1
                return
            omitted, self._omitted = self._omitted, 0
        if omitted:
            _log_omitted(omitted)
        level = logging.WARNING if defect is None else logging.ERROR
        LOGGER.log(level, "%s: %s", what, _one_line(reason), exc_info=defect)

    def close(self) -> None:
        """Tell how many were left out last; idempotent."""
        with self._lock:
            omitted, self._omitted = self._omitted, 0
        if omitted:
            _log_omitted(omitted)

    def _may_write(self) -> bool:
        now = time.monotonic()
        self._left = min(float(BURST), self._left + (now - self._last) / INTERVAL)
        self._last = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _log_omitted(count: int) -> None:
    LOGGER.warning("refused %d more connections, too many to be told one by one", count)


def _one_line(text: str) -> str:
    shortened = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shortened)

"""No tracking at all: everything counts as written, always. Correct everywhere, and a last resort."""

import numpy as np

from dirtylog.memory import Words


class NullTracker:
    """Reports every page at every collect.

    Args:
        pages: how many.
    """

    def __init__(self, pages: int) -> None:
        self._pages = pages

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self._pages

    def arm(self) -> None:
        """Nothing to do."""

    def collect(self, words: Words) -> None:
        """All pages."""
        words[:] = ~np.uint64(0)

    def clear(self, first: int, count: int, words: Words) -> None:
        """Nothing to do: the next write will be reported."""

    def disarm(self) -> None:
        """Nothing to do."""

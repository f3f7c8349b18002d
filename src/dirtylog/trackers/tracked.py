"""A tracker together with what it has reported: the two rules that keep writes from being lost.

A tracker's clear must never name a page that its last collect did not report: that page may have been written after
the collect, the clear would protect it again, and the write would be known to nobody. So what was collected and not
cleared yet is kept here. A clear passes on the bits that are 1 in it and lie in the asked range, with the rest of the
first and last word masked out, and zeroes them before: were they kept, a second clear of the range would name pages
again that may have been written since the first. So would they if a clear failed half-way; what it has not cleared the
next collect reports again.

Pages that are collected but never cleared are reported again by every collect, and sent twice at worst.
"""

from typing import Generic, TypeVar

import numpy as np

from dirtylog.memory import PageBitmap
from dirtylog.trackers.tracker import Tracker, clear_window

T_co = TypeVar("T_co", bound=Tracker, covariant=True)


class TrackedRange(Generic[T_co]):
    """A range of pages and its tracker. Not locked: its owner's lock covers each call.

    Attributes:
        tracker: what watches the range.
        armed: whether it does.
        collected: the pages collected and not cleared yet.
    """

    def __init__(self, tracker: T_co) -> None:
        self.tracker = tracker
        self.armed = False
        self.collected = PageBitmap(tracker.pages)

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self.collected.pages

    def arm(self) -> None:
        """Start tracking; to be called once."""
        self.tracker.arm()
        self.collected.clear()
        self.armed = True

    def disarm(self) -> None:
        """Stop tracking; idempotent."""
        if self.armed:
            self.armed = False
            self.tracker.disarm()

    def collect(self) -> PageBitmap:
        """The pages written and not cleared since; none past the end, whatever the tracker says."""
        words = np.empty_like(self.collected.words)
        self.tracker.collect(words)
        fresh = PageBitmap(self.pages, words)
        self.collected.words |= fresh.words
        return fresh

    def clear(self, first: int, count: int) -> None:
        """Clear what was collected of [first, first + count); what is not in the range is left out."""
        start, end = max(first, 0), min(first + count, self.pages)
        if not self.armed or start >= end:
            return
        if end - start == self.pages:
            wanted, self.collected = self.collected, PageBitmap(self.pages)
            self.tracker.clear(0, self.pages, wanted.words)
            return
        window = clear_window(self.pages, start, end - start)
        wanted = PageBitmap(window.length, self.collected.extract(window.first, window.length))
        wanted.clear(0, window.skip)
        wanted.clear(window.skip + end - start)
        self.collected.clear(start, end - start)
        self.tracker.clear(window.first, window.length, wanted.words)

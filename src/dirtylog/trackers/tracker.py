"""The contract of trackers: how one mapped range tells which of its pages were written."""

from typing import NamedTuple, Protocol

from dirtylog.memory import Words
from dirtylog.units import WORD_BITS, align_down, align_up


class Tracker(Protocol):
    """Watches one mapped range. Its caller holds a lock, and keeps what was collected until it is cleared.

    Reporting a page that was not written is safe; not reporting one that was is not.
    """

    @property
    def pages(self) -> int:
        """The length of the range."""

    def arm(self) -> None:
        """Start tracking. What is written from here on will be collected."""

    def collect(self, words: Words) -> None:
        """Fill ``words`` (a bit a page, bit 0 the range's first) with the pages written and not cleared since.

        Bits past the last page may have any value.
        """

    def clear(self, first: int, count: int, words: Words) -> None:
        """Have the next write to each page whose bit in ``words`` (bit 0 is ``first``) is 1 reported anew.

        Only pages that were collected are ever named. ``first`` is a multiple of 64; so is ``count``, unless the range
        ends there. Trackers that clear when they collect have nothing to do.
        """

    def disarm(self) -> None:
        """Stop tracking."""


class ClearWindow(NamedTuple):
    """Whole words around a range of pages: ``length`` pages from ``first``; the range starts ``skip`` pages in."""

    first: int
    length: int
    skip: int


def clear_window(pages: int, start: int, size: int) -> ClearWindow:
    """The smallest window of whole 64-page words around [start, start + size), cut at the last of ``pages``.

    KVM takes clears in this form only. The window's pages outside the range must not be cleared with it.
    """
    first = align_down(start, WORD_BITS)
    return ClearWindow(first, min(align_up(start + size, WORD_BITS), pages) - first, start - first)

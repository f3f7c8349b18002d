"""Writes to this process's memory, noted by write protection that lifts itself (userfaultfd WP_ASYNC, PAGEMAP_SCAN).

Clearing takes one call for any number of scattered pages: the span from the first to the last page that is named is
scanned and protected in one step. That protects pages, too, that were not named, among them some written since the last
collect. The scan tells which they were; they are kept, and reported by the next collect, so that nothing is lost (D1).
Until it has told, all pages are kept: an interrupted clear, by Ctrl-C or an error, reports too much afterwards.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from dirtylog.errors import UsageError
from dirtylog.linux.pagemap import REGION
from dirtylog.linux.userfaultfd import USERFAULTFD_DEVICE
from dirtylog.linux.write_watch import Regions, WriteWatch
from dirtylog.memory import PageBitmap, Words
from dirtylog.units import PAGE_SIZE, WORD_BITS

_PAGE_SHIFT: Final = np.uint64(PAGE_SIZE.bit_length() - 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What a scan found: as regions, and as bits from a word on. A clear that finds the same needs no bits anew."""

    regions: Regions
    word: int
    bits: Words

    def is_of(self, regions: Regions) -> bool:
        return np.array_equal(self.regions.view(np.uint64), regions.view(np.uint64))

    def mark(self, words: Words) -> None:
        words[self.word : self.word + self.bits.size] |= self.bits


_NOTHING: Final = _Found(np.empty(0, REGION), 0, np.empty(0, np.uint64))


class WriteWatchTracker:
    """Watches memory of the own process. What is noted and what not stands in `linux.write_watch`.

    Args:
        address: where the memory is, on a page boundary.
        pages: how many.
        initially_set: report every page first, as never-protected ones are. Arming then takes no time, however large
            the memory; else every page is protected at once.
        device: where userfaultfd's is.
    """

    def __init__(
        self, address: int, pages: int, *, initially_set: bool = False, device: str = USERFAULTFD_DEVICE
    ) -> None:
        self._address = address
        self._pages = pages
        self._initially_set = initially_set
        self._device = device
        self._watch: WriteWatch | None = None
        self._kept = PageBitmap(pages)
        self._last = _NOTHING

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self._pages

    def arm(self) -> None:
        """Register the memory; protect it, unless all of it is to be reported first.

        Raises:
            HostError: this kernel, or this user's permissions, do not allow it.
            UntrackableError: the memory is of another kind, or somebody watches it.
        """
        watch = WriteWatch(self._address, self._pages * PAGE_SIZE, device=self._device)
        try:
            if not self._initially_set:
                watch.written(0, watch.size, protect=True)
        except BaseException:
            watch.close()
            raise
        self._watch = watch
        self._last = _NOTHING
        self._kept = PageBitmap(self._pages)
        if self._initially_set:
            self._kept.set()

    def collect(self, words: Words) -> None:
        """One scan of all."""
        watch = self._armed()
        words[:] = self._kept.words
        self._last = self._found(watch.written(0, watch.size))
        self._last.mark(words)

    def clear(self, first: int, count: int, words: Words) -> None:
        """One scan, which protects what it finds."""
        watch = self._armed()
        named = np.flatnonzero(words)
        if not named.size:
            return
        low = first + int(named[0]) * WORD_BITS
        high = min(first + (int(named[-1]) + 1) * WORD_BITS, first + count)
        kept = self._kept.copy()
        self._kept.set()
        last, self._last = self._last, _NOTHING  # whose regions the scan after the next overwrites
        protected = watch.written(low * PAGE_SIZE, (high - low) * PAGE_SIZE, protect=True)
        (last if last.is_of(protected) else self._found(protected)).mark(kept.words)
        kept.words[first // WORD_BITS :][: words.size] &= ~words
        self._kept = kept

    def disarm(self) -> None:
        """Watch no more."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _armed(self) -> WriteWatch:
        if self._watch is None:
            raise UsageError("the tracker is not armed")
        return self._watch

    def _found(self, regions: Regions) -> _Found:
        if not regions.size:
            return _NOTHING
        word = (int(regions["start"][0]) - self._address) // (PAGE_SIZE * WORD_BITS)
        base = np.uint64(self._address + word * PAGE_SIZE * WORD_BITS)
        runs = (regions.view(np.uint64).reshape(-1, 3)[:, :2] - base) >> _PAGE_SHIFT
        starts, ends = runs.view(np.int64).T
        return _Found(regions, word, PageBitmap.from_runs(int(ends[-1]), starts, ends).words)

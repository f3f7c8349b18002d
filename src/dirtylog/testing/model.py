"""A model of a tracker that notices when a write would be lost.

Each page is in one of three states. In the kernel the last two are one, a bit set in the log; they are kept apart here
because clearing the one is right and clearing the other loses a write.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from enum import Enum

import numpy as np

from dirtylog.memory import Numbers, Words
from dirtylog.testing.contract import Case, ContractError
from dirtylog.units import PAGE_SIZE, WORD_BITS, word_count


class PageLog(Enum):
    """What the log knows of a page."""

    PROTECTED = "not written since the last clear; the next write will be noticed"
    WRITTEN = "written, and not collected since"
    COLLECTED = "collected, and not cleared since; further writes are not noticed"


class ModelTracker:
    """A tracker, page by page and slow, whose writer calls `write`. It refuses what the contract forbids.

    Both sides hold ``bus``: on real hardware, too, a store comes wholly before or wholly after a page is protected.

    Args:
        pages: how many.
        clears_on_collect: whether what is collected is cleared.
        starts_all_set: whether every page counts as written at first.
        bus: a re-entrant lock; one of its own if None.

    Raises:
        ContractError: by each method, when it is called as it must not be.
    """

    def __init__(
        self,
        pages: int,
        *,
        clears_on_collect: bool = False,
        starts_all_set: bool = False,
        bus: AbstractContextManager[object] | None = None,
    ) -> None:
        self._pages = pages
        self._clears_on_collect = clears_on_collect
        self._starts_all_set = starts_all_set
        self._bus: AbstractContextManager[object] = bus or threading.RLock()
        self._log: list[PageLog] | None = None

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self._pages

    @property
    def armed(self) -> bool:
        """Whether writes are noted."""
        return self._log is not None

    def reports(self, page: int) -> bool:
        """Whether the next collect will name a page."""
        return self._log is not None and self._log[page] is not PageLog.PROTECTED

    def write(self, page: int) -> None:
        """What the hardware does when a page is written."""
        if self._log is not None and self._log[page] is PageLog.PROTECTED:
            self._log[page] = PageLog.WRITTEN

    def arm(self) -> None:
        """Note writes from here on."""
        if self._log is not None:
            raise ContractError("armed twice")
        self._log = [PageLog.WRITTEN if self._starts_all_set else PageLog.PROTECTED] * self._pages

    def collect(self, words: Words) -> None:
        """The pages that are not protected."""
        with self._bus:
            self._collect(words)

    def _collect(self, words: Words) -> None:
        log = self._armed("collect")
        if words.shape != (word_count(self._pages),):
            raise ContractError(f"{words.shape} words for {self._pages} pages")
        words[:] = 0
        if self._pages % WORD_BITS:
            words[-1] = (1 << 64) - (1 << self._pages % WORD_BITS)  # any value may stand past the last page
        for page, state in enumerate(log):
            if state is not PageLog.PROTECTED:
                words[page // WORD_BITS] |= np.uint64(1 << page % WORD_BITS)
                log[page] = PageLog.PROTECTED if self._clears_on_collect else PageLog.COLLECTED

    def clear(self, first: int, count: int, words: Words) -> None:
        """Protect the pages that are named, which must be collected ones."""
        log = self._armed("clear")
        self._check_window(first, count, words)
        with self._bus:
            self._clear(log, first, count, words)

    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        for index, word in enumerate(words.tolist()):
            for bit in range(WORD_BITS):
                if word >> bit & 1:
                    self._protect(log, first + index * WORD_BITS + bit, first + count)

    def disarm(self) -> None:
        """Note no more."""
        self._armed("disarm")
        self._log = None

    def _protect(self, log: list[PageLog], page: int, end: int) -> None:
        if page >= end:
            raise ContractError(f"a bit for page {page}, past the window's end {end}")
        if self._clears_on_collect:
            return
        if log[page] is not PageLog.COLLECTED:
            raise ContractError(f"page {page} cleared, which is {log[page].name}: a write may be lost")
        log[page] = PageLog.PROTECTED

    def _check_window(self, first: int, count: int, words: Words) -> None:
        end = first + count
        if first % WORD_BITS or count < 1 or end > self._pages or (count % WORD_BITS and end != self._pages):
            raise ContractError(f"the kernel does not take a clear of {count} of {self._pages} pages from {first}")
        if words.shape != (word_count(count),):
            raise ContractError(f"{words.shape} words for {count} pages")

    def _armed(self, call: str) -> list[PageLog]:
        if self._log is None:
            raise ContractError(f"{call} of a tracker that is not armed")
        return self._log


class ModelCase(Case):
    """Memory whose writer tells a model of each store.

    Args:
        tracker: the model.
        bus: the lock that the model was made with.
    """

    stores_at_once = 32

    def __init__(self, tracker: ModelTracker, bus: AbstractContextManager[object]) -> None:
        super().__init__(tracker, np.zeros(tracker.pages * PAGE_SIZE, np.uint8))
        self._model = tracker
        self._bus = bus

    def write(self, pages: Iterable[int], offset: int = 0) -> None:
        """Add 1 to a byte of each page, and tell the model."""
        for page in pages:
            with self._bus:
                self._model.write(page)
                super().write([page], offset)

    def stamp(self, pages: Numbers, place: int, stamps: Numbers) -> None:
        """Store numbers in pages, and tell the model."""
        words = self.memory.view("<u4")
        for page, stamp in zip(pages.tolist(), stamps.tolist(), strict=True):
            with self._bus:
                self._model.write(page)
                words[page * (PAGE_SIZE // 4) + place] = stamp
        time.sleep(0)  # locks are not fair: one who writes on and on would keep the others from the bus for seconds

"""When each page was last written, and so the working set over any time."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.display.sample import Sample
from dirtylog.errors import UsageError
from dirtylog.memory import Numbers, PageBitmap
from dirtylog.units import WORD_BITS

_STRIDE: Final = 1 << 18
"""Pages that are looked at together: few enough to be listed, and passed over as long as none of them was written."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """How many pages were written lately.

    Attributes:
        window: the seconds asked for.
        seconds: those the samples cover that are nearest to it: less near the start, more if the interval is longer.
        pages: distinct pages written in that time.
    """

    window: float
    seconds: float
    pages: int


class WriteHistory:
    """Keeps for each page the number of the last sample that has it; samples are numbered from 1, and 0 is never.

    Besides, how many pages each sample is the last one of: that is the working set of any window, as a sum.

    Attributes:
        blocks: how many pages each block has, by name.
        samples: how many samples were added.
        time: when the last one ended, in seconds from the start.
    """

    def __init__(self, blocks: Mapping[str, int]) -> None:
        self.blocks = dict(blocks)
        self.samples = 0
        self.time = 0.0
        self._last = {name: np.zeros(pages, np.uint32) for name, pages in blocks.items()}
        self._written = {name: np.zeros(-(-pages // _STRIDE), np.bool_) for name, pages in blocks.items()}
        self._pages = np.zeros(64, np.int64)  # by number of the sample; longer than needed
        self._starts: list[float] = []
        self._middles: list[float] = []

    def add(self, sample: Sample) -> None:
        """Note what a sample says; they come in order.

        Raises:
            UsageError: its blocks are others.
        """
        if {name: bitmap.pages for name, bitmap in sample.written.items()} != self.blocks:
            raise UsageError("the sample is not of the memory that the history is of")
        self.samples += 1
        if self.samples == len(self._pages):
            self._pages = np.concatenate((self._pages, np.zeros_like(self._pages)))
        for name, bitmap in sample.written.items():
            self._note(name, bitmap)
        self.time = sample.time
        self._starts.append(sample.time - sample.seconds)
        self._middles.append(sample.time - sample.seconds / 2)

    def _note(self, name: str, bitmap: PageBitmap) -> None:
        last = self._last[name]
        for first in range(0, bitmap.pages, _STRIDE):
            found = bitmap.indices(first, min(_STRIDE, bitmap.pages - first))
            if found.size:
                self._written[name][first // _STRIDE] = True
                before = np.bincount(last[found])
                self._pages[: before.size] -= before
                self._pages[self.samples] += found.size
                last[found] = self.samples

    @property
    def ever(self) -> int:
        """How many pages were written at all."""
        return int(self._pages[1:].sum())

    def working_set(self, window: float) -> WorkingSet:
        """The distinct pages written in the last ``window`` seconds, to the nearest sample; at least the last one's."""
        first = self._first_sample(window)
        seconds = self.time - self._starts[first - 1] if self.samples else 0.0
        return WorkingSet(window, seconds, int(self._pages[first:].sum()))

    def count_cells(self, name: str, cell_pages: int, windows: Sequence[float]) -> Numbers:
        """How many pages of each cell of a block were written within each of some windows, and how many at all.

        Args:
            name: the block's.
            cell_pages: pages in a cell, a power of two; the last cell may have fewer.
            windows: as `working_set` takes them.

        Returns:
            A row a cell; a column a window, and a last one.
        """
        limits = [self._first_sample(window) for window in windows] + [1]
        cells = np.zeros((-(-self.blocks[name] // cell_pages), len(limits)), np.int64)
        for stride in np.flatnonzero(self._written[name]).tolist():
            last = self._last[name][stride * _STRIDE : (stride + 1) * _STRIDE]
            counts = np.stack([_count_in_cells(last >= limit, cell_pages) for limit in limits], axis=1)
            cell = stride * _STRIDE // cell_pages
            cells[cell : cell + len(counts)] += counts
        return cells

    def _first_sample(self, window: float) -> int:
        """The number of the first sample of those that make up a window: half of it at least lies there."""
        return max(1, min(bisect(self._middles, self.time - window) + 1, self.samples))


def _count_in_cells(pages: npt.NDArray[np.bool_], cell_pages: int) -> Numbers:
    """How many pages are true in each cell."""
    cells = -(-len(pages) // cell_pages)
    if cell_pages < WORD_BITS:
        return _sum_in_cells(pages, cells, cell_pages)
    packed = np.packbits(pages, bitorder="little")
    words = np.zeros(-(-len(packed) // 8) * 8, np.uint8)
    words[: len(packed)] = packed
    return _sum_in_cells(np.bitwise_count(words.view(np.uint64)), cells, cell_pages // WORD_BITS)


def _sum_in_cells(values: npt.NDArray[np.bool_] | npt.NDArray[np.uint8], cells: int, length: int) -> Numbers:
    """The sum of each ``length`` values, of which the last may be missing."""
    whole = len(values) // length
    sums = np.zeros(cells, np.int64)
    sums[:whole] = values[: whole * length].reshape(whole, length).sum(axis=1, dtype=np.int64)
    if whole < cells:
        sums[whole] = values[whole * length :].sum(dtype=np.int64)
    return sums

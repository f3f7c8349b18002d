"""What a source still owes a guest that runs on the destination already."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from dirtylog.errors import ProtocolError
from dirtylog.memory import Numbers, PageBitmap, RAMBlock
from dirtylog.migration.batch import Batch, batch_of, zero_batch
from dirtylog.migration.messages import MAX_RUNS, Lacking, Owed, Runs
from dirtylog.units import PAGE_SIZE

_BATCH_PAGES: Final = 256
"""Enough that what each message costs is little beside what it carries."""
_WINDOW_PAGES: Final = 1 << 15
"""Pages listed at a time."""


class OwedBlock:
    """A block that nobody writes any more, and which of its pages are owed.

    Attributes:
        index: its number.
        block: itself.
        owed: a bit for each page.
    """

    def __init__(self, index: int, block: RAMBlock, owed: PageBitmap) -> None:
        self.index = index
        self.block = block
        self.owed = owed
        self._listed: Numbers = np.empty(0, np.int64)
        self._listed_end = 0
        self._data = (0, 0)
        """First page and end of some data."""

    def replace(self, owed: PageBitmap) -> None:
        """Others are owed."""
        self.owed = owed
        self._listed_end = 0

    def take(self, first: int, most: int) -> tuple[Numbers | Runs, int]:
        """The next pages from there on, and where the next after them may be; none if there are none.

        What is a hole comes whole, as runs; else it is at most ``most`` pages.
        """
        first = self.owed.find(first)
        if first == self.block.pages:
            return np.empty(0, np.int64), first
        data = self.block.mapping.next_data(first * PAGE_SIZE, self.block.size) // PAGE_SIZE
        if data > first:
            return self._take_hole(first, data)
        pages = self._list(first, most)
        self.owed.clear_each(pages)
        return pages, int(pages[-1]) + 1

    def _take_hole(self, first: int, end: int) -> tuple[Runs, int]:
        if self.owed.count(first, end - first) < end - first:
            end = min(end, first + MAX_RUNS)  # no more runs than a message may have
        runs = self.owed.runs(first, end - first)
        self.owed.clear(first, end - first)
        return runs, end

    def _list(self, first: int, most: int) -> Numbers:
        """Pages that are owed, from ``first`` on, which is one, as far as there are data."""
        if not (self._listed.size and self._listed[0] <= first < self._listed_end):
            self._listed_end = min(first + _WINDOW_PAGES, self.block.pages)
            self._listed = self.owed.indices(first, self._listed_end - first)
        start = int(np.searchsorted(self._listed, first))
        pages = self._listed[start : start + most]
        pages = pages[self.owed.test_each(pages)]
        return pages[: int(np.searchsorted(pages, self._data_end(first)))]

    def is_hole(self, page: int) -> bool:
        """Whether a page has no contents, and is zero."""
        start = page * PAGE_SIZE
        in_data = self._data[0] <= page < self._data[1]
        return not in_data and self.block.mapping.next_data(start, start + PAGE_SIZE) > start

    def _data_end(self, page: int) -> int:
        """Where data end that a page is among. That takes as long to find as they are long, and is remembered."""
        if not self._data[0] <= page < self._data[1]:
            start, end = next(self.block.mapping.extents(page * PAGE_SIZE, self.block.size))
            self._data = start // PAGE_SIZE, -(-end // PAGE_SIZE)
        return self._data[1]


class OwedPages:
    """Pages that nobody writes any more: those that are asked for are sent at once, and the others once, in order.

    The order goes on where was asked last: what a guest needs next is often near.

    Args:
        blocks: of a machine that stands still, in the order of their numbers.
    """

    def __init__(self, blocks: Sequence[OwedBlock]) -> None:
        self._blocks = blocks
        self._block, self._next = 0, 0

    @property
    def pages(self) -> int:
        """How many are left."""
        return sum(block.owed.count() for block in self._blocks)

    @property
    def total(self) -> int:
        """How many pages there are, owed or not."""
        return sum(each.block.pages for each in self._blocks)

    def announcements(self) -> Iterator[Owed]:
        """They, for the destination."""
        for block in self._blocks:
            for runs in in_messages(block.owed.runs()):
                yield Owed(block.index, runs)

    def contents(self, block: int, page: int) -> memoryview | None:
        """Those of a page that is asked for; None if it is a hole.

        Raises:
            ProtocolError: there is no such page.
        """
        if block >= len(self._blocks) or page >= self._blocks[block].block.pages:
            raise ProtocolError(f"the destination asks for page {page} of block {block}")
        each = self._blocks[block]
        return None if each.is_hole(page) else each.block.memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def answered(self, block: int, page: int) -> bool:
        """Whether a page was owed still that has been sent because it was asked for; it is owed no more."""
        owed = self._blocks[block].owed
        self._block, self._next = block, page + 1
        was_owed = owed.test(page)
        if was_owed:
            owed.clear_one(page)
        return was_owed

    def take(self) -> Batch | None:
        """Some of the others; None if nothing is left."""
        for _ in range(len(self._blocks) + 1):  # the first one again, from its start
            block = self._blocks[self._block]
            taken, self._next = block.take(self._next, _BATCH_PAGES)
            if taken.size:
                break
            self._block, self._next = (self._block + 1) % len(self._blocks), 0
        else:
            return None
        return zero_batch(block.index, taken) if taken.ndim > 1 else batch_of(block.index, block.block, taken)

    def replace(self, lacking: Sequence[Lacking]) -> None:
        """Owe what the destination says that it lacks, and nothing else.

        Raises:
            ProtocolError: there are no such pages.
        """
        maps = [PageBitmap(block.block.pages) for block in self._blocks]
        for message in lacking:
            if message.block >= len(maps) or message.runs[-1].sum() > maps[message.block].pages:
                raise ProtocolError(f"the destination lacks pages of block {message.block} that are not there")
            for first, count in message.runs.tolist():
                maps[message.block].set(first, count)
        for block, pages in zip(self._blocks, maps, strict=True):
            block.replace(pages)


def in_messages(runs: Runs) -> Iterator[Runs]:
    """As many of them as a message may have, at a time."""
    for start in range(0, len(runs), MAX_RUNS):
        yield runs[start : start + MAX_RUNS]

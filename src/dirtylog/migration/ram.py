"""Walking dirty memory on one side, filling memory on the other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ProtocolError
from dirtylog.memory import ClearChunks, MemoryRegion, Numbers, PageBitmap, RAMBlock
from dirtylog.migration.batch import Batch, batch_of, runs_of
from dirtylog.migration.encoding import decompress
from dirtylog.migration.messages import EncodedPages, Pages, Runs, RunTable, ZeroPages
from dirtylog.migration.owed import OwedBlock
from dirtylog.units import HUGE_PAGE_SIZE, PAGE_SIZE

BATCH_PAGES: Final = 2048
"""Pages looked at, and sent, at a time: 8 MiB, so that what each message costs is small beside what it carries."""
_HUGE_PAGES: Final = HUGE_PAGE_SIZE // PAGE_SIZE
_WINDOW_PAGES: Final = 1 << 15
"""Pages taken out of the bitmap at a time, at most, which bounds the runs in one message too."""
_WORTHWHILE: Final = 256
"""So many pages are a message of their own. Fewer wait for those of the next chunk: where chunks are small, passes
would take longer for their messages than for their pages, and never become short enough for the downtime limit."""


class DirtyRAM:
    """Migration's view of one block: which pages are still to be sent, and which clears are due before.

    All pages are to be sent at first (M3). `harvest` adds what a sync found; `batches` takes pages out, in the order
    that rule D3 wants: clear the log of their chunk, forget them, look at their contents.

    A hole is a log of its own: once written to, it is none any more. So a hole that is announced as zero pages is left
    in the log as it is. KVM's would take as long to clear as that of populated memory, half a second for 256 GiB, where
    it starts with every page set. What is data by the next sync was written to, whatever the log says, which others may
    have cleared since; of what is a hole still, the log is not asked.
    """

    def __init__(self, index: int, region: MemoryRegion, block: RAMBlock, clear_chunk: int) -> None:
        self._index = index
        self._region = region
        self._block = block
        self._to_send = PageBitmap(block.pages)
        self._to_send.set()
        self._chunks = ClearChunks(block.pages, clear_chunk)
        self._known = (0, 0)
        """First page and end of some data. Should they become a hole meanwhile, reading them only costs memory."""
        self._holes: list[tuple[int, int]] = []
        """First pages and ends of what was announced as zero, and was a hole at the last sync."""

    @property
    def pages(self) -> int:
        """How many are to be sent."""
        return self._to_send.count()

    def harvest(self) -> int:
        """Take over what was synced; how many pages were not to be sent before."""
        fresh = self._region.harvest_dirty(self._to_send, self._chunks)
        holes, self._holes = self._holes, []
        for first, end in holes:
            fresh -= self._to_send.count(first, end - first)
            self._to_send.clear(first, end - first)
            fresh += self._harvest_hole(first, end)
        return fresh

    def _harvest_hole(self, first: int, end: int) -> int:
        """Of what was announced as a hole, take what is data now, and remember the rest; how many pages it took."""
        taken = 0
        for start, data_end in self._block.mapping.extents(first * PAGE_SIZE, end * PAGE_SIZE):
            data = start // PAGE_SIZE
            if data > first:
                self._holes.append((first, data))
            first = -(-data_end // PAGE_SIZE)
            self._to_send.set(data, first - data)
            taken += first - data
        if first < end:
            self._holes.append((first, end))
        return taken

    def batches(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Everything to be sent now, ascending; after ``stop`` says so, what is not sent stays to be."""
        window = min(self._chunks.chunk, _WINDOW_PAGES)
        first = since = cleared = no_hole = 0  # [since, first) is cleared where it is dirty, and not looked at yet
        while first < self._block.pages:
            if stop():
                return
            end = first if first < no_hole else first + self._hole(first)
            dirty = self._to_send.count(first, end - first)
            if end > first and dirty in (0, end - first):
                yield from self._look(since, first - since)
                if dirty:
                    yield self._announce_hole(first, end)
                first, since, cleared = end, end, 0
                continue
            no_hole, end = max(no_hole, end), min(first + window, self._block.pages)
            cleared += self._clear(first, end - first)
            first = end
            if not cleared or cleared >= _WORTHWHILE or end - since >= _WINDOW_PAGES:
                yield from self._look(since, end - since)
                since, cleared = end, 0
        yield from self._look(since, first - since)

    def owed(self) -> OwedBlock:
        """What is to be sent still, of a block that nobody writes any more."""
        return OwedBlock(self._index, self._block, self._to_send.copy())

    def _hole(self, first: int) -> int:
        """How many pages from there on are a hole, in whole chunks or up to the end."""
        data = self._block.mapping.next_data(first * PAGE_SIZE, self._block.size) // PAGE_SIZE
        if data == self._block.pages:
            return data - first
        return (data - first) // self._chunks.chunk * self._chunks.chunk

    def _announce_hole(self, first: int, end: int) -> Batch:
        self._to_send.clear(first, end - first)
        self._holes.append((first, end))
        return Batch(None, [], ZeroPages(self._index, np.array([[first, end - first]], np.int64)))

    def _clear(self, first: int, count: int) -> int:
        """Clear the log of what is about to be read; how many pages that are."""
        dirty = self._to_send.count(first, count)
        if dirty:
            for start, length in self._chunks.take(first, count):
                self._region.clear_dirty_bitmap(start * PAGE_SIZE, length * PAGE_SIZE)
        return dirty

    def _look(self, first: int, count: int) -> Iterator[Batch]:
        """Holes are zero without a look, which would allocate them; everything else is looked at in batches."""
        pages = self._to_send.indices(first, count)
        if not len(pages):
            return
        self._to_send.clear(first, count)
        stored = np.zeros(count, np.bool_)
        for start, end in self._data(first, first + count):
            stored[start - first : end - first] = True
        hit = stored[pages - first]
        holes, data = pages[~hit], pages[hit]
        if len(holes):
            yield Batch(None, [], ZeroPages(self._index, runs_of(holes)))
        while len(data):
            end = _batch_end(data)
            yield batch_of(self._index, self._block, data[:end])
            data = data[end:]

    def _data(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a range of pages that are data, or were when it was last asked how far they go."""
        while first < end:
            if not self._known[0] <= first < self._known[1]:
                extent = next(self._block.mapping.extents(first * PAGE_SIZE, self._block.size), None)
                if extent is None:
                    return
                self._known = extent[0] // PAGE_SIZE, -(-extent[1] // PAGE_SIZE)
            start, after = max(first, self._known[0]), min(self._known[1], end)
            if start < after:
                yield start, after
            first = max(after, self._known[0])


class IncomingRAM:
    """The destination's blocks, filled by what messages say.

    Attributes:
        ready: for each block, a flag for each `HUGE_PAGE_SIZE` of it: populated, or filled already.
    """

    def __init__(self, blocks: Sequence[RAMBlock]) -> None:
        self._blocks = blocks
        self.ready = [np.zeros(-(-block.pages // _HUGE_PAGES), np.bool_) for block in blocks]

    def place(self, message: Pages) -> list[memoryview]:
        """Where the contents that follow a message belong.

        Raises:
            ProtocolError: the message names memory that is not there.
        """
        block = checked_block(self._blocks, message)
        self._prepare(block, self.ready[message.block], message.runs)
        return page_views(block, message.runs)

    @staticmethod
    def _prepare(block: RAMBlock, ready: npt.NDArray[np.bool_], runs: Runs) -> None:
        """Give each huge page's worth that is filled for the first time, and filled whole, a huge page.

        Faults on small pages take several times as long as receiving what belongs there.
        """
        firsts, ends = runs[:, 0], runs.sum(axis=1)
        whole = np.stack((-(-firsts // _HUGE_PAGES), ends // _HUGE_PAGES), axis=1)
        for first, end in whole[whole[:, 0] < whole[:, 1]].tolist():
            for index in np.flatnonzero(~ready[first:end]).tolist():
                block.mapping.make_huge((first + index) * HUGE_PAGE_SIZE)
            ready[first:end] = True
        ready[firsts // _HUGE_PAGES] = True
        ready[(ends - 1) // _HUGE_PAGES] = True

    def decode(self, message: EncodedPages, data: bytearray) -> None:
        """Put encoded contents where they belong.

        Raises:
            ProtocolError: the message names memory that is not there, or the data are not what it says.
        """
        block = checked_block(self._blocks, message)
        rows, numbers = decompress(data, message.pages), message.numbers
        if message.difference:
            block.page_words[numbers] ^= rows
        else:
            self._prepare(block, self.ready[message.block], message.runs)
            block.page_words[numbers] = rows

    def zero(self, message: ZeroPages) -> None:
        """Make pages zero, whatever they held, by making them holes (M4).

        Raises:
            ProtocolError: the message names memory that is not there.
        """
        block = checked_block(self._blocks, message)
        for first, count in message.runs.tolist():
            start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            if block.mapping.next_data(start, end) < end:
                block.mapping.punch(start, end - start)


def checked_block(blocks: Sequence[RAMBlock], message: RunTable) -> RAMBlock:
    """The block that a message is about.

    Raises:
        ProtocolError: the message names memory that is not there.
    """
    if message.block >= len(blocks):
        raise ProtocolError(f"the stream is corrupt: pages of block {message.block} of {len(blocks)}")
    block = blocks[message.block]
    end = int(message.runs[-1].sum())  # runs ascend
    if end > block.pages:
        raise ProtocolError(f"the stream is corrupt: page {end - 1} of block {block.name!r}, which has {block.pages}")
    return block


def _batch_end(pages: Numbers) -> int:
    """How many of the pages make the next batch. It ends where a huge page does if it can, for `IncomingRAM`."""
    if len(pages) <= BATCH_PAGES:
        return len(pages)
    boundary = pages[BATCH_PAGES] // _HUGE_PAGES * _HUGE_PAGES
    return int(np.searchsorted(pages[:BATCH_PAGES], boundary)) or BATCH_PAGES


def page_views(block: RAMBlock, runs: Runs) -> list[memoryview]:
    """The memory of each run, to be filled."""
    memory = block.memory
    return [memory[start:end] for start, end in (runs.cumsum(axis=1) * PAGE_SIZE).tolist()]

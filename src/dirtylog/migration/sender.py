"""Batches of dirty pages on their way into one channel, each in the way that costs the least time.

What zstd or a difference is made of must stand still, and be what the destination gets: pages are copied first then,
and the copy is sent. A guest that writes meanwhile makes the page dirty again (D3).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.linux.mapping import Contents
from dirtylog.memory import Numbers, RAMBlock
from dirtylog.migration.batch import Batch, runs_of
from dirtylog.migration.economy import LEVELS, TELLING, Economy, Way
from dirtylog.migration.encoding import Compressor, Rows, SentCopies
from dirtylog.migration.messages import EncodedPages, Pages
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.statistics import Ways, sum_ways
from dirtylog.units import PAGE_SIZE

_WORTH_KEEPING: Final = 16
"""Copies are kept where the link takes so many times as long as making them."""
_SAMPLE_PAGES: Final = TELLING // PAGE_SIZE


@dataclass(slots=True)
class Sent:
    """What became of some batches.

    Attributes:
        bytes: on the wire.
        ways: pages with contents, and bytes they took, by the way they were sent.
        found: pages of which there was a copy, where copies are kept.
        missed: pages of which there was none.
        overflowed: pages whose differences were no shorter than their contents.
    """

    bytes: int = 0
    ways: Ways = field(default_factory=dict)
    found: int = 0
    missed: int = 0
    overflowed: int = 0

    def add(self, way: Way, pages: int, size: int) -> None:
        """Count a message of pages with contents."""
        self.bytes += size
        self.ways = sum_ways(self.ways, {way: (pages, size)})

    def merge(self, other: "Sent") -> None:
        """Count what another has counted."""
        self.bytes += other.bytes
        self.ways = sum_ways(self.ways, other.ways)
        self.found += other.found
        self.missed += other.missed
        self.overflowed += other.overflowed


@dataclass(slots=True)
class _Copied:
    """Pages of a block, what was in them a moment ago, and the seconds a byte that finding out took."""

    block: int
    numbers: Numbers
    rows: Rows
    work: float

    def part(self, chosen: npt.NDArray[np.bool_]) -> "_Copied":
        return _Copied(self.block, self.numbers[chosen], self.rows[chosen], self.work)


class Sender:
    """Sends batches on one channel, in one thread at a time.

    Args:
        channel: where to.
        blocks: in the order of their numbers.
        economy: decides; its measurements are of this channel.
        copies: what the destination has; None where differences are not allowed. Shared by all channels.
    """

    def __init__(
        self, channel: Outlet, blocks: Sequence[RAMBlock], economy: Economy, copies: SentCopies | None
    ) -> None:
        self.channel = channel
        self.economy = economy
        self._blocks = blocks
        self._copies = copies
        self._compressors = {way: Compressor(LEVELS[way]) for way in economy.ways}
        self._keeping = 0.0
        """Seconds a byte that keeping a copy takes."""

    def send(self, batch: Batch) -> Sent:
        """Send a batch."""
        sent = Sent()
        if batch.zeros is not None:
            sent.bytes += self.channel.send(batch.zeros)
            if self._copies is not None:  # holes come in runs of many pages, which only copies need one by one
                self._copies.forget(batch.zeros.block, batch.zeros.numbers)
        if batch.pages is not None and not self.economy.ways:
            sent.add(Way.PLAIN, batch.pages.pages, self.channel.send(batch.pages, batch.contents))
        elif batch.pages is not None:
            self._choose(batch.pages, batch.contents, sent)
        return sent

    def _choose(self, pages: Pages, contents: Sequence[Contents], sent: Sent) -> None:
        numbers = pages.numbers
        known = self._known(pages.block, numbers)
        self._sample(pages.block, numbers, known)
        fresh, again = self.economy.choose(), self.economy.choose(known=True)
        keeps = self._keeps()
        if keeps:
            found = int(known.sum())
            sent.found, sent.missed = sent.found + found, sent.missed + numbers.size - found
        if fresh is Way.PLAIN and not keeps and not (again is Way.DELTA and known.any()):
            self._forget(pages.block, numbers)
            began = time.monotonic()
            size = self.channel.send(pages, contents)
            self.economy.sent_plain(size, time.monotonic() - began)
            sent.add(Way.PLAIN, pages.pages, size)
            return
        copied = self._copy(pages.block, numbers)
        rest = self._send_differences(copied, sent) if again is Way.DELTA else copied
        self._send_copied(rest, fresh, rest.rows, sent)
        self._keep(copied) if keeps else self._forget(pages.block, numbers)

    def _copy(self, block: int, numbers: Numbers) -> _Copied:
        began = time.monotonic()
        rows = self._blocks[block].page_words[numbers]
        return _Copied(block, numbers, rows, (time.monotonic() - began) / rows.nbytes)

    def _send_differences(self, copied: _Copied, sent: Sent) -> _Copied:
        """Send what there are copies of as differences; the rest."""
        if self._copies is None:
            return copied
        began = time.monotonic()
        known, differences = self._copies.differences(copied.block, copied.numbers, copied.rows)
        part = copied.part(known)
        part.work += (time.monotonic() - began) / max(1, part.rows.nbytes)
        self._send_copied(part, Way.DELTA, differences, sent)
        return copied.part(~known)

    def _send_copied(self, copied: _Copied, way: Way, source: Rows, sent: Sent) -> None:
        """Send pages as what zstd makes of ``source``, unless that is no less."""
        memory, pages = copied.rows.nbytes, copied.numbers.size
        if not pages:
            return
        if way is Way.PLAIN:
            self._send_rows(copied, sent)
            return
        began = time.monotonic()
        data = self._compressors[way].compress(source)
        work = time.monotonic() - began + copied.work * memory
        if len(data) >= memory:
            self.economy.sampled(way, memory, len(data), work)
            sent.overflowed += pages if way is Way.DELTA else 0
            self._send_rows(copied, sent)
            return
        began = time.monotonic()
        message = EncodedPages(copied.block, runs_of(copied.numbers), size=len(data), difference=way is Way.DELTA)
        size = self.channel.send(message, [memoryview(data)])
        self.economy.sent_encoded(way, memory, size, work, time.monotonic() - began)
        sent.add(way, pages, size)

    def _send_rows(self, copied: _Copied, sent: Sent) -> None:
        began = time.monotonic()
        message = Pages(copied.block, runs_of(copied.numbers))
        size = self.channel.send(message, [copied.rows.data.cast("B")])
        self.economy.sent_plain(size, time.monotonic() - began)
        sent.add(Way.PLAIN, copied.numbers.size, size)

    def _sample(self, block: int, numbers: Numbers, known: npt.NDArray[np.bool_]) -> None:
        """Find out what one way would make of some of the pages, if it is time to."""
        way = self.economy.to_sample(known=int(known.sum()) >= _SAMPLE_PAGES)
        chosen = numbers[known] if way is Way.DELTA else numbers
        if way is None or chosen.size < _SAMPLE_PAGES:
            return
        chosen = chosen[:: chosen.size // _SAMPLE_PAGES]
        copied = self._copy(block, chosen)
        began = time.monotonic()
        source = copied.rows
        if way is Way.DELTA and self._copies is not None:
            _, source = self._copies.differences(block, chosen, copied.rows)
            if len(source) < len(copied.rows):  # other channels have replaced copies meanwhile
                return
        size = len(self._compressors[way].compress(source))
        work = time.monotonic() - began + copied.work * copied.rows.nbytes
        self.economy.sampled(way, copied.rows.nbytes, size, work)

    def _known(self, block: int, numbers: Numbers) -> npt.NDArray[np.bool_]:
        if self._copies is None:
            return np.zeros(numbers.size, np.bool_)
        return self._copies.known(block, numbers)

    def _keeps(self) -> bool:
        """Whether the link is slow enough for copies, as far as is known."""
        return self._copies is not None and self.economy.wire > _WORTH_KEEPING * self._keeping

    def _keep(self, copied: _Copied) -> None:
        if self._copies is not None:
            began = time.monotonic()
            self._copies.keep(copied.block, copied.numbers, copied.rows)
            self._keeping = copied.work + (time.monotonic() - began) / copied.rows.nbytes

    def _forget(self, block: int, numbers: Numbers) -> None:
        if self._copies is not None:
            self._copies.forget(block, numbers)

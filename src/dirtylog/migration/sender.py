"""Batches of dirty pages on their way to channels: how each is sent, and on which channel."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from dirtylog.errors import ProtocolError
from dirtylog.memory import RAMBlock
from dirtylog.migration.channel import Channel
from dirtylog.migration.economy import LEVELS, Economy, Way
from dirtylog.migration.encoding import Rows, SentCopies, compress
from dirtylog.migration.messages import EncodedPages, Pages, PassDone, PassEnd, ZeroPages
from dirtylog.migration.parameters import Compression, Parameters
from dirtylog.migration.ram import Batch, Indices, runs_of
from dirtylog.migration.statistics import Ways, add_ways

_WORTH_KEEPING: Final = 10
"""Copies for differences are kept where the link takes so many times as long as making them."""
_QUEUED: Final = 2
"""Batches that wait for a channel: enough that it never does, few enough that memory is read soon after its clear."""


@dataclass(slots=True)
class Sent:
    """What became of some batches.

    Attributes:
        bytes: on the wire.
        ways: pages with contents, and bytes they took, by the way they were sent.
    """

    bytes: int = 0
    ways: Ways = field(default_factory=dict)

    def add(self, way: Way, pages: int, size: int) -> None:
        """Count a message of pages."""
        self.bytes += size
        add_ways(self.ways, {way: (pages, size)})

    def merge(self, other: "Sent") -> None:
        """Count what another has counted."""
        self.bytes += other.bytes
        add_ways(self.ways, other.ways)


class Sender:
    """Sends batches on one channel, each in the way that costs the least time.

    Args:
        channel: used by one thread at a time.
        blocks: in the order of their numbers.
        economy: decides; its measurements are of this channel.
        copies: what was sent last, by block; None where differences are not allowed. May be shared, with ``lock``.
        lock: covers the copies.
    """

    def __init__(
        self,
        channel: Channel,
        blocks: Sequence[RAMBlock],
        economy: Economy,
        copies: Sequence[SentCopies] | None,
        lock: threading.Lock,
    ) -> None:
        self.channel = channel
        self.economy = economy
        self._blocks = blocks
        self._copies = copies
        self._lock = lock
        self._copying = 0.0

    def send(self, batch: Batch) -> Sent:
        """Send a batch."""
        sent = Sent()
        if batch.zeros is not None:
            sent.bytes += self.channel.send(batch.zeros)
            self._forget(batch.zeros)
        if batch.pages is not None:
            way = self.economy.choose() if self.economy.ways else Way.PLAIN
            if way is Way.PLAIN and not self._keeps():
                self._send_in_place(batch.pages, batch.memory, sent)
            else:
                self._send_copied(batch.pages, way, sent)
        return sent

    def _send_in_place(self, pages: Pages, memory: list[memoryview], sent: Sent) -> None:
        self._forget(pages)
        began = time.monotonic()
        size = self.channel.send(pages, memory)
        self.economy.sent_plain(size, time.monotonic() - began)
        sent.add(Way.PLAIN, pages.pages, size)

    def _send_copied(self, pages: Pages, way: Way, sent: Sent) -> None:
        """Send pages from a copy, since neither zstd nor a difference can stand the guest's writes in between."""
        numbers = pages.numbers
        began = time.monotonic()
        rows = self._blocks[pages.block].page_words[numbers]
        copying = time.monotonic() - began
        self._copying = copying / rows.nbytes
        if way is Way.DELTA and self._copies is not None:
            with self._lock:
                known = self._copies[pages.block].known(numbers)
                differences = self._copies[pages.block].differences(numbers[known], rows[known])
            self._send_encoded(pages.block, numbers[known], rows[known], differences, way, copying, sent)
            self._send_encoded(pages.block, numbers[~known], rows[~known], rows[~known], Way.FAST, copying, sent)
        elif way is Way.PLAIN:
            self._send_rows(pages.block, numbers, rows, sent)
        else:
            self._send_encoded(pages.block, numbers, rows, rows, way, copying, sent)
        if self._copies is not None and self._keeps():
            with self._lock:
                self._copies[pages.block].keep(numbers, rows)
        else:
            self._forget(pages)

    def _send_encoded(
        self, block: int, numbers: Indices, rows: Rows, source: Rows, way: Way, copying: float, sent: Sent
    ) -> None:
        """Send pages as what zstd makes of ``source``, unless that is no less."""
        if not numbers.size:
            return
        began = time.monotonic()
        data = compress(source, LEVELS[way])
        spent = time.monotonic() - began + copying
        self.economy.sent_encoded(way, rows.nbytes, len(data), spent)
        if len(data) < rows.nbytes:
            message = EncodedPages(block, runs_of(numbers), size=len(data), difference=way is Way.DELTA)
            sent.add(way, numbers.size, self.channel.send(message, [memoryview(data)]))
        else:
            self._send_rows(block, numbers, rows, sent)

    def _send_rows(self, block: int, numbers: Indices, rows: Rows, sent: Sent) -> None:
        began = time.monotonic()
        size = self.channel.send(Pages(block, runs_of(numbers)), [rows.data.cast("B")])
        self.economy.sent_plain(size, time.monotonic() - began)
        sent.add(Way.PLAIN, numbers.size, size)

    def _keeps(self) -> bool:
        return self._copies is not None and self.economy.link > _WORTH_KEEPING * self._copying

    def _forget(self, table: Pages | ZeroPages) -> None:
        if self._copies is not None:
            with self._lock:
                self._copies[table.block].forget(table.numbers)


def senders(channels: Sequence[Channel], blocks: Sequence[RAMBlock], parameters: Parameters) -> list[Sender]:
    """A sender for each channel, with the ways of sending that the parameters allow."""
    ways: tuple[Way, ...] = (Way.FAST, Way.THOROUGH) if parameters.compression is Compression.AUTO else ()
    copies = None
    if parameters.delta_cache:
        ways += (Way.DELTA,)
        total = sum(block.size for block in blocks)
        share = min(1.0, parameters.delta_cache / total)
        copies = [SentCopies(max(1, int(block.pages * share))) for block in blocks]
    lock = threading.Lock()
    return [Sender(channel, blocks, Economy(ways), copies, lock) for channel in channels]


class Lanes:
    """One or more channels as one: batches go to whichever is free, and a pass ends when all channels have it.

    Within a pass each page is sent once; between passes all wait. So no older copy of a page can arrive after a newer.

    With one channel everything happens in the caller's thread. With more, each has a thread, and the first error in any
    is raised by the next call here.
    """

    def __init__(self, senders: Sequence[Sender]) -> None:
        self._senders = senders
        self._queue: queue.Queue[Batch | None] = queue.Queue(_QUEUED * len(senders))
        self._lock = threading.Lock()
        self._sent = Sent()
        self._error: Exception | None = None
        self._threads: list[threading.Thread] = []
        if len(senders) > 1:
            for index, sender in enumerate(senders):
                thread = threading.Thread(target=self._work, args=(sender,), name=f"channel{index}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def limit(self, rate: int) -> None:
        """Say how many bytes a second may be sent in all; 0 for no limit. Whoever calls `send` keeps to it."""
        for sender in self._senders:
            sender.economy.limit = rate // len(self._senders)

    def send(self, batch: Batch) -> Sent:
        """Have a batch sent; what was sent since the last call."""
        if not self._threads:
            return self._senders[0].send(batch)
        self._put(batch)
        return self._take()

    def end_pass(self, number: int) -> tuple[Sent, float]:
        """Wait until the destination has everything; what was sent since the last call, and seconds without CPU there.

        Raises:
            ProtocolError: the destination has another pass.
        """
        self._flush()
        for sender in self._senders:
            with self._lock:
                self._sent.bytes += sender.channel.send(PassEnd(number))
        starved = 0
        for sender in self._senders:
            done = sender.channel.expect(PassDone)
            if done.number != number:
                raise ProtocolError(f"the destination has pass {done.number} when pass {number} was sent")
            if done.decoded:
                sender.economy.decoding = done.decode_ns / 1e9 / done.decoded
            starved = max(starved, done.starved_ns)
        return self._take(), starved / 1e9

    def close(self) -> None:
        """End the threads; idempotent. To be called after the channels were aborted, or a pass has ended."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()

    def _flush(self) -> None:
        self._queue.join()
        self._raise()

    def _put(self, batch: Batch) -> None:
        self._raise()
        self._queue.put(batch)

    def _take(self) -> Sent:
        self._raise()
        with self._lock:
            sent, self._sent = self._sent, Sent()
            return sent

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, sender: Sender) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:  # after that the queue only empties
                    sent = sender.send(batch)
                    with self._lock:
                        self._sent.merge(sent)
            except Exception as error:  # noqa: BLE001 - raised by the next call of the owner
                self._error = error
            finally:
                self._queue.task_done()

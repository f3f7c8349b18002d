"""The destination's memory while some of it is still to come and the guest runs already.

What is owed is a hole here, and so is much that is zero. Who touches a hole waits (see `linux.missing`) until it is
filled: with what the source sends if the page is owed, else with zeros at once.

A page that somebody waits for is asked for, and comes on the urgent channel, even if it is on its way on the other:
there it may be behind many. So it may come twice, once on each, and is put in place by whichever is quicker.

A thread of Python's that touched a page that is absent would wait for it with the interpreter's lock, which those need
who fetch it. So such threads ask for it first: see `RAMBlock.fetch`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np

from dirtylog.errors import HostError, ProtocolError
from dirtylog.linux.mapping import BufferMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.linux.wakeup import Wakeup
from dirtylog.memory import PageBitmap, RAMBlock
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Lacking, Owed, Pages, Runs, ZeroPages
from dirtylog.migration.owed import in_messages
from dirtylog.migration.ram import checked_block
from dirtylog.units import PAGE_SIZE, WORD_BITS

_AT_ONCE: Final = 4 * PAGE_SIZE
"""Bytes that are put in place before it is looked who waits: that takes some microseconds a page."""
_AT_ONCE_WAITING: Final = 2 * PAGE_SIZE
"""The same while an answer is on its way."""
_ZERO_AT_ONCE: Final = 512
"""Pages of a hole that are made zero when one of them is touched, at most."""
_PATIENCE: Final = 30.0
"""Seconds that a thread of ours waits for a page that it asked for."""
_ASK_AT_ONCE: Final = 64
"""Pages that such a thread asks for at a time: what the guest waits for comes after them."""
_MOST_UNANSWERED: Final = 128
"""Requests that the source has not answered, at most. So many fit into any socket's buffer: were they more, each side
could wait in a send until the other reads."""


class _AbsentBlock:
    """A block, and its pages that are owed, that came early, and that were asked for and not answered: see above."""

    def __init__(self, index: int, block: RAMBlock) -> None:
        self.index = index
        self.block = block
        self.address = block.mapping.address
        self.size = block.size
        self.owed, self.early = PageBitmap(block.pages), PageBitmap(block.pages)
        self.asked: set[int] = set()

    def owe(self, first: int, count: int) -> None:
        if self.owed.any(first, count):
            raise ProtocolError(f"the source owes page {first} or one of the {count - 1} after it twice")
        self.owed.set(first, count)
        start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        if self.block.mapping.next_data(start, end) < end:
            self.block.mapping.punch(start, end - start)

    def hole_end(self, page: int) -> int:
        """Where the hole ends that a page is in, or what of it is not owed, or is enough at once."""
        end = min(page + _ZERO_AT_ONCE, self.block.pages)
        owed = self.owed.indices(page, end - page)
        end = int(owed[0]) if owed.size else end
        return max(page + 1, self.block.mapping.next_data(page * PAGE_SIZE, end * PAGE_SIZE) // PAGE_SIZE)

    def check(self, runs: Runs) -> None:
        where, bits = self._bits(runs)
        if (bits.words & ~(self.owed.words[where] | self.early.words[where])).any():
            raise self.refuse()

    def settle(self, runs: Runs) -> tuple[int, list[int]]:
        """Pages that have come are owed no more: how many were, and which of these were asked for."""
        where, bits = self._bits(runs)
        fresh = PageBitmap(bits.pages, bits.words & self.owed.words[where])
        for bitmap in (self.owed, self.early):
            bitmap.words[where] &= ~bits.words
        base = where.start * WORD_BITS
        return fresh.count(), [
            page for page in self.asked if 0 <= page - base < fresh.pages and fresh.test(page - base)
        ]

    def _bits(self, runs: Runs) -> tuple[slice, PageBitmap]:
        """Some runs as a bitmap of the words that they are in, and which words these are."""
        word, end = int(runs[0, 0]) // WORD_BITS, int(runs[-1].sum())
        starts = runs[:, 0] - word * WORD_BITS
        bits = PageBitmap.from_runs(end - word * WORD_BITS, starts, starts + runs[:, 1])
        return slice(word, word + bits.words.size), bits

    def refuse(self) -> ProtocolError:
        return ProtocolError(f"the source sent pages of block {self.block.name!r} that it does not owe")


class AbsentRAM:
    """Blocks of which pages are owed. May be used from any thread.

    Args:
        blocks: of the machine.
        faults: owned here from now on.
        blocktime: told who waits.

    Attributes:
        wakeup: set when something is wanted by a thread that has no fault.
    """

    def __init__(self, blocks: Sequence[RAMBlock], faults: MissingFaults, blocktime: Blocktime) -> None:
        self.wakeup = Wakeup()
        self._ram_blocks = blocks
        self._blocks = [_AbsentBlock(index, block) for index, block in enumerate(blocks)]
        self._registered: list[_AbsentBlock] = []
        self._faults = faults
        self._blocktime = blocktime
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._wanted: list[tuple[int, int]] = []
        self._requested: set[tuple[int, int]] = set()
        self._left = 0
        self._closing = threading.Lock()
        self._closed = False

    @property
    def pages(self) -> int:
        """How many are owed."""
        return self._left

    def fileno(self) -> int:
        """A descriptor that is readable while `serve` has faults to read."""
        return self._faults.fileno()

    def owe(self, message: Owed) -> None:
        """Give up what is stale.

        Raises:
            ProtocolError: the message names memory that is not there, or that is owed already.
        """
        checked_block(self._ram_blocks, message)
        for first, count in message.runs.tolist():
            self._blocks[message.block].owe(first, count)
            self._left += count

    def begin(self) -> None:
        """From here on whoever touches a hole waits, in blocks of which pages are owed.

        Raises:
            UntrackableError: the kernel does not serve such memory.
        """
        for each in self._blocks:
            if each.owed.any():
                self._faults.register(each.address, each.size)
                self._registered.append(each)
                each.block.fetch = partial(self._fetch, each)

    def serve(self, request: Callable[[int, int], None]) -> None:
        """Find out who waits, and have the source asked for the pages that they wait for, each once.

        Args:
            request: asks for a page, by the number of its block and its own.
        """
        now, waiting = time.monotonic(), []
        for address, thread in self._faults.read():
            for each in self._registered:
                if 0 <= (offset := address - each.address) < each.size:
                    page = offset // PAGE_SIZE
                    with self._lock:
                        is_owed = self._want(each, page)
                    if is_owed:
                        waiting.append((each.index, page, thread))
                    else:
                        self._zero_hole(each, page)
        try:
            self.ask(request)
        finally:
            for index, page, thread in waiting:  # only now, as they wait for what is asked for
                self._blocktime.begin(index, page, thread, now)

    def ask(self, request: Callable[[int, int], None]) -> None:
        """Have the source asked for what else is wanted, now that there may be room for it: see `serve`."""
        while self._wanted and len(self._requested) < _MOST_UNANSWERED:
            with self._lock:
                block, page = self._wanted.pop(0)
                self._requested.add((block, page))
            request(block, page)

    def ask_again(self) -> None:
        """Ask for what was asked for and is not here yet: there is a new connection, on which nothing is on its way."""
        with self._lock:
            self._wanted, self._requested = [], set()
            for each in self._blocks:
                each.asked = {page for page in each.asked if each.owed.test(page)}
                each.early.clear()
                self._wanted += [(each.index, page) for page in sorted(each.asked)]

    def lacking(self) -> Iterator[Lacking]:
        """What is owed, for the source."""
        with self._lock:
            tables = [each.owed.runs() for each in self._blocks]
        for index, runs in enumerate(tables):
            for some in in_messages(runs):
                yield Lacking(index, some)

    def receive(self, channel: Channel, message: Pages, buffer: BufferMapping, serve: Callable[[], None]) -> None:
        """Receive what follows a message, as much as fits into a buffer at a time, and put that in place.

        Args:
            channel: where the message came from.
            message: about pages that are owed.
            buffer: to receive into.
            serve: called before every few pages that are put in place.

        Raises:
            ProtocolError: the message names memory that is not there, or is not owed.
        """
        checked_block(self._ram_blocks, message)
        each = self._blocks[message.block]
        with self._lock:
            each.check(message.runs)
        placed: list[tuple[int, int]] = []
        try:
            for runs in _in_pieces(message.runs, buffer.size // PAGE_SIZE):
                channel.receive_into([buffer.memory[: sum(count for _, count in runs) * PAGE_SIZE]])
                contents = buffer.address
                for first, count in runs:
                    self._place(each.address + first * PAGE_SIZE, contents, count * PAGE_SIZE, serve)
                    placed.append((first, count))
                    contents += count * PAGE_SIZE
        finally:  # the connection may be lost in the middle
            if placed:
                for page in self._settle(each, np.array(placed)):
                    self._blocktime.end(each.index, page)

    def _settle(self, each: _AbsentBlock, runs: Runs) -> list[int]:
        """Pages are in place; which of them were asked for. What the urgent channel had brought was counted there."""
        with self._lock:
            count, waited_for = each.settle(runs)
            self._count_down(count, someone_waits=bool(waited_for))
        return waited_for

    def _place(self, address: int, contents: int, size: int, serve: Callable[[], None]) -> None:
        while size:
            serve()
            most = _AT_ONCE_WAITING if self._requested else _AT_ONCE
            done = self._faults.copy(address, contents, min(size, most))
            if done < min(size, most):  # a page that is there already came on the urgent channel
                done += PAGE_SIZE
            address, contents, size = address + done, contents + done, size - done

    def answered(self, block: int, page: int, contents: int) -> None:
        """Put a page in place that was asked for.

        Args:
            block: number of its block.
            page: its own.
            contents: their address; 0 if it is zero.

        Raises:
            ProtocolError: it was not asked for.
        """
        if (block, page) not in self._requested:
            raise ProtocolError(f"the source sent page {page} of block {block}, which it was not asked for")
        each = self._blocks[block]
        address = each.address + page * PAGE_SIZE
        if contents and each.owed.test(page):
            self._faults.copy(address, contents, PAGE_SIZE)
        with self._lock:
            each.asked.discard(page)
            self._requested.discard((block, page))
            if each.owed.test(page):
                each.owed.clear_one(page)
                each.early.set(page, 1)
                self._count_down(1, someone_waits=True)
        if not contents:
            self._faults.zero(address, PAGE_SIZE)
        self._blocktime.end(block, page)

    def zero(self, message: ZeroPages) -> None:
        """What the source owes there is zero.

        Raises:
            ProtocolError: the message names memory that is not there, or is not owed.
        """
        checked_block(self._ram_blocks, message)
        each = self._blocks[message.block]
        with self._lock:
            each.check(message.runs)
        for page in self._settle(each, message.runs):  # from here on faults are served with zeros
            self._faults.zero(each.address + page * PAGE_SIZE, PAGE_SIZE)
            self._blocktime.end(each.index, page)

    def close(self) -> None:
        """End it; who still waits goes on, and finds zeros. Idempotent."""
        with self._closing:
            with self._lock:
                self._closed = True
                self._arrived.notify_all()
            registered, self._registered = self._registered, []
            for each in registered:
                each.block.fetch = None
                self._faults.unregister(each.address, each.size)
            self._faults.close()
            self.wakeup.close()

    def _count_down(self, pages: int, *, someone_waits: bool) -> None:
        self._left -= pages
        if someone_waits or not self._left:
            self._arrived.notify_all()

    def _want(self, each: _AbsentBlock, page: int) -> bool:
        """Have a page asked for if it is owed; whether it is. With the lock held."""
        if not each.owed.test(page):
            return False
        if page not in each.asked:
            each.asked.add(page)
            self._wanted.append((each.index, page))
        return True

    def _fetch(self, each: _AbsentBlock, offset: int, size: int) -> None:
        """See `RAMBlock.fetch`."""
        last = -(-(offset + size) // PAGE_SIZE)
        for first in range(offset // PAGE_SIZE, last, _ASK_AT_ONCE):
            self._fetch_some(each, first, min(first + _ASK_AT_ONCE, last))

    def _fetch_some(self, each: _AbsentBlock, first: int, end: int) -> None:
        with self._lock:
            wanted = [page for page in range(first, end) if self._want(each, page)]
            for page in wanted:
                self._blocktime.begin(each.index, page, 0, time.monotonic())
        if wanted:
            with self._closing:
                if not self._closed:
                    self.wakeup.set()
            with self._lock:
                if not self._arrived.wait_for(lambda: self._closed or not each.owed.any(first, end - first), _PATIENCE):
                    raise HostError(
                        f"memory of the guest has not arrived here within {_PATIENCE:.0f} s",
                        remedy="see what became of the source, and of the network to it",
                    )
        with self._closing:
            while first < end and not self._closed:
                first = self._zero_hole(each, first)

    def _zero_hole(self, each: _AbsentBlock, page: int) -> int:
        """Fill the hole around a page that is not owed; the end of that."""
        with self._lock:
            end = each.hole_end(page)
        self._faults.zero(each.address + page * PAGE_SIZE, (end - page) * PAGE_SIZE)
        return end


def _in_pieces(runs: Runs, most: int) -> Iterator[list[tuple[int, int]]]:
    """Runs, at most so many pages at a time."""
    piece: list[tuple[int, int]] = []
    left = most
    for first, count in runs.tolist():
        end = first + count
        while first < end:
            taken = min(end - first, left)
            piece.append((first, taken))
            first, left = first + taken, left - taken
            if not left:
                yield piece
                piece, left = [], most
    if piece:
        yield piece

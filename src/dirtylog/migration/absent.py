"""The destination's memory while some of it is still to come and the guest runs already.

What is owed is a hole here, and so is much that is zero. Who touches a hole waits (see `linux.missing`) until it is
filled: with what the source sends if the page is owed, else with zeros at once.

A thread of Python's that touched a page that is absent would wait for it with the interpreter's lock, which those need
who fetch it. So such threads ask for it first: see `RAMBlock.fetch`.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import HostError, ProtocolError
from dirtylog.linux.missing import MissingFaults
from dirtylog.linux.wakeup import Wakeup
from dirtylog.memory import Numbers, PageBitmap, RAMBlock
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Lacking, Owed, Page, Pages, Request, ZeroPages
from dirtylog.migration.owed import in_messages
from dirtylog.migration.ram import checked_block
from dirtylog.units import PAGE_SIZE

_ZERO_AT_ONCE: Final = 512
"""Pages of a hole that are made zero when one of them is touched, at most."""
_PATIENCE: Final = 30.0
"""Seconds that a thread of ours waits for a page that it asked for."""


class AbsentRAM:
    """Blocks of which pages are owed. May be used from any thread.

    Args:
        blocks: of the machine.
        faults: owned here from now on.
        blocktime: told who waits.

    Attributes:
        wakeup: set when `requests` has something to say that is not about faults.
    """

    def __init__(self, blocks: Sequence[RAMBlock], faults: MissingFaults, blocktime: Blocktime) -> None:
        self._blocks = blocks
        self._faults = faults
        self._blocktime = blocktime
        self.wakeup = Wakeup()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._owed = [PageBitmap(block.pages) for block in blocks]
        self._requested = [PageBitmap(block.pages) for block in blocks]
        self._wanted: list[Request] = []
        self._left = 0
        self._registered: list[RAMBlock] = []

    @property
    def pages(self) -> int:
        """How many are owed."""
        return self._left

    def fileno(self) -> int:
        """A descriptor that is readable while `requests` has something to say about faults."""
        return self._faults.fileno()

    def owe(self, message: Owed) -> None:
        """Give up what is stale.

        Raises:
            ProtocolError: the message names memory that is not there, or that is owed already.
        """
        block = checked_block(self._blocks, message)
        owed = self._owed[message.block]
        for first, count in message.runs.tolist():
            if owed.any(first, count):
                raise ProtocolError(f"the source owes page {first} or one of the {count - 1} after it twice")
            owed.set(first, count)
            self._left += count
            start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            if block.mapping.next_data(start, end) < end:
                block.mapping.punch(start, end - start)

    def begin(self) -> None:
        """From here on whoever touches a hole waits, in blocks of which pages are owed.

        Raises:
            TrackingError: the kernel does not serve such memory.
        """
        for index, (block, owed) in enumerate(zip(self._blocks, self._owed, strict=True)):
            if owed.any():
                self._faults.register(block.mapping.address, block.size)
                self._registered.append(block)
                block.fetch = partial(self._fetch, index)

    def requests(self) -> list[Request]:
        """What to ask the source for: pages that somebody waits for, each once."""
        for fault in self._faults.read():
            self._serve(fault.address, fault.thread)
        with self._lock:
            wanted, self._wanted = self._wanted, []
            return wanted

    def ask_again(self) -> None:
        """Ask for what was asked for and is not here yet: there is a new connection."""
        with self._lock:
            self._wanted = [
                Request(index, page)
                for index, (requested, owed) in enumerate(zip(self._requested, self._owed, strict=True))
                for page in requested.indices().tolist()
                if owed.test(page)
            ]

    def lacking(self) -> Iterator[Lacking]:
        """What is owed, for the source."""
        with self._lock:
            tables = [owed.runs() for owed in self._owed]
        for index, runs in enumerate(tables):
            for some in in_messages(runs):
                yield Lacking(index, some)

    def receive(self, channel: Channel, message: Pages, buffer: npt.NDArray[np.uint8]) -> None:
        """Receive what follows a message, and put it in place once it is here whole.

        Args:
            channel: where the message came from.
            message: about pages that are owed.
            buffer: to receive into, shape (at least as long as that,).

        Raises:
            ProtocolError: the message names memory that is not there, or is not owed.
        """
        channel.receive_into([buffer.data[: message.payload_size]])
        numbers, source = message.numbers, int(buffer.ctypes.data)
        block = self._checked(message, numbers)
        for first, count in message.runs.tolist():
            size = count * PAGE_SIZE
            if self._faults.copy(block.mapping.address + first * PAGE_SIZE, source, size) < size:
                raise ProtocolError(f"a page from {first} on of block {block.name!r} was here before it came")
            source += size
        self._note(message.block, numbers)

    def receive_page(self, channel: Channel, message: Page, buffer: npt.NDArray[np.uint8]) -> None:
        """See `receive`, for a single page, where each microsecond counts: its guest waits."""
        channel.receive_into([buffer.data[:PAGE_SIZE]])
        index, page = message.block, message.page
        if index >= len(self._blocks) or page >= self._blocks[index].pages or not self._owed[index].test(page):
            raise ProtocolError(f"the source sent page {page} of block {index}, which it does not owe")
        block = self._blocks[index]
        if self._faults.copy(block.mapping.address + page * PAGE_SIZE, buffer.ctypes.data, PAGE_SIZE) < PAGE_SIZE:
            raise ProtocolError(f"page {page} of block {block.name!r} was here before it came")
        with self._lock:
            self._owed[index].clear_one(page)
            self._requested[index].clear_one(page)
            self._count_down(1, someone_waits=True)
        self._blocktime.end(index, page)

    def zero(self, message: ZeroPages) -> None:
        """What the source owes there is zero.

        Raises:
            ProtocolError: the message names memory that is not there, or is not owed.
        """
        block = self._checked(message)
        owed, requested, waited_for = self._owed[message.block], self._requested[message.block], []
        with self._lock:  # from here on faults are served with zeros
            for first, count in message.runs.tolist():
                owed.clear(first, count)
                waited_for += requested.indices(first, count).tolist()
                requested.clear(first, count)
            self._count_down(message.pages, someone_waits=bool(waited_for))
        for page in waited_for:
            self._faults.zero(block.mapping.address + page * PAGE_SIZE, PAGE_SIZE)
            self._blocktime.end(message.block, page)

    def wait_complete(self, timeout: float) -> bool:
        """Wait until nothing is owed; whether that came."""
        with self._lock:
            return self._arrived.wait_for(lambda: not self._left, timeout)

    def close(self) -> None:
        """End it; who still waits goes on, and finds zeros. Idempotent."""
        registered, self._registered = self._registered, []
        for block in registered:
            block.fetch = None
            self._faults.unregister(block.mapping.address, block.size)
        self._faults.close()
        self.wakeup.close()

    def _checked(self, message: Pages | ZeroPages, numbers: Numbers | None = None) -> RAMBlock:
        block, owed = checked_block(self._blocks, message), self._owed[message.block]
        with self._lock:
            if numbers is not None:
                all_owed = bool(owed.test_each(numbers).all())
            else:
                all_owed = all(owed.count(first, count) == count for first, count in message.runs.tolist())
        if not all_owed:
            raise ProtocolError(f"the source sent pages of block {block.name!r} that it does not owe")
        return block

    def _note(self, index: int, pages: Numbers) -> None:
        """Pages are here, and not owed any more."""
        owed, requested = self._owed[index], self._requested[index]
        with self._lock:
            waited_for = pages[requested.test_each(pages)]
            owed.clear_each(pages)
            if waited_for.size:
                requested.clear_each(waited_for)
            self._count_down(pages.size, someone_waits=bool(waited_for.size))
        for page in waited_for.tolist():
            self._blocktime.end(index, page)

    def _count_down(self, pages: int, *, someone_waits: bool) -> None:
        self._left -= pages
        if someone_waits or not self._left:
            self._arrived.notify_all()

    def _serve(self, address: int, thread: int) -> None:
        index, block = next(
            (index, block)
            for index, block in enumerate(self._blocks)
            if 0 <= address - block.mapping.address < block.size
        )
        page = (address - block.mapping.address) // PAGE_SIZE
        if not self._want(index, page, thread):
            self._zero_hole(index, page)

    def _want(self, index: int, page: int, thread: int = 0) -> bool:
        """Have a page requested if it is owed; whether it is."""
        with self._lock:
            if not self._owed[index].test(page):
                return False
            self._blocktime.begin(index, page, thread)
            if not self._requested[index].test(page):
                self._requested[index].set(page, 1)
                self._wanted.append(Request(index, page))
            return True

    def _fetch(self, index: int, offset: int, size: int) -> None:
        """See `RAMBlock.fetch`."""
        first, end = offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE)
        wanted = [self._want(index, page) for page in range(first, end)]
        if any(wanted):
            self.wakeup.set()
            with self._lock:
                if not self._arrived.wait_for(lambda: not self._owed[index].any(first, end - first), _PATIENCE):
                    raise HostError(
                        f"memory of the guest has not arrived here within {_PATIENCE:.0f} s",
                        remedy="see what became of the source, and of the network to it",
                    )
        while first < end:
            first = self._zero_hole(index, first)

    def _zero_hole(self, index: int, page: int) -> int:
        """Fill the hole around a page that is not owed, up to what is; the end of it."""
        block = self._blocks[index]
        end = min(page + _ZERO_AT_ONCE, block.pages)
        with self._lock:
            owed = self._owed[index].indices(page, end - page)
        end = int(owed[0]) if owed.size else end
        end = max(page + 1, block.mapping.next_data(page * PAGE_SIZE, end * PAGE_SIZE) // PAGE_SIZE)
        self._faults.zero(block.mapping.address + page * PAGE_SIZE, (end - page) * PAGE_SIZE)
        return end

"""A model of KVM's dirty log that notices when a write would be lost.

Each page is in one of three states. In the kernel the last two are one, a bit set in the log; they are kept apart here
because clearing the one is right and clearing the other loses a write.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum

from dirtylog.errors import UsageError
from dirtylog.memory import AddressSpace, Memory, MemoryRegion, MemoryRegionSection, Words
from dirtylog.trackers import KVMLogMode, Tracker, TrackerListener, tracker_listener
from dirtylog.units import PAGE_SIZE, WORD_BITS, word_count


class ContractError(AssertionError):
    """A caller did what the contract of trackers forbids."""


class PageLog(Enum):
    """What the log knows of a page."""

    PROTECTED = "not written since the last clear; the next write will be noticed"
    WRITTEN = "written, and not collected since"
    COLLECTED = "collected, and not cleared since; further writes are not noticed"


class ModelTracker:
    """A `Tracker` of ``pages`` pages whose writer calls `write`.

    Both sides hold ``bus``: on real hardware, too, a store comes wholly before or wholly after a page is protected.
    """

    def __init__(self, mode: KVMLogMode, pages: int, bus: AbstractContextManager[object] | None = None) -> None:
        self._mode = mode
        self._pages = pages
        self._bus: AbstractContextManager[object] = bus or threading.RLock()
        self._log: list[PageLog] | None = None

    @property
    def pages(self) -> int:
        return self._pages

    @property
    def armed(self) -> bool:
        return self._log is not None

    def reports(self, page: int) -> bool:
        """Whether the next collect will name a page."""
        return self._log is not None and self._log[page] is not PageLog.PROTECTED

    def write(self, page: int) -> None:
        """What the hardware does when a page is written."""
        if self._log is not None and self._log[page] is PageLog.PROTECTED:
            self._log[page] = PageLog.WRITTEN

    def arm(self) -> None:
        if self._log is not None:
            raise ContractError("armed twice")
        first = PageLog.WRITTEN if self._mode is KVMLogMode.INITIALLY_SET else PageLog.PROTECTED
        self._log = [first] * self._pages

    def collect(self, words: Words) -> None:
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
                words[page // WORD_BITS] |= 1 << page % WORD_BITS
                log[page] = PageLog.PROTECTED if self._mode.clears_on_collect else PageLog.COLLECTED

    def clear(self, first: int, count: int, words: Words) -> None:
        log = self._armed("clear")
        if self._mode.clears_on_collect:
            raise ContractError("cleared, though collecting clears")
        self._check_window(first, count, words)
        with self._bus:
            self._clear(log, first, count, words)

    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        for index, word in enumerate(words.tolist()):
            for bit in range(WORD_BITS):
                if word >> bit & 1:
                    self._protect(log, first + index * WORD_BITS + bit, first + count)

    def disarm(self) -> None:
        self._armed("disarm")
        self._log = None

    def _protect(self, log: list[PageLog], page: int, end: int) -> None:
        if page >= end:
            raise ContractError(f"a bit for page {page}, past the window's end {end}")
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


class ModelWorld:
    """A memory, an address space on it, a listener that gives each section a `ModelTracker`, and a guest's writes.

    ``ram`` is not mapped yet: that is the test's to do. Guests may write from several threads.

    Attributes:
        holds: how often writers were held.
        before_hold: called right before, for a last write.
    """

    def __init__(self, mode: KVMLogMode, pages: int) -> None:
        self.mode = mode
        self.trackers: dict[int, tuple[MemoryRegionSection, ModelTracker]] = {}
        self.bus = threading.RLock()
        self.holds = 0
        self.before_hold: Callable[[], None] = lambda: None
        self._held = False
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", pages * PAGE_SIZE)
        self.root = self.memory.container("root")
        self.system: AddressSpace = self.memory.address_space("system", self.root)
        self.listener: TrackerListener = tracker_listener(
            self._attach, self._detach, self._hold, clears_on_collect=mode.clears_on_collect
        )
        self.memory.register(self.listener, self.system)

    def write(self, addresses: Sequence[int]) -> None:
        """Add 1 to the byte at each address, one after the other, as a guest does."""
        for address in addresses:
            assert self.try_write(address), f"no guest can write at {address:#x}"

    def try_write(self, address: int) -> bool:
        """Add 1 to the byte at an address, if there is memory that a guest can write."""
        with self.bus:
            for start, (section, tracker) in self.trackers.items():
                if start <= address < start + section.size and not section.readonly:
                    offset = address - start
                    tracker.write(offset // PAGE_SIZE)
                    assert section.region.block is not None
                    section.region.block.array[section.offset_within_region + offset] += 1
                    return True
        return False

    def notices(self, page: int) -> bool:
        """Whether the next sync will report a page of ``ram``."""
        return any(
            section.region is self.ram
            and 0 <= page - section.offset_within_region // PAGE_SIZE < tracker.pages
            and tracker.reports(page - section.offset_within_region // PAGE_SIZE)
            for section, tracker in self.trackers.values()
        )

    def close(self) -> None:
        self.memory.unregister(self.listener)
        assert not self.trackers
        self.memory.close()

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self.before_hold()
        with self.bus:
            assert not self._held
            self._held = True
            self.holds += 1
            yield
            self._held = False

    def _attach(self, section: MemoryRegionSection) -> ModelTracker | None:
        if section.region.block is None or not section.direct:
            return None
        if section.offset_within_region % PAGE_SIZE:
            raise UsageError("in the middle of a page")
        for start, (other, _) in self.trackers.items():
            if start < section.offset_within_address_space + section.size and (
                section.offset_within_address_space < start + other.size
            ):
                raise ContractError("two trackers for one address")
        tracker = ModelTracker(self.mode, section.size // PAGE_SIZE, self.bus)
        self.trackers[section.offset_within_address_space] = section, tracker
        return tracker

    def _detach(self, tracker: Tracker) -> None:
        start, section = next(
            ((start, section) for start, (section, known) in self.trackers.items() if known is tracker), (None, None)
        )
        if start is None or section is None:
            raise UsageError("not one of ours")
        if section.region.logging and not self._held:
            raise ContractError("what is logged goes while guests write it")
        if self.trackers.pop(start)[1].armed:
            raise ContractError("detached while armed")

"""The published model of trackers, in a memory whose guest writes it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from dirtylog import testing
from dirtylog.errors import UsageError
from dirtylog.memory import AddressSpace, Memory, MemoryRegion, MemoryRegionSection, Words
from dirtylog.testing import ContractError
from dirtylog.trackers import KVMLogMode, Tracker, TrackerListener, tracker_listener
from dirtylog.units import PAGE_SIZE

__all__ = ["ContractError", "ModelTracker", "ModelWorld"]


class ModelTracker(testing.ModelTracker):
    """The model in the likeness of one of KVM's logs, and stricter where nobody has a reason to clear."""

    def __init__(self, mode: KVMLogMode, pages: int, bus: AbstractContextManager[object] | None = None) -> None:
        super().__init__(
            pages,
            clears_on_collect=mode.clears_on_collect,
            starts_all_set=mode is KVMLogMode.INITIALLY_SET,
            bus=bus,
        )
        self._mode = mode

    def clear(self, first: int, count: int, words: Words) -> None:
        if self._mode.clears_on_collect:
            raise ContractError("cleared, though collecting clears")
        super().clear(first, count, words)


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
        if section.region.logging and not self._held:
            raise ContractError("what is logged comes while guests write it")
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

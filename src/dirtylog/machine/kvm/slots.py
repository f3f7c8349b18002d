"""KVM memory slots that follow an address space."""

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.memory import MemoryRegionSection
from dirtylog.trackers import KVMLogMode, KVMLogTracker, Tracker, TrackerListener, tracker_listener
from dirtylog.units import PAGE_SIZE


class MemorySlots:
    """Gives each RAM section of an address space a memory slot, whose dirty log is the section's tracker."""

    def __init__(self, vm: VM, mode: KVMLogMode) -> None:
        self._vm = vm
        self._mode = mode
        self._limit = vm.check(Capability.NR_MEMSLOTS)
        self._free: list[int] = []
        self._used = 0

    def listener(self) -> TrackerListener:
        """The listener that makes and deletes the slots and serves their logs."""
        return tracker_listener(self._attach, self._detach, clears_on_collect=self._mode.clears_on_collect)

    def _attach(self, section: MemoryRegionSection) -> KVMLogTracker | None:
        block = section.region.block
        if block is None:
            return None
        gpa, offset, size = section.offset_within_address_space, section.offset_within_region, section.size
        if gpa % PAGE_SIZE or offset % PAGE_SIZE or size % PAGE_SIZE:
            raise UsageError(f"{section.region!r} is not mapped on page boundaries at {gpa:#x}")
        return KVMLogTracker(
            self._vm,
            self._mode,
            slot=self._take(),
            gpa=gpa,
            pages=size // PAGE_SIZE,
            hva=block.mapping.address + offset,
        )

    def _detach(self, tracker: Tracker) -> None:
        if not isinstance(tracker, KVMLogTracker):
            raise UsageError(f"{type(tracker).__name__} is not the log of a memory slot")
        tracker.remove()
        self._free.append(tracker.slot)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used == self._limit:
            raise HostError(f"KVM offers no more than {self._limit} memory slots", remedy="map fewer, larger regions")
        self._used += 1
        return self._used - 1

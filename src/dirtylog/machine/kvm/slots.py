"""KVM memory slots that follow an address space."""

from collections.abc import Sequence
from typing import Final

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.memory import MemoryRegionSection
from dirtylog.trackers import (
    DirtyRings,
    GlobalTrackerListener,
    JoinedTracker,
    KVMLogMode,
    KVMLogTracker,
    KVMRingTracker,
    MemorySlot,
    Tracker,
    TrackerListener,
    tracker_listener,
)
from dirtylog.trackers.listener import Hold
from dirtylog.units import PAGE_SIZE, WORD_BITS

MAX_SLOT_PAGES: Final = (1 << 31) - WORD_BITS
"""KVM takes fewer than 2**31 pages in one slot (KVM_MEM_MAX_NR_PAGES); the last multiple of 64 below."""


SlotTracker = KVMLogTracker | KVMRingTracker


class MemorySlots:
    """Gives each section that can be read directly a memory slot, whose dirty log is the section's tracker.

    A section too large for one slot gets several. Slots of ROM and ROM devices are read-only: the guest's writes come
    out as MMIO exits. Everything else has no slot, so that every access does.

    Args:
        vm: the machine.
        log: how its dirty log behaves, or the rings that it has instead.
        max_pages: the longest slot, whole 64-page words.
    """

    def __init__(self, vm: VM, log: KVMLogMode | DirtyRings, *, max_pages: int = MAX_SLOT_PAGES) -> None:
        self._vm = vm
        self._log = log
        self._max_pages = max_pages
        self._limit = vm.check(Capability.NR_MEMSLOTS)
        self._has_readonly = bool(vm.check(Capability.READONLY_MEM))
        self._free: list[int] = []
        self._used = 0

    def listener(self, hold: Hold) -> TrackerListener:
        """The listener that makes and deletes the slots and serves their logs; ``hold`` keeps vCPUs out of KVM_RUN."""
        if isinstance(self._log, DirtyRings):
            return GlobalTrackerListener(self._attach, self._detach, hold)
        return tracker_listener(self._attach, self._detach, hold, clears_on_collect=self._log.clears_on_collect)

    def _attach(self, section: MemoryRegionSection) -> JoinedTracker[SlotTracker] | None:
        block = section.region.block
        if block is None or not section.direct:
            return None
        gpa, offset = section.offset_within_address_space, section.offset_within_region
        if offset % PAGE_SIZE:
            raise UsageError(
                f"{section.region!r} is shown at {gpa:#x} from {offset:#x}, in the middle of a host page",
                remedy="show it from a multiple of 4096 where it is at a multiple of 4096",
            )
        readonly = section.readonly or section.region.ops is not None
        if readonly and not self._has_readonly:
            raise HostError(f"this KVM has no read-only memory, which {section.region!r} needs")
        parts: list[SlotTracker] = []
        try:
            for start in range(0, section.size, self._max_pages * PAGE_SIZE):
                pages = min(self._max_pages, (section.size - start) // PAGE_SIZE)
                parts.append(self._make(gpa + start, pages, block.mapping.address + offset + start, readonly=readonly))
        except BaseException:
            self._remove(parts)
            raise
        return JoinedTracker(parts)

    def _make(self, gpa: int, pages: int, hva: int, *, readonly: bool) -> SlotTracker:
        number = self._take()
        try:
            slot = MemorySlot(self._vm, number, gpa=gpa, pages=pages, hva=hva, readonly=readonly)
        except BaseException:
            self._free.append(number)
            raise
        if isinstance(self._log, DirtyRings):
            return KVMRingTracker(self._log, slot)
        return KVMLogTracker(self._vm, self._log, slot)

    def _detach(self, tracker: Tracker) -> None:
        if not isinstance(tracker, JoinedTracker):
            raise UsageError(f"{type(tracker).__name__} is not the log of memory slots")
        self._remove(tracker.parts)

    def _remove(self, parts: Sequence[SlotTracker]) -> None:
        for part in parts:
            part.slot.remove()
            self._free.append(part.slot.number)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used == self._limit:
            raise HostError(f"KVM offers no more than {self._limit} memory slots", remedy="map fewer, larger regions")
        self._used += 1
        return self._used - 1

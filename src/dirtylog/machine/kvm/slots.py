"""KVM memory slots that follow an address space."""

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.memory import MemoryRegionSection
from dirtylog.trackers import KVMLogMode, KVMLogTracker, Tracker, TrackerListener, tracker_listener
from dirtylog.trackers.listener import Hold
from dirtylog.units import PAGE_SIZE


class MemorySlots:
    """Gives each section that can be read directly a memory slot, whose dirty log is the section's tracker.

    Slots of ROM and ROM devices are read-only: the guest's writes come out as MMIO exits. Everything else has no slot,
    so that every access does.
    """

    def __init__(self, vm: VM, mode: KVMLogMode) -> None:
        self._vm = vm
        self._mode = mode
        self._limit = vm.check(Capability.NR_MEMSLOTS)
        self._has_readonly = bool(vm.check(Capability.READONLY_MEM))
        self._free: list[int] = []
        self._used = 0

    def listener(self, hold: Hold) -> TrackerListener:
        """The listener that makes and deletes the slots and serves their logs; ``hold`` keeps vCPUs out of KVM_RUN."""
        return tracker_listener(self._attach, self._detach, hold, clears_on_collect=self._mode.clears_on_collect)

    def _attach(self, section: MemoryRegionSection) -> KVMLogTracker | None:
        block = section.region.block
        if block is None or not section.direct:
            return None
        gpa, offset, size = section.offset_within_address_space, section.offset_within_region, section.size
        if offset % PAGE_SIZE:
            raise UsageError(
                f"{section.region!r} is shown at {gpa:#x} from {offset:#x}, in the middle of a host page",
                remedy="show it from a multiple of 4096 where it is at a multiple of 4096",
            )
        readonly = section.readonly or section.region.ops is not None
        if readonly and not self._has_readonly:
            raise HostError(f"this KVM has no read-only memory, which {section.region!r} needs")
        slot = self._take()
        try:
            return KVMLogTracker(
                self._vm,
                self._mode,
                slot=slot,
                gpa=gpa,
                pages=size // PAGE_SIZE,
                hva=block.mapping.address + offset,
                readonly=readonly,
            )
        except BaseException:
            self._free.append(slot)
            raise

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

"""KVM's dirty log of one memory slot, in the three forms that kernels offer.

The kernel's invariant is that every page is either dirty in its log or write-protected. Without manual protection
KVM_GET_DIRTY_LOG reads, cleans and re-protects everything. With it, GET only reads, and KVM_CLEAR_DIRTY_LOG cleans
and re-protects the pages it is given (Linux 5.0, commit 2a31b9db15). Initially all set (Linux 5.7, commit 3c9bd4006b)
starts with every page dirty and none protected: enabling the log costs nothing, and protection comes with the clears.
"""

from enum import Enum
from typing import Final

from dirtylog.errors import HostError
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import Capability, ManualProtect, MemorySlotFlag
from dirtylog.memory import Words
from dirtylog.units import PAGE_SIZE


class KVMLogMode(Enum):
    """How a VM's dirty log behaves; chosen once, before its memory is set."""

    LEGACY = "legacy"
    MANUAL = "manual"
    INITIALLY_SET = "initially-set"

    @property
    def clears_on_collect(self) -> bool:
        """Whether reading the log clears it."""
        return self is KVMLogMode.LEGACY


_FLAGS: Final = {
    KVMLogMode.LEGACY: ManualProtect(0),
    KVMLogMode.MANUAL: ManualProtect.ENABLE,
    KVMLogMode.INITIALLY_SET: ManualProtect.ENABLE | ManualProtect.INITIALLY_SET,
}


def choose_mode(vm: VM, wanted: KVMLogMode | None = None) -> KVMLogMode:
    """Set a new VM's mode: the wanted one, or the best that its kernel offers.

    Raises:
        HostError: the kernel does not offer the wanted one.
    """
    offered = ManualProtect(vm.check(Capability.MANUAL_DIRTY_LOG_PROTECT2))
    modes = [mode for mode in reversed(KVMLogMode) if _FLAGS[mode] in offered]
    mode = wanted or modes[0]
    if mode not in modes:
        raise HostError(
            f"this kernel's KVM has no dirty log of mode {mode.value!r}",
            remedy=f"use {' or '.join(other.value for other in modes)}",
        )
    if _FLAGS[mode]:
        vm.enable(Capability.MANUAL_DIRTY_LOG_PROTECT2, _FLAGS[mode])
    return mode


class KVMLogTracker:
    """The dirty log of one memory slot; also what creates and deletes the slot.

    Args:
        vm: the machine.
        mode: how its log behaves.
        slot: a free slot number.
        gpa: where in guest physical memory.
        pages: how many.
        hva: where the memory is in this process; it must stay mapped until `remove`.
        readonly: whether the guest's writes come out as MMIO exits.
    """

    def __init__(self, vm: VM, mode: KVMLogMode, *, slot: int, gpa: int, pages: int, hva: int, readonly: bool) -> None:
        self._vm = vm
        self._mode = mode
        self._gpa = gpa
        self._hva = hva
        self._size = pages * PAGE_SIZE
        self.slot = slot
        self._pages = pages
        self._fixed = MemorySlotFlag.READONLY if readonly else MemorySlotFlag(0)
        self._set(MemorySlotFlag(0))

    @property
    def pages(self) -> int:
        """The length of the slot."""
        return self._pages

    def arm(self) -> None:
        """Turn the slot's log on."""
        self._set(MemorySlotFlag.LOG_DIRTY_PAGES)

    def collect(self, words: Words) -> None:
        """KVM_GET_DIRTY_LOG."""
        self._vm.get_dirty_log(self.slot, words)

    def clear(self, first: int, count: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG, where reading does not clear."""
        if not self._mode.clears_on_collect:
            self._vm.clear_dirty_log(self.slot, first, count, words)

    def disarm(self) -> None:
        """Turn the slot's log off."""
        self._set(MemorySlotFlag(0))

    def remove(self) -> None:
        """Delete the slot."""
        self._vm.set_memory_region(self.slot, 0, self._gpa, 0, self._hva)

    def _set(self, flags: MemorySlotFlag) -> None:
        self._vm.set_memory_region(self.slot, flags | self._fixed, self._gpa, self._size, self._hva)

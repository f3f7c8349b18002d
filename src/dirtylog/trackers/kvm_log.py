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
from dirtylog.linux.kvm_abi import Capability, ManualProtect
from dirtylog.memory import Words
from dirtylog.trackers.kvm_slot import MemorySlot


class KVMLogMode(Enum):
    """How a VM tells which pages were written; chosen once, before its vCPUs and its memory are made."""

    LEGACY = "legacy"
    MANUAL = "manual"
    INITIALLY_SET = "initially-set"
    RING = "ring"

    @property
    def clears_on_collect(self) -> bool:
        """Whether reading the log clears it."""
        return self in (KVMLogMode.LEGACY, KVMLogMode.RING)


_FLAGS: Final = {
    KVMLogMode.LEGACY: ManualProtect(0),
    KVMLogMode.MANUAL: ManualProtect.ENABLE,
    KVMLogMode.INITIALLY_SET: ManualProtect.ENABLE | ManualProtect.INITIALLY_SET,
}


def choose_mode(vm: VM, wanted: KVMLogMode | None = None) -> KVMLogMode:
    """Set a new VM's mode: the wanted one, or the best log of slots that its kernel offers.

    Rings are not turned on here but by `DirtyRings`, and slots have no manual protection then: what is *initially all
    set* is not protected, and so never gets into a ring.

    Raises:
        HostError: the kernel does not offer the wanted one.
    """
    if wanted is KVMLogMode.RING:
        return wanted
    offered = ManualProtect(vm.check(Capability.MANUAL_DIRTY_LOG_PROTECT2))
    modes = [mode for mode, flags in reversed(_FLAGS.items()) if flags in offered]
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
    """The dirty log of one memory slot.

    Args:
        vm: the machine.
        mode: how its log behaves; not `KVMLogMode.RING`.
        slot: the slot, which goes with the tracker.
    """

    def __init__(self, vm: VM, mode: KVMLogMode, slot: MemorySlot) -> None:
        self._vm = vm
        self._mode = mode
        self.slot = slot

    @property
    def pages(self) -> int:
        """The length of the slot."""
        return self.slot.pages

    def arm(self) -> None:
        """Turn the slot's log on."""
        self.slot.log(True)

    def collect(self, words: Words) -> None:
        """KVM_GET_DIRTY_LOG."""
        self._vm.get_dirty_log(self.slot.number, words)

    def clear(self, first: int, count: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG, where reading does not clear."""
        if not self._mode.clears_on_collect:
            self._vm.clear_dirty_log(self.slot.number, first, count, words)

    def disarm(self) -> None:
        """Turn the slot's log off."""
        self.slot.log(False)

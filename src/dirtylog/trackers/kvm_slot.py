"""A KVM memory slot, whoever tells which of its pages were written."""

from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import MemorySlotFlag
from dirtylog.units import PAGE_SIZE


class MemorySlot:
    """Memory that a guest sees; made here, and deleted by `remove`.

    Args:
        vm: the machine.
        number: a free slot's.
        gpa: where in guest physical memory.
        pages: how many.
        hva: where the memory is in this process; it must stay mapped until `remove`.
        readonly: whether the guest's writes come out as MMIO exits.

    Attributes:
        number: the slot's.
        pages: how many.
    """

    def __init__(self, vm: VM, number: int, *, gpa: int, pages: int, hva: int, readonly: bool) -> None:
        self._vm = vm
        self._gpa = gpa
        self._hva = hva
        self._fixed = MemorySlotFlag.READONLY if readonly else MemorySlotFlag(0)
        self.number = number
        self.pages = pages
        self.log(False)

    def log(self, on: bool) -> None:
        """Have KVM note writes, or no longer."""
        flags = self._fixed | (MemorySlotFlag.LOG_DIRTY_PAGES if on else 0)
        self._vm.set_memory_region(self.number, flags, self._gpa, self.pages * PAGE_SIZE, self._hva)

    def remove(self) -> None:
        """Delete the slot."""
        self._vm.set_memory_region(self.number, 0, self._gpa, 0, self._hva)

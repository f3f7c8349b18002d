"""The registers of a KVM vCPU at a guest's entry."""

from dirtylog.linux.kvm import VCPU
from dirtylog.linux.kvm_abi import Segment
from dirtylog.machine.entry import (
    CODE_SELECTOR,
    CR0_PAGING,
    CR0_PROTECTION,
    CR4_PHYSICAL_ADDRESS_EXTENSION,
    DATA_SELECTOR,
    EFER_LONG_MODE,
    FIRST_HARD_DISK,
    PAGE_TABLES_ADDRESS,
    RFLAGS_RESERVED,
    STACK_TOP,
    BootMode,
    real_mode_address,
)


def start_at(cpu: VCPU, entry: int, mode: BootMode) -> None:
    """Have a vCPU start at an address in a mode."""
    sregs, regs = cpu.get_sregs(), cpu.get_regs()
    if mode is BootMode.REAL:
        sregs.cs.selector, regs.rip = real_mode_address(entry)
        sregs.cs.base = sregs.cs.selector << 4
    else:
        sregs.cr0 |= CR0_PROTECTION
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            _make_flat(segment, selector=DATA_SELECTOR, code=False)
        _make_flat(sregs.cs, selector=CODE_SELECTOR, code=True)
        regs.rip = entry
    if mode is BootMode.LONG:
        sregs.cr0 |= CR0_PAGING
        sregs.cr3 = PAGE_TABLES_ADDRESS
        sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION
        sregs.efer |= EFER_LONG_MODE
        sregs.cs.l, sregs.cs.db = 1, 0
    regs.rflags = RFLAGS_RESERVED
    regs.rdx = FIRST_HARD_DISK
    regs.rsp = STACK_TOP
    cpu.set_sregs(sregs)
    cpu.set_regs(regs)


def _make_flat(segment: Segment, *, selector: int, code: bool) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type = 0xB if code else 0x3  # accessed, and executable and readable, or writable
    segment.present, segment.dpl, segment.db, segment.s, segment.l, segment.g = 1, 0, 1, 1, 0, 1

"""KVM's numbers and structures for x86, from ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``.

Structures whose fields are used are spelled out; those that are only saved and loaded are named with their sizes in
`VCPU_BLOBS` and `VM_BLOBS`. Every size is asserted in the tests, since the request numbers follow from them.
"""

import ctypes
import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from dirtylog.linux.ioctl import Request, io, ior, iow, iowr

KVMIO: Final = 0xAE
API_VERSION: Final = 12


class Capability(IntEnum):
    """Extension numbers for KVM_CHECK_EXTENSION."""

    IRQCHIP = 0
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    COALESCED_MMIO = 15
    IRQFD = 32
    PIT2 = 33
    IOEVENTFD = 36
    TSC_CONTROL = 60
    MAX_VCPUS = 66
    READONLY_MEM = 81
    IMMEDIATE_EXIT = 136
    COALESCED_PIO = 162
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225


class ManualProtect(IntFlag):
    """Arguments of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    ENABLE = 1
    INITIALLY_SET = 2


class MemorySlotFlag(IntFlag):
    """Flags of a user memory region."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2


class ExitReason(IntEnum):
    """Why KVM_RUN returned."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    DIRTY_RING_FULL = 31


class MemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    )


class DirtyLog(ctypes.Structure):
    """struct kvm_dirty_log."""

    _fields_ = (("slot", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("dirty_bitmap", ctypes.c_uint64))


class ClearDirtyLog(ctypes.Structure):
    """struct kvm_clear_dirty_log."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("num_pages", ctypes.c_uint32),
        ("first_page", ctypes.c_uint64),
        ("dirty_bitmap", ctypes.c_uint64),
    )


class DirtyGFNFlag(IntFlag):
    """What has become of an entry of a dirty ring; 0 if it is empty."""

    DIRTY = 1
    RESET = 2


class DirtyGFN(ctypes.Structure):
    """struct kvm_dirty_gfn: the slot's number and, from bit 16 up, its address space's; a page's number in the slot."""

    _fields_ = (("flags", ctypes.c_uint32), ("slot", ctypes.c_uint32), ("offset", ctypes.c_uint64))


class EnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = (
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    )


class IOEventFDFlag(IntFlag):
    """Flags of an ioeventfd."""

    DATAMATCH = 1
    PIO = 2
    DEASSIGN = 4


class IOEventFD(ctypes.Structure):
    """struct kvm_ioeventfd."""

    _fields_ = (
        ("datamatch", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint8 * 36),
    )


class CoalescedZone(ctypes.Structure):
    """struct kvm_coalesced_mmio_zone."""

    _fields_ = (("addr", ctypes.c_uint64), ("size", ctypes.c_uint32), ("pio", ctypes.c_uint32))


class PITConfig(ctypes.Structure):
    """struct kvm_pit_config."""

    _fields_ = (("flags", ctypes.c_uint32), ("pad", ctypes.c_uint32 * 15))


class Regs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in [
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rsp",
            "rbp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
            "rip",
            "rflags",
        ]
    )


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *(
            (name, ctypes.c_uint8)
            for name in ["type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding"]
        ),
    )


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = (("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3))


class Sregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = (
        *((name, Segment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, ctypes.c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    )


class RunIO(ctypes.Structure):
    """The io member of struct kvm_run."""

    _fields_ = (
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    )


class RunMMIO(ctypes.Structure):
    """The mmio member of struct kvm_run."""

    _fields_ = (
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    )


class RunInternal(ctypes.Structure):
    """The internal member of struct kvm_run."""

    _fields_ = (("suberror", ctypes.c_uint32), ("ndata", ctypes.c_uint32), ("data", ctypes.c_uint64 * 16))


class _RunUnion(ctypes.Union):
    _fields_ = (
        ("io", RunIO),
        ("mmio", RunMMIO),
        ("internal", RunInternal),
        ("hardware_entry_failure_reason", ctypes.c_uint64),
        ("system_event_type", ctypes.c_uint32),
    )


class Run(ctypes.Structure):
    """The head of struct kvm_run, which the kernel shares with whoever maps the vCPU."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("exit", _RunUnion),
    )


COALESCED_HEAD: Final = struct.Struct("<II")  # struct kvm_coalesced_mmio_ring: first, last
COALESCED_ENTRY: Final = struct.Struct("<QII8s")  # struct kvm_coalesced_mmio: address, length, pio, data
COALESCED_ENTRIES: Final = (4096 - COALESCED_HEAD.size) // COALESCED_ENTRY.size

DIRTY_RING_PAGE: Final = 64  # KVM_DIRTY_LOG_PAGE_OFFSET: where a vCPU's ring is mapped from

MSR_HEADER_SIZE: Final = 8  # struct kvm_msrs without its entries
MSR_ENTRY_SIZE: Final = 16
CPUID_HEADER_SIZE: Final = 8  # struct kvm_cpuid2 without its entries
CPUID_ENTRY_SIZE: Final = 40
IRQCHIP_SIZE: Final = 520
IRQCHIPS: Final = {"pic-master": 0, "pic-slave": 1, "ioapic": 2}
LEGACY_XSAVE_SIZE: Final = 4096

GET_API_VERSION: Final = io("KVM_GET_API_VERSION", KVMIO, 0x00)
CREATE_VM: Final = io("KVM_CREATE_VM", KVMIO, 0x01)
GET_MSR_INDEX_LIST: Final = iowr("KVM_GET_MSR_INDEX_LIST", KVMIO, 0x02, 4)
CHECK_EXTENSION: Final = io("KVM_CHECK_EXTENSION", KVMIO, 0x03)
GET_VCPU_MMAP_SIZE: Final = io("KVM_GET_VCPU_MMAP_SIZE", KVMIO, 0x04)
GET_SUPPORTED_CPUID: Final = iowr("KVM_GET_SUPPORTED_CPUID", KVMIO, 0x05, CPUID_HEADER_SIZE)

CREATE_VCPU: Final = io("KVM_CREATE_VCPU", KVMIO, 0x41)
GET_DIRTY_LOG: Final = iow("KVM_GET_DIRTY_LOG", KVMIO, 0x42, DirtyLog)
SET_USER_MEMORY_REGION: Final = iow("KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, MemoryRegion)
SET_TSS_ADDR: Final = io("KVM_SET_TSS_ADDR", KVMIO, 0x47)
CREATE_IRQCHIP: Final = io("KVM_CREATE_IRQCHIP", KVMIO, 0x60)
GET_IRQCHIP: Final = iowr("KVM_GET_IRQCHIP", KVMIO, 0x62, IRQCHIP_SIZE)
SET_IRQCHIP: Final = ior("KVM_SET_IRQCHIP", KVMIO, 0x63, IRQCHIP_SIZE)
CREATE_PIT2: Final = iow("KVM_CREATE_PIT2", KVMIO, 0x77, PITConfig)
REGISTER_COALESCED: Final = iow("KVM_REGISTER_COALESCED_MMIO", KVMIO, 0x67, CoalescedZone)
UNREGISTER_COALESCED: Final = iow("KVM_UNREGISTER_COALESCED_MMIO", KVMIO, 0x68, CoalescedZone)
IOEVENTFD: Final = iow("KVM_IOEVENTFD", KVMIO, 0x79, IOEventFD)
ENABLE_CAP: Final = iow("KVM_ENABLE_CAP", KVMIO, 0xA3, EnableCap)
CLEAR_DIRTY_LOG: Final = iowr("KVM_CLEAR_DIRTY_LOG", KVMIO, 0xC0, ClearDirtyLog)
RESET_DIRTY_RINGS: Final = io("KVM_RESET_DIRTY_RINGS", KVMIO, 0xC7)

RUN: Final = io("KVM_RUN", KVMIO, 0x80)
GET_MSRS: Final = iowr("KVM_GET_MSRS", KVMIO, 0x88, MSR_HEADER_SIZE)
SET_MSRS: Final = iow("KVM_SET_MSRS", KVMIO, 0x89, MSR_HEADER_SIZE)
SET_SIGNAL_MASK: Final = iow("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, 4)
SET_CPUID2: Final = iow("KVM_SET_CPUID2", KVMIO, 0x90, CPUID_HEADER_SIZE)
SET_TSC_KHZ: Final = io("KVM_SET_TSC_KHZ", KVMIO, 0xA2)
GET_TSC_KHZ: Final = io("KVM_GET_TSC_KHZ", KVMIO, 0xA3)
GET_XSAVE2: Final = ior("KVM_GET_XSAVE2", KVMIO, 0xCF, LEGACY_XSAVE_SIZE)


class Blob(NamedTuple):
    """A piece of state that is saved and loaded whole: its size and the requests that do so."""

    size: int
    get: Request
    set: Request


def _blob(name: str, size: int, get: int, set_: int) -> Blob:
    return Blob(size, ior(f"KVM_GET_{name}", KVMIO, get, size), iow(f"KVM_SET_{name}", KVMIO, set_, size))


VCPU_BLOBS: Final = {
    "regs": _blob("REGS", ctypes.sizeof(Regs), 0x81, 0x82),
    "sregs": _blob("SREGS", ctypes.sizeof(Sregs), 0x83, 0x84),
    "fpu": _blob("FPU", 416, 0x8C, 0x8D),
    "lapic": _blob("LAPIC", 1024, 0x8E, 0x8F),
    "mp_state": _blob("MP_STATE", 4, 0x98, 0x99),
    "vcpu_events": _blob("VCPU_EVENTS", 64, 0x9F, 0xA0),
    "debugregs": _blob("DEBUGREGS", 128, 0xA1, 0xA2),
    "xsave": _blob("XSAVE", LEGACY_XSAVE_SIZE, 0xA4, 0xA5),
    "xcrs": _blob("XCRS", 392, 0xA6, 0xA7),
}
VM_BLOBS: Final = {
    "clock": _blob("CLOCK", 48, 0x7C, 0x7B),
    "pit": _blob("PIT2", 112, 0x9F, 0xA0),
}

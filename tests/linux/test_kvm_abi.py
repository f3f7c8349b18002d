"""The numbers stand here as literals; where there is a C compiler, the kernel's own headers have to agree."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.require import require

from dirtylog.linux import kvm_abi as abi
from dirtylog.linux.ioctl import Request

REQUESTS = {
    "KVM_GET_API_VERSION": 0x0000AE00,
    "KVM_CREATE_VM": 0x0000AE01,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0x0000AE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0x0000AE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0x0000AE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0x0000AE47,
    "KVM_CREATE_IRQCHIP": 0x0000AE60,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_RUN": 0x0000AE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_SET_TSC_KHZ": 0x0000AEA2,
    "KVM_GET_TSC_KHZ": 0x0000AEA3,
    "KVM_REGISTER_COALESCED_MMIO": 0x4010AE67,
    "KVM_UNREGISTER_COALESCED_MMIO": 0x4010AE68,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_RESET_DIRTY_RINGS": 0x0000AEC7,
    "KVM_GET_XSAVE2": 0x9000AECF,
}

STRUCTURES: dict[str, tuple[type[ctypes.Structure], int]] = {
    "struct kvm_userspace_memory_region": (abi.MemoryRegion, 32),
    "struct kvm_dirty_log": (abi.DirtyLog, 16),
    "struct kvm_clear_dirty_log": (abi.ClearDirtyLog, 24),
    "struct kvm_dirty_gfn": (abi.DirtyGFN, 16),
    "struct kvm_enable_cap": (abi.EnableCap, 104),
    "struct kvm_ioeventfd": (abi.IOEventFD, 64),
    "struct kvm_coalesced_mmio_zone": (abi.CoalescedZone, 16),
    "struct kvm_pit_config": (abi.PITConfig, 64),
    "struct kvm_regs": (abi.Regs, 144),
    "struct kvm_segment": (abi.Segment, 24),
    "struct kvm_dtable": (abi.DescriptorTable, 16),
    "struct kvm_sregs": (abi.Sregs, 312),
}

SIZES = {
    "sizeof(struct kvm_msrs)": (abi.MSR_HEADER_SIZE, 8),
    "sizeof(struct kvm_msr_entry)": (abi.MSR_ENTRY_SIZE, 16),
    "sizeof(struct kvm_cpuid2)": (abi.CPUID_HEADER_SIZE, 8),
    "sizeof(struct kvm_cpuid_entry2)": (abi.CPUID_ENTRY_SIZE, 40),
    "sizeof(struct kvm_irqchip)": (abi.IRQCHIP_SIZE, 520),
    "sizeof(struct kvm_xsave)": (abi.LEGACY_XSAVE_SIZE, 4096),
    "sizeof(struct kvm_fpu)": (abi.VCPU_BLOBS["fpu"].size, 416),
    "sizeof(struct kvm_lapic_state)": (abi.VCPU_BLOBS["lapic"].size, 1024),
    "sizeof(struct kvm_mp_state)": (abi.VCPU_BLOBS["mp_state"].size, 4),
    "sizeof(struct kvm_vcpu_events)": (abi.VCPU_BLOBS["vcpu_events"].size, 64),
    "sizeof(struct kvm_debugregs)": (abi.VCPU_BLOBS["debugregs"].size, 128),
    "sizeof(struct kvm_xcrs)": (abi.VCPU_BLOBS["xcrs"].size, 392),
    "sizeof(struct kvm_clock_data)": (abi.VM_BLOBS["clock"].size, 48),
    "sizeof(struct kvm_pit_state2)": (abi.VM_BLOBS["pit"].size, 112),
    "offsetof(struct kvm_clock_data, flags)": (8, 8),
}

RUN_OFFSETS = {
    "immediate_exit": (abi.Run.immediate_exit.offset, 1),
    "exit_reason": (abi.Run.exit_reason.offset, 8),
    "cr8": (abi.Run.cr8.offset, 16),
    "apic_base": (abi.Run.apic_base.offset, 24),
    "io.direction": (abi.Run.io.offset + abi.RunIO.direction.offset, 32),
    "io.size": (abi.Run.io.offset + abi.RunIO.size.offset, 33),
    "io.port": (abi.Run.io.offset + abi.RunIO.port.offset, 34),
    "io.count": (abi.Run.io.offset + abi.RunIO.count.offset, 36),
    "io.data_offset": (abi.Run.io.offset + abi.RunIO.data_offset.offset, 40),
    "mmio.phys_addr": (abi.Run.mmio.offset + abi.RunMMIO.phys_addr.offset, 32),
    "mmio.data": (abi.Run.mmio.offset + abi.RunMMIO.data.offset, 40),
    "mmio.len": (abi.Run.mmio.offset + abi.RunMMIO.len.offset, 48),
    "mmio.is_write": (abi.Run.mmio.offset + abi.RunMMIO.is_write.offset, 52),
    "internal.suberror": (abi.Run.internal.offset + abi.RunInternal.suberror.offset, 32),
    "internal.ndata": (abi.Run.internal.offset + abi.RunInternal.ndata.offset, 36),
    "internal.data": (abi.Run.internal.offset + abi.RunInternal.data.offset, 40),
    "fail_entry.hardware_entry_failure_reason": (abi.Run.hardware_entry_failure_reason.offset, 32),
    "system_event.type": (abi.Run.system_event_type.offset, 32),
}


def all_requests() -> Iterator[Request]:
    yield from (value for value in vars(abi).values() if isinstance(value, Request))
    for blob in (*abi.VCPU_BLOBS.values(), *abi.VM_BLOBS.values()):
        yield from (blob.get, blob.set)


def test_request_numbers() -> None:
    assert {request.name: request.code for request in all_requests()} == REQUESTS


@pytest.mark.parametrize("name", STRUCTURES)
def test_size_of_structure(name: str) -> None:
    structure, size = STRUCTURES[name]
    assert ctypes.sizeof(structure) == size


@pytest.mark.parametrize("what", SIZES)
def test_size_of_state(what: str) -> None:
    ours, literal = SIZES[what]
    assert ours == literal


@pytest.mark.parametrize("field", RUN_OFFSETS)
def test_offset_in_the_run_structure(field: str) -> None:
    ours, literal = RUN_OFFSETS[field]
    assert ours == literal


def constants() -> dict[str, int]:
    """Every plain number that the module takes from the headers, by its name there."""
    found: dict[str, int] = {f"KVM_CAP_{capability.name}": capability for capability in abi.Capability}
    found |= {f"KVM_EXIT_{reason.name}": reason for reason in abi.ExitReason}
    found |= {
        "KVM_API_VERSION": abi.API_VERSION,
        "KVMIO": abi.KVMIO,
        "KVM_MEM_LOG_DIRTY_PAGES": abi.MemorySlotFlag.LOG_DIRTY_PAGES,
        "KVM_MEM_READONLY": abi.MemorySlotFlag.READONLY,
        "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE": abi.ManualProtect.ENABLE,
        "KVM_DIRTY_LOG_INITIALLY_SET": abi.ManualProtect.INITIALLY_SET,
        "KVM_DIRTY_GFN_F_DIRTY": abi.DirtyGFNFlag.DIRTY,
        "KVM_DIRTY_GFN_F_RESET": abi.DirtyGFNFlag.RESET,
        "KVM_DIRTY_LOG_PAGE_OFFSET": abi.DIRTY_RING_PAGE,
        "KVM_IRQCHIP_PIC_MASTER": abi.IRQCHIPS["pic-master"],
        "KVM_IRQCHIP_PIC_SLAVE": abi.IRQCHIPS["pic-slave"],
        "KVM_IRQCHIP_IOAPIC": abi.IRQCHIPS["ioapic"],
    }
    return found


def expectations() -> dict[str, int]:
    """C expressions, and the values that the module gives them."""
    expected = REQUESTS | constants() | {what: ours for what, (ours, _) in SIZES.items()}
    for name, (structure, _) in STRUCTURES.items():
        expected[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field in (field for field, *_ in structure._fields_ if not field.startswith("pad")):
            expected[f"offsetof({name}, {field})"] = getattr(structure, field).offset
    return expected | {f"offsetof(struct kvm_run, {field})": ours for field, (ours, _) in RUN_OFFSETS.items()}


def test_kernel_headers_agree(tmp_path: Path) -> None:
    compiler = next((tool for tool in ("cc", "gcc", "clang") if shutil.which(tool)), None)
    require("cc", compiler, "comparing with the kernel's headers needs a C compiler")
    require("cc", platform.machine() == "x86_64", "the headers here are another architecture's")
    assert compiler is not None
    # Constants that are newer than the headers are skipped by name: all of them are macros.
    lines = [
        f'#ifdef {what}\nprintf("%s\\t%lu\\n", "{what}", (unsigned long)({what}));\n#endif'
        if what.startswith("KVM")
        else f'printf("%s\\t%lu\\n", "{what}", (unsigned long)({what}));'
        for what in expectations()
    ]
    source, program = tmp_path / "abi.c", tmp_path / "abi"
    includes = "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
    probe = subprocess.run(
        [compiler, "-E", "-x", "c", "-"], input=includes, text=True, capture_output=True, check=False
    )
    require("cc", probe.returncode == 0, "comparing with the kernel's headers needs <linux/kvm.h> (linux-libc-dev)")
    source.write_text(f"{includes}int main(void) {{\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run([compiler, "-o", str(program), str(source)], check=True, capture_output=True)

    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout

    theirs = {what: int(value) for what, _, value in (line.partition("\t") for line in printed.splitlines())}
    assert {what: value for what, value in expectations().items() if what in theirs} == theirs
    assert len(theirs) > 150

import errno
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from support.kvm import enter_protected_mode, open_descriptors
from support.oracles import to_bits, to_words
from support.waiting import BOUND

from dirtylog.errors import ClosedError, HostError, KernelError, UsageError
from dirtylog.linux import kvm_abi as abi
from dirtylog.linux.kvm import KICK_SIGNAL, KVM, VCPU, VM, Words
from dirtylog.linux.kvm_abi import Capability, ExitReason, ManualProtect, MemorySlotFlag
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.units import PAGE_SIZE, word_count

PAGES = 100
CODE = 0x4000
CLOCKS = {0x10, 0x4000_0010, 0x4000_0020}
"""MSRs that go on by themselves: the time-stamp counter, and Hyper-V's run time and reference time."""


@pytest.fixture
def vm(kvm: KVM) -> Iterator[VM]:
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def ram() -> Iterator[MemfdMapping]:
    ram = MemfdMapping("guest", PAGES * PAGE_SIZE)
    yield ram
    ram.close()


@pytest.fixture
def vcpu(vm: VM, ram: MemfdMapping) -> Iterator[VCPU]:
    """In protected mode at `CODE`, with the RAM at address 0 and its log on, without interrupt controllers."""
    vm.set_memory_region(0, MemorySlotFlag.LOG_DIRTY_PAGES, 0, ram.size, ram.address)
    with vm.create_vcpu(0) as vcpu:
        enter_protected_mode(vcpu)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = CODE, 2
        vcpu.set_regs(regs)
        yield vcpu


def put(ram: MemfdMapping, code: str) -> None:
    ram.array[CODE : CODE + len(bytes.fromhex(code))] = np.frombuffer(bytes.fromhex(code), np.uint8)


@pytest.mark.parametrize(
    ("path", "message"),
    [("/nonexistent/kvm", "there is no /nonexistent/kvm"), ("/", "/ cannot be opened: Is a directory")],
)
def test_device_that_cannot_be_opened_is_named(path: str, message: str) -> None:
    before = open_descriptors()
    with pytest.raises(HostError, match=message):
        KVM(path)
    assert open_descriptors() == before


def test_missing_permission_comes_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="no permission to open /dev/kvm") as caught:
        KVM()
    assert caught.value.remedy is not None
    assert "usermod -aG kvm" in caught.value.remedy


@pytest.mark.parametrize("kind", ["device", "file"])
def test_something_else_than_kvm_is_refused_without_a_leak(kind: str, tmp_path: Path) -> None:
    path = os.devnull if kind == "device" else str(tmp_path / "file")
    Path(path).touch()
    before = open_descriptors()
    with pytest.raises(HostError, match="is not a KVM device"):
        KVM(path)
    assert open_descriptors() == before


def test_other_api_version_is_refused_without_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.linux.kvm.ioctl", lambda fd, request, argument: 11)
    before = open_descriptors()
    with pytest.raises(HostError, match="speaks KVM API version 11, not 12"):
        KVM(os.devnull)
    assert open_descriptors() == before


def test_closed_handle_is_a_usage_error_that_names_the_call(kvm: KVM) -> None:
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for handle in (vcpu, vm):
        handle.close()
        handle.close()
    with pytest.raises(ClosedError, match="KVM_RUN on a closed VCPU"):
        vcpu.run()
    with pytest.raises(ClosedError, match="vCPU was closed"):
        vcpu.request_exit(True)
    with pytest.raises(ClosedError, match="vCPU was closed"):
        vcpu.io_data()
    with pytest.raises(ClosedError, match="KVM_CREATE_VCPU on a closed VM"):
        vm.create_vcpu(1)


def test_closed_handles_give_every_descriptor_back(kvm: KVM) -> None:
    before = open_descriptors()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    vm.close()
    assert open_descriptors() == before


def test_lists_of_the_host_are_whole(kvm: KVM) -> None:
    cpuid, msrs = kvm.supported_cpuid(), kvm.msr_indices()

    assert len(cpuid) % abi.CPUID_ENTRY_SIZE == 0
    assert 0x10 in msrs  # the time-stamp counter
    assert len(set(msrs)) == len(msrs) > 10
    assert kvm.check(Capability.NR_MEMSLOTS) >= 32


def test_slot_without_a_log_reads_as_clean(vm: VM, ram: MemfdMapping) -> None:  # W3
    vm.set_memory_region(0, 0, 0, ram.size, ram.address)
    words = to_words(range(128), 128)
    vm.get_dirty_log(0, words)
    assert to_bits(words) == set()


def test_clear_of_a_slot_without_a_log_is_no_error(vm: VM, ram: MemfdMapping) -> None:  # W3
    vm.enable(Capability.MANUAL_DIRTY_LOG_PROTECT2, ManualProtect.ENABLE)
    vm.set_memory_region(0, 0, 0, ram.size, ram.address)
    vm.clear_dirty_log(0, 0, PAGES, to_words((), PAGES))


def test_log_shows_the_written_pages_as_bits_of_little_endian_words(vm: VM, vcpu: VCPU, ram: MemfdMapping) -> None:
    # W1
    put(ram, "c60500300600 01 f4")  # movb $1, 0x63000; hlt
    assert vcpu.run() == ExitReason.HLT

    words = np.zeros(word_count(PAGES), np.uint64)
    vm.get_dirty_log(0, words)

    assert ram.array[0x63000] == 1
    # On nested paging a page that is new to the vCPU is mapped writable at once, and reported: here that of the code.
    assert int(words[0]) in (0, 1 << (CODE // PAGE_SIZE))
    assert int(words[1]) == 1 << (0x63 - 64)


@pytest.mark.parametrize(
    ("first", "count", "taken"),
    [(0, 64, True), (64, 36, True), (0, 100, True), (1, 64, False), (0, 63, False), (64, 35, False), (64, 64, False)],
)
def test_kernel_takes_clears_of_whole_words_or_to_the_slots_end(
    vm: VM, ram: MemfdMapping, first: int, count: int, taken: bool
) -> None:  # W2
    vm.enable(Capability.MANUAL_DIRTY_LOG_PROTECT2, ManualProtect.ENABLE)
    vm.set_memory_region(0, MemorySlotFlag.LOG_DIRTY_PAGES, 0, ram.size, ram.address)
    words = to_words((), 128)
    if taken:
        vm.clear_dirty_log(0, first, count, words)
    else:
        with pytest.raises(KernelError) as caught:
            vm.clear_dirty_log(0, first, count, words)
        assert (caught.value.call, caught.value.errno) == ("KVM_CLEAR_DIRTY_LOG", errno.EINVAL)


def test_log_of_a_slot_that_cannot_be_is_an_error(vm: VM) -> None:
    with pytest.raises(KernelError, match="KVM_GET_DIRTY_LOG failed"):
        vm.get_dirty_log(1 << 15, np.zeros(1, np.uint64))
    with pytest.raises(KernelError, match="KVM_CLEAR_DIRTY_LOG failed"):
        vm.clear_dirty_log(1 << 15, 0, 64, np.zeros(1, np.uint64))


@pytest.mark.parametrize("words", [np.zeros(4, np.uint64)[::2], np.zeros(2, np.int64)], ids=["strided", "signed"])
def test_words_that_the_kernel_cannot_fill_are_refused(vm: VM, words: npt.NDArray[np.generic]) -> None:
    with pytest.raises(UsageError, match="contiguous 64-bit words"):
        vm.get_dirty_log(0, cast("Words", words))


def test_misaligned_slot_is_refused_by_the_kernel(vm: VM, ram: MemfdMapping) -> None:
    with pytest.raises(KernelError, match="KVM_SET_USER_MEMORY_REGION failed: Invalid argument"):
        vm.set_memory_region(0, 0, 1, ram.size, ram.address)


def test_port_exits_carry_their_bytes_both_ways(vcpu: VCPU, ram: MemfdMapping) -> None:
    put(ram, "66b83412 66e712 66e514 f4")  # mov $0x1234, %ax; out %ax, $0x12; in $0x14, %ax; hlt

    assert vcpu.run() == ExitReason.IO
    io = vcpu.exit.io
    assert (io.direction, io.size, io.port, io.count, bytes(vcpu.io_data())) == (1, 2, 0x12, 1, b"\x34\x12")
    assert vcpu.run() == ExitReason.IO
    io = vcpu.exit.io
    assert (io.direction, io.size, io.port, io.count) == (0, 2, 0x14, 1)
    vcpu.io_data()[:] = b"\xcd\xab"
    assert vcpu.run() == ExitReason.HLT
    assert vcpu.get_regs().rax & 0xFFFF == 0xABCD


def test_requested_exit_completes_the_last_one_and_runs_nothing_more(vcpu: VCPU, ram: MemfdMapping) -> None:
    put(ram, "e414 ebfe")  # in $0x14, %al; jmp .
    assert vcpu.run() == ExitReason.IO
    vcpu.io_data()[:] = b"\x5a"
    vcpu.request_exit(True)

    assert vcpu.run() == ExitReason.INTR

    regs = vcpu.get_regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x5A, CODE + 2)


def test_kick_reaches_a_running_guest_though_its_signal_is_blocked(vcpu: VCPU, ram: MemfdMapping) -> None:
    put(ram, "e612 ebfe")  # out %al, $0x12; jmp .
    reasons: list[int] = []
    spinning = threading.Event()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
        vcpu.let_kick_through()
        reasons.append(vcpu.run())
        spinning.set()
        reasons.append(vcpu.run())
        signal.sigtimedwait((KICK_SIGNAL,), 0)

    thread = threading.Thread(target=run)
    thread.start()
    assert spinning.wait(BOUND)
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, KICK_SIGNAL)
    thread.join(BOUND)

    assert reasons == [ExitReason.IO, ExitReason.INTR]


def test_saved_vcpu_is_the_same_after_loading(kvm: KVM, vm: VM) -> None:
    indices = tuple(index for index in kvm.msr_indices() if index not in CLOCKS)
    vm.create_irqchip()
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        enter_protected_mode(vcpu)
        regs = vcpu.get_regs()
        regs.rbx = 0x1122_3344_5566_7788
        vcpu.set_regs(regs)
        state = vcpu.save_state(indices)
    assert state.keys() == abi.VCPU_BLOBS.keys() | {"msrs", "tsc_khz"}

    with kvm.create_vm() as other_vm:
        other_vm.create_irqchip()
        with other_vm.create_vcpu(0) as other:
            other.set_cpuid(kvm.supported_cpuid())
            other.load_state(state)
            loaded = other.save_state(indices)

    assert loaded == state


def test_saved_vm_is_the_same_after_loading(kvm: KVM, vm: VM) -> None:
    vm.create_irqchip()
    state = vm.save_state()
    assert state.keys() == {"clock", "pit", "pic-master", "pic-slave", "ioapic"}
    with kvm.create_vm() as other:
        other.create_irqchip()
        other.load_state(state)
        loaded = other.save_state()
    for chip in abi.IRQCHIPS:
        assert loaded[chip] == state[chip]


def test_state_of_other_parts_or_sizes_is_refused(kvm: KVM, vm: VM) -> None:
    vm.create_irqchip()
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        state, parts = vcpu.save_state(()), vm.save_state()
        for odd, message in [
            ({name: value for name, value in state.items() if name != "fpu"}, "the parts this version has: fpu"),
            (state | {"more": b""}, "the parts this version has: more"),
            (state | {"regs": bytes(143)}, "regs has 143 bytes instead of 144"),
            (state | {"tsc_khz": b""}, "tsc_khz has 0 bytes instead of 4"),
            (state | {"msrs": bytes(17)}, "17 bytes are not a table of MSRs"),
        ]:
            with pytest.raises(UsageError, match=message):
                vcpu.load_state(odd)
    for odd, message in [
        (parts | {"clock": b""}, "clock has 0 bytes instead of 48"),
        (parts | {"pic-slave": parts["pic-master"]}, "pic-slave is another chip's"),
        ({}, "does not have the parts"),
    ]:
        with pytest.raises(UsageError, match=message):
            vm.load_state(odd)


def test_msr_that_cannot_be_set_must_have_its_value_already(kvm: KVM, vcpu: VCPU) -> None:
    vcpu.set_cpuid(kvm.supported_cpuid())
    efer = vcpu.get_msrs((0xC0000080,))
    assert len(efer) == abi.MSR_ENTRY_SIZE
    assert vcpu.get_msrs((0x12345678, 0xC0000080)) == efer
    vcpu.set_msrs(efer)
    with pytest.raises(HostError, match="cannot set MSR 0x12345678 to 0x7") as caught:
        vcpu.set_msrs(efer + struct.pack("<IIQ", 0x12345678, 0, 7))
    assert caught.value.remedy is not None


@pytest.mark.parametrize("size", [1, abi.CPUID_ENTRY_SIZE + 1, abi.CPUID_ENTRY_SIZE * 257])
def test_cpuid_table_that_is_none_is_refused(vcpu: VCPU, size: int) -> None:
    with pytest.raises(UsageError, match="not a table of CPUID entries"):
        vcpu.set_cpuid(bytes(size))

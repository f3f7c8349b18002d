import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.kvm import make_flat, open_descriptors
from support.running import CODE, FIRST, LAST, MakeRunning, Running
from support.waiting import BOUND

from dirtylog.errors import ClosedError, DirtylogError, GuestError, HostError, KernelError, UsageError
from dirtylog.linux.kvm import KVM, VCPU
from dirtylog.linux.kvm_abi import Capability, ExitReason
from dirtylog.machine import BootMode, KVMMachine, MachineState, RunState, boot_flat
from dirtylog.machine.devices.port92 import Port92
from dirtylog.machine.kvm.vcpu import VCPUThread
from dirtylog.machine.pc import LOW_RAM_LIMIT, RAM_NAME, pc_memory
from dirtylog.memory import Client, PageBitmap, TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import GIB, MIB, PAGE_SIZE


def test_paused_guest_writes_nothing_and_resumes_where_it_stood(run: MakeRunning) -> None:
    guest = run().boot_dirtier()
    states = [guest.machine.state]
    rounds = [-1]
    for _ in range(10):
        guest.machine.resume()
        states.append(guest.machine.state)
        guest.wait_for_rounds()

        guest.machine.pause()

        states.append(guest.machine.state)
        before = guest.contents()
        assert guest.violation() is None
        assert guest.rounds > rounds[-1]
        rounds.append(guest.rounds)
        assert guest.contents() == before
    assert states == [RunState.PRELAUNCH] + [RunState.RUNNING, RunState.PAUSED] * 10


def test_guest_that_halted_for_ever_can_be_paused_and_closed(run: MakeRunning) -> None:
    guest = run().start("baf8030000 b021 ee fa f4")  # mov $0x3f8, %edx; mov $'!', %al; out %al, %dx; cli; hlt
    guest.output.wait_for(1)
    guest.machine.pause()
    assert guest.machine.state is RunState.PAUSED
    guest.machine.resume()
    guest.machine.pause()


def copy_machine(source: Running, target: Running) -> None:
    target.machine.memory.blocks[RAM_NAME].array[:] = source.machine.memory.blocks[RAM_NAME].array
    target.machine.load_state(source.machine.save_state())


def test_saved_machine_goes_on_in_another(run: MakeRunning) -> None:
    source, target = run().boot_dirtier(), run()
    source.machine.resume()
    source.wait_for_rounds(3)
    source.machine.pause()
    left, rounds = source.contents(), source.rounds

    copy_machine(source, target)
    assert target.violation() is None
    target.machine.resume()
    target.wait_for_rounds(3)
    target.machine.pause()

    assert target.violation() is None
    assert target.rounds >= rounds + 2
    assert set(target.output.data) == {ord("B")}
    assert source.contents() == left


def test_loaded_state_is_the_saved_one(run: MakeRunning) -> None:
    source, target = run().boot_dirtier(), run()
    source.machine.resume()
    source.wait_for_rounds()
    source.machine.pause()

    copy_machine(source, target)

    saved, loaded = source.machine.save_state(), target.machine.save_state()
    assert saved.keys() == loaded.keys() == {"cpu0", "kvm", "serial0", "port92"}
    differ = {(part, name) for part in saved for name in saved[part] if saved[part][name] != loaded[part][name]}
    # The time-stamp counter and the clocks go on by themselves.
    assert differ <= {("cpu0", "msrs"), ("kvm", "clock"), ("kvm", "pit")}


def test_two_machines_in_one_process_do_not_meet(run: MakeRunning) -> None:
    one, two = run().boot_dirtier(), run().boot_dirtier()
    one.machine.resume()
    two.machine.resume()
    one.wait_for_rounds()
    two.wait_for_rounds()

    one.machine.pause()
    still = one.contents()
    two.wait_for_rounds(5)

    assert two.machine.state is RunState.RUNNING
    assert one.contents() == still
    one.close()
    two.wait_for_rounds()


def without(state: MachineState, part: str) -> MachineState:
    return {name: value for name, value in state.items() if name != part}


def test_state_of_another_machine_is_refused(run: MakeRunning) -> None:
    machine = run().machine
    two = run(cpus=2).machine
    state = machine.save_state()
    refused: list[tuple[MachineState, str]] = [
        ({}, "only one side has cpu0, kvm, port92, serial0"),
        (without(state, "serial0"), "only one side has serial0"),
        (state | {"serial1": {}}, "only one side has serial1"),
        (two.save_state(), "only one side has cpu1"),
        (state | {"serial0": {}}, "not the state of serial0"),
        (state | {"port92": {"value": b""}}, "not the state of port 0x92"),
        (state | {"kvm": {}}, "VM state does not have the parts"),
        (state | {"cpu0": {}}, "vCPU state does not have the parts"),
        (state | {"cpu0": state["cpu0"] | {"regs": b""}}, "regs has 0 bytes instead of 144"),
    ]
    for odd, message in refused:
        with pytest.raises(UsageError, match=message):
            machine.load_state(odd)
    with pytest.raises(UsageError, match="of another machine") as caught:
        two.load_state(state)
    assert caught.value.remedy == "start both sides with equal options"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("0f0b", "shut down by a triple fault"),  # ud2, without an interrupt table
        ("b001 e692 f4", "reset itself through port 0x92"),  # mov $1, %al; out %al, $0x92
    ],
)
def test_guest_that_ends_itself_leaves_the_reason(run: MakeRunning, code: str, message: str) -> None:
    guest = run().start(code)
    assert guest.ended.wait(BOUND)

    assert guest.machine.state is RunState.SHUTDOWN
    assert isinstance(guest.machine.failure, GuestError)
    assert message in str(guest.machine.failure)
    assert guest.machine.failure.remedy is not None
    guest.machine.pause()
    assert guest.machine.state is RunState.SHUTDOWN
    with pytest.raises(UsageError, match="has ended"):
        guest.machine.resume()


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ExitReason.INTERNAL_ERROR, "KVM cannot go on (exit INTERNAL_ERROR, suberror 0, data none) at rip 0x10000"),
        (ExitReason.FAIL_ENTRY, "KVM cannot go on (exit FAIL_ENTRY, hardware reason 0x0) at rip 0x10000"),
        (ExitReason.HYPERCALL, "KVM cannot go on (exit HYPERCALL) at rip 0x10000"),
        (99, "KVM cannot go on (exit 99) at rip 0x10000"),
    ],
)
def test_exit_that_nobody_serves_ends_the_guest_with_the_facts(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch, reason: int, message: str
) -> None:
    monkeypatch.setattr(VCPU, "run", lambda vcpu: reason)
    guest = run().start("ebfe")
    assert guest.ended.wait(BOUND)

    assert guest.machine.state is RunState.SHUTDOWN
    assert isinstance(guest.machine.failure, GuestError)
    assert guest.machine.failure.cause == message


def test_refusal_of_the_kernel_is_an_internal_error(run: MakeRunning, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(vcpu: VCPU) -> int:
        raise KernelError("KVM_RUN", 14, "Bad address")

    monkeypatch.setattr(VCPU, "run", refuse)
    guest = run().start("ebfe")
    assert guest.ended.wait(BOUND)

    assert guest.machine.state is RunState.INTERNAL_ERROR
    assert str(guest.machine.failure) == "KVM_RUN failed: Bad address"


def test_guest_that_ends_itself_while_it_is_being_paused_is_not_called_paused(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_port, being_paused = threading.Event(), threading.Event()
    write, wait_parked = Port92.write, VCPUThread.wait_parked

    def slow_write(device: Port92, offset: int, size: int, value: int) -> None:
        at_the_port.set()
        assert being_paused.wait(BOUND)
        write(device, offset, size, value)

    def watched_wait(thread: VCPUThread) -> None:
        being_paused.set()
        wait_parked(thread)

    monkeypatch.setattr(Port92, "write", slow_write)
    monkeypatch.setattr(VCPUThread, "wait_parked", watched_wait)
    guest = run().start("b001 e692 f4")
    assert at_the_port.wait(BOUND)

    with pytest.raises(GuestError, match="reset itself"):
        guest.machine.pause()
    assert guest.machine.state is RunState.SHUTDOWN


def test_nobodys_memory_reads_as_ones_and_swallows_writes(run: MakeRunning) -> None:
    guest = run().start(
        "c705 000000d0 78563412"  # movl $0x12345678, 0xd0000000
        "a1 000000d0"  # mov 0xd0000000, %eax
        "a3 00000200"  # mov %eax, 0x20000
        "baf8030000 b021 ee ebfe"  # mov $0x3f8, %edx; mov $'!', %al; out %al, %dx; jmp .
    )
    guest.output.wait_for(1)
    guest.machine.pause()
    assert guest.machine.system.read(0x20000, 8) == b"\xff\xff\xff\xff\0\0\0\0"


def test_unknown_ports_read_as_ones(run: MakeRunning) -> None:
    guest = run().start("e5 80 a3 00000200 baf8030000 b021 ee ebfe")  # in $0x80, %eax; mov %eax, 0x20000; as above
    guest.output.wait_for(1)
    guest.machine.pause()
    assert guest.machine.system.read(0x20000, 5) == b"\xff\xff\xff\xff\0"


def enter_long_mode(machine: KVMMachine, high: int) -> None:
    """64-bit mode with 2 MiB pages: the first maps itself, the second maps physical address ``high``."""
    for table, entry in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83), (0x3008, high | 0x83)]:
        machine.system.write(table, struct.pack("<Q", entry))
    sregs = machine.boot_cpu.get_sregs()
    sregs.cr3, sregs.cr4, sregs.efer = 0x1000, sregs.cr4 | 1 << 5, sregs.efer | 0x500
    sregs.cr0 |= 0x80000001
    make_flat(sregs.cs, code=True, long=True)
    machine.boot_cpu.set_sregs(sregs)


def test_ram_above_the_hole_is_the_blocks_end(run: MakeRunning) -> None:
    guest = run(LOW_RAM_LIMIT + 2 * MIB)
    machine, block = guest.machine, guest.machine.memory.blocks[RAM_NAME]
    # incb 0x201007; then as above
    boot_flat(machine, bytes.fromhex("fe0425 07102000 baf8030000 b021 ee ebfe"), CODE, mode=BootMode.PROTECTED)
    enter_long_mode(machine, 4 * GIB)
    machine.memory.start_logging(TrackingReason.MIGRATION)
    (ram,) = machine.memory.ram_regions
    for client in Client:
        ram.test_and_clear_dirty(0, ram.size, client)
    machine.memory.sync_dirty_log()
    ram.harvest_dirty(PageBitmap(block.pages))

    machine.resume()
    guest.output.wait_for(1)
    machine.pause()

    assert block.array[LOW_RAM_LIMIT + PAGE_SIZE + 7] == 1
    assert machine.system.read(4 * GIB + PAGE_SIZE + 7, 1) == b"\x01"
    machine.memory.sync_dirty_log()
    written = PageBitmap(block.pages)
    ram.harvest_dirty(written)
    assert written.test(LOW_RAM_LIMIT // PAGE_SIZE + 1)
    assert written.count(PAGE_SIZE, None) == 1


@pytest.mark.parametrize(
    ("size", "ranges"),
    [
        (16 * MIB, [(0, 16 * MIB, 0)]),
        (3 * GIB, [(0, 3 * GIB, 0)]),
        (3 * GIB + PAGE_SIZE, [(0, 3 * GIB, 0), (4 * GIB, PAGE_SIZE, 3 * GIB)]),
    ],
)
def test_ram_is_laid_out_as_a_pcs(size: int, ranges: list[tuple[int, int, int]]) -> None:
    memory, space = pc_memory(size)
    assert [(flat.start, flat.size, flat.offset) for flat in space.view.ranges] == ranges
    assert list(memory.blocks) == [RAM_NAME]
    memory.close()


START_ALL_OTHERS = (
    "c705 0003e0fe 00450c00"  # movl $0xc4500, 0xfee00300: INIT to all but this one
    "c705 0003e0fe 06460c00"  # movl $0xc4606, 0xfee00300: start them at 0x6000
)


def test_two_vcpus_run_and_stand_still_together(run: MakeRunning) -> None:
    guest = run(cpus=2)
    count_in_real_mode = "2efe060001 75f9 baf803 b032 ee ebf1"  # 1: incb %cs:0x100; jnz 1b; send '2'; jmp 1b
    guest.machine.system.write(0x6000, bytes.fromhex(count_in_real_mode))
    guest.start(START_ALL_OTHERS + "fe0500500000 75f8 baf8030000 b031 ee ebee")  # 1: incb 0x5000; jnz 1b; send '1'; ...
    guest.wait_until_both_sent()

    guest.machine.pause()
    before = guest.contents()
    sent = guest.output.data
    state = guest.machine.save_state()
    assert guest.contents() == before
    assert guest.output.data == sent

    other = run(cpus=2)
    other.machine.memory.blocks[RAM_NAME].array[:] = guest.machine.memory.blocks[RAM_NAME].array
    other.machine.load_state(state)
    other.machine.resume()
    other.wait_until_both_sent()


def test_end_of_one_vcpu_ends_the_machine(run: MakeRunning) -> None:
    guest = run(cpus=2)
    guest.machine.system.write(0x6000, bytes.fromhex("b001 e692 f4"))
    guest.start(START_ALL_OTHERS + "ebfe")
    assert guest.ended.wait(BOUND)
    assert guest.machine.state is RunState.SHUTDOWN


@pytest.mark.parametrize("mode", KVMLogMode)
def test_log_mode_can_be_chosen(run: MakeRunning, mode: KVMLogMode) -> None:
    assert run(log_mode=mode).machine.log_mode is mode


@pytest.mark.parametrize("mode", KVMLogMode)
def test_log_of_a_running_dirtier_has_its_pages_and_few_others(run: MakeRunning, mode: KVMLogMode) -> None:  # D1
    guest = run(log_mode=mode).boot_dirtier()
    machine = guest.machine
    (ram,) = machine.memory.ram_regions
    assert ram.block is not None
    machine.memory.start_logging(TrackingReason.MIGRATION)
    machine.resume()
    guest.wait_for_rounds()
    machine.memory.sync_dirty_log()
    ram.harvest_dirty(PageBitmap(ram.block.pages))
    guest.wait_for_rounds()
    machine.pause()

    machine.memory.sync_dirty_log()
    found = PageBitmap(ram.block.pages)
    ram.harvest_dirty(found)

    pages = (LAST - FIRST) // PAGE_SIZE
    assert found.count(FIRST // PAGE_SIZE, pages) == pages
    assert found.count() <= pages + 8


def test_running_machine_is_neither_saved_nor_loaded(run: MakeRunning) -> None:
    machine = run().boot_dirtier().machine
    state = machine.save_state()
    machine.resume()
    for call in (machine.save_state, lambda: machine.load_state(state)):
        with pytest.raises(UsageError, match="the machine runs") as caught:
            call()
        assert caught.value.remedy == "pause it first"
    machine.pause()
    machine.load_state(state)


@pytest.mark.parametrize("started", [True, False], ids=["running", "new"])
def test_closed_machine_and_its_memory_refuse_what_they_are_asked(run: MakeRunning, started: bool) -> None:
    guest = run().boot_dirtier()
    if started:
        guest.machine.resume()
    guest.close()
    calls: list[Callable[[], object]] = [
        guest.machine.resume,
        guest.machine.pause,
        lambda: guest.system.read(0, 1),
        lambda: guest.memory.blocks[RAM_NAME].array,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("started", [True, False], ids=["running", "new"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_close_is_idempotent_and_gives_everything_back(kvm: KVM, cpus: int, started: bool) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    guest = Running(cpus=cpus).boot_dirtier()
    if started:
        guest.machine.resume()
        guest.wait_for_rounds()

    guest.close()
    guest.close()

    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    ("ram_size", "options", "error", "message"),
    [
        (0, {}, UsageError, "whole number"),
        (PAGE_SIZE + 1, {}, UsageError, "whole number"),
        (1 << 62, {}, HostError, "cannot map"),
        (MIB, {"cpus": 0}, UsageError, "a machine of 0 vCPUs"),
        (MIB, {"cpus": -1}, UsageError, "a machine of -1 vCPUs"),
        (MIB, {"device": "/nonexistent"}, HostError, "there is no /nonexistent"),
    ],
)
def test_machine_that_cannot_be_is_refused_without_a_leak(
    kvm: KVM, ram_size: int, options: dict[str, Any], error: type[DirtylogError], message: str
) -> None:
    before = open_descriptors()
    with pytest.raises(error, match=message):
        KVMMachine(ram_size, **options)
    assert open_descriptors() == before


def test_failure_late_in_the_making_leaks_nothing(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = open_descriptors(), threading.active_count()

    def refuse(self: object, entries: bytes) -> None:
        raise KernelError("KVM_SET_CPUID2", 22, "Invalid argument")

    monkeypatch.setattr("dirtylog.linux.kvm.VCPU.set_cpuid", refuse)
    with pytest.raises(KernelError):
        KVMMachine(MIB, cpus=2)
    assert open_descriptors() == before
    assert threading.active_count() == threads


def test_kernel_without_the_wanted_log_is_refused_without_a_leak(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    check = KVM.check

    def legacy_only(self: Any, capability: Capability) -> int:
        return 0 if capability is Capability.MANUAL_DIRTY_LOG_PROTECT2 else check(self, capability)

    monkeypatch.setattr("dirtylog.linux.kvm.VM.check", legacy_only)
    before = open_descriptors()
    with pytest.raises(HostError, match="no dirty log of mode 'manual'"):
        KVMMachine(MIB, log_mode=KVMLogMode.MANUAL)
    assert open_descriptors() == before

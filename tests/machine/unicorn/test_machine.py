import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.kvm import open_descriptors
from support.require import require
from support.running import (
    CODE,
    COUNTER,
    DEVICE,
    DONE,
    FIRST,
    LAST,
    RESULT,
    Emulated,
    MakeEmulated,
    Recorder,
    listing,
    load,
    store,
    tell_offsets,
)
from support.waiting import wait_until

from dirtylog.errors import ClosedError, DirtylogError, GuestError, HostError, UsageError
from dirtylog.machine import BootMode, MachineState, RunState, UnicornMachine, boot_flat
from dirtylog.machine.pc import LOW_RAM_LIMIT, RAM_NAME
from dirtylog.machine.unicorn.tracking import TRACKERS
from dirtylog.memory import Client, MemoryRegion, MemoryRegionOps, PageBitmap, TrackingReason
from dirtylog.units import GIB, MIB, PAGE_SIZE

COUNT = listing("""
    fe0500500000  incb 0x5000
    ebf8          jmp .-6
""")
"""Counts at COUNTER, in 32 bits."""


class TestRunning:
    def test_dirtier_keeps_its_rule_however_often_it_is_stopped(self, run: MakeEmulated) -> None:
        guest = run().boot_dirtier()
        for _ in range(100):
            guest.machine.resume()
            guest.wait_for_rounds(1)
            guest.machine.pause()
            assert guest.violation() is None

    def test_guest_that_stands_still_writes_nothing(self, run: MakeEmulated) -> None:
        guest = run().boot_dirtier()
        guest.machine.resume()
        guest.wait_for_rounds()
        guest.machine.pause()
        before, sent = guest.contents(), guest.output.data
        guest.machine.save_state()
        assert guest.contents() == before
        assert guest.output.data == sent

    def test_guest_that_halts_is_running_until_paused_and_does_not_go_on(self, run: MakeEmulated) -> None:
        # hlt; then what must not be reached: mov $'?', %al; out %al, %dx
        guest = run().start("66baf803 b021 ee f4 b03f ee ebfe")
        guest.output.wait_for(1)
        for _ in range(20):
            assert guest.machine.state is RunState.RUNNING
            guest.machine.pause()
            guest.machine.resume()
        assert guest.output.data == b"!"

    def test_machine_above_the_hole_has_the_blocks_end(self, run: MakeEmulated) -> None:
        guest = run(LOW_RAM_LIMIT + 2 * MIB)
        high = 4 * GIB + PAGE_SIZE
        code = b"\x48\xb8" + high.to_bytes(8, "little") + bytes.fromhex("c60007")  # movabs $high, %rax; movb $7, (%rax)
        # The page tables map 4 GiB only: the second entry of the first table has 4 GiB to 5 GiB as one page.
        guest.start(b"\xeb\xfe", BootMode.LONG)
        guest.machine.pause()
        guest.system.write(0x2000 + 4 * 8, (4 * GIB | 0x83).to_bytes(8, "little"))
        state = guest.machine.save_state()
        guest.system.write(RESULT, code + b"\xeb\xfe")
        state["cpu0"]["rip"] = RESULT.to_bytes(8, "little")
        guest.machine.load_state(state)
        guest.machine.resume()
        block = guest.memory.blocks[RAM_NAME]
        wait_until(lambda: bool(block.array[LOW_RAM_LIMIT + PAGE_SIZE]), "the guest wrote it")
        assert guest.system.read(high, 1) == b"\x07"

    def test_close_is_idempotent_and_gives_everything_back(self) -> None:
        descriptors, threads = open_descriptors(), threading.active_count()
        guest = Emulated().boot_dirtier()
        guest.machine.resume()
        guest.wait_for_rounds()
        guest.close()
        guest.close()
        assert threading.active_count() == threads
        assert open_descriptors() == descriptors

    def test_closed_machine_refuses_what_it_is_asked(self, run: MakeEmulated) -> None:
        guest = run().boot_dirtier()
        guest.close()
        calls: list[Callable[[], object]] = [guest.machine.resume, guest.machine.pause, lambda: guest.system.read(0, 1)]
        for call in calls:
            with pytest.raises(ClosedError):
                call()


class TestMaking:
    @pytest.mark.parametrize(
        ("ram_size", "options", "error", "message"),
        [
            (0, {}, UsageError, "whole number"),
            (PAGE_SIZE + 1, {}, UsageError, "whole number"),
            (1 << 62, {}, HostError, "cannot map"),
            (MIB, {"cpus": 0}, UsageError, "Unicorn runs one vCPU, not 0; use KVM for more"),
            (MIB, {"cpus": 2}, UsageError, "Unicorn runs one vCPU, not 2; use KVM for more"),
            (MIB, {"tracker": "magic"}, UsageError, "there is no tracker 'magic'; choose from write-watch"),
        ],
    )
    def test_machine_that_cannot_be_is_refused_without_a_leak(
        self, ram_size: int, options: dict[str, Any], error: type[DirtylogError], message: str
    ) -> None:
        before, threads = open_descriptors(), threading.active_count()
        with pytest.raises(error, match=message):
            UnicornMachine(ram_size, **options)
        assert open_descriptors() == before
        assert threading.active_count() == threads

    def test_running_machine_is_neither_saved_nor_loaded_nor_pointed_elsewhere(self, run: MakeEmulated) -> None:
        machine = run().boot_dirtier().machine
        state = machine.save_state()
        machine.resume()
        for call in (
            machine.save_state,
            lambda: machine.load_state(state),
            lambda: machine.set_entry(0, BootMode.REAL),
        ):
            with pytest.raises(UsageError, match="the machine runs"):
                call()
        machine.pause()


class TestEnds:
    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("0f0b", "Unicorn cannot go on: .*at rip 0x10000"),  # ud2
            ("cc", "the guest caused a breakpoint"),  # int3
            ("cd80", "the guest caused exception or interrupt 128 at rip 0x10002"),  # int $0x80
            ("31c9 f7f1", "the guest caused a divide error at rip 0x10002"),  # xor %ecx, %ecx; div %ecx
            ("e9 00000080", "Unicorn cannot go on: .* at rip 0x80010005"),  # jmp to where nothing is
            ("b001 e692 ebfe", "the guest reset itself through port 0x92"),  # mov $1, %al; out %al, $0x92
        ],
        ids=["undefined", "breakpoint", "interrupt", "divide", "nowhere", "reset"],
    )
    def test_fault_ends_the_guest_and_says_where(self, run: MakeEmulated, code: str, message: str) -> None:
        guest = run().start(code)
        assert guest.ended.wait(5)
        assert guest.machine.state is RunState.SHUTDOWN
        with pytest.raises(GuestError, match=message):
            raise guest.machine.failure or AssertionError
        with pytest.raises(UsageError, match="has ended"):
            guest.machine.resume()

    def test_defect_of_a_device_ends_the_machine_and_keeps_its_cause(self, run: MakeEmulated) -> None:
        class Defective(MemoryRegionOps):
            def read(self, offset: int, size: int) -> int:
                raise ZeroDivisionError("a bug")

        guest = run()
        guest.map(Defective())
        guest.start("a1 000000d0")  # mov 0xd0000000, %eax
        assert guest.ended.wait(5)
        assert guest.machine.state is RunState.INTERNAL_ERROR
        assert isinstance(guest.machine.failure, DirtylogError)
        assert isinstance(guest.machine.failure.__cause__, ZeroDivisionError)


class TestAccesses:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_device_in_memory_gets_the_guests_accesses(self, run: MakeEmulated, size: int) -> None:
        guest, device = run(), Recorder()
        guest.map(device)
        guest.run(load(DEVICE + 0x18, size) + store(DEVICE + 0x1008, size), BootMode.LONG)
        assert guest.result(size) == tell_offsets(0x18, size)
        value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
        assert device.accesses == [("read", 0x18, size), ("write", 0x1008, size, value)]

    def test_eight_bytes_reach_a_device_in_memory_as_two_accesses_of_four(self, run: MakeEmulated) -> None:
        guest, device = run(), Recorder()
        guest.map(device)
        guest.run(load(DEVICE + 8, 8) + store(DEVICE, 8), BootMode.LONG)
        assert guest.result(8) == tell_offsets(8, 8)
        assert device.accesses == [
            ("read", 8, 4),
            ("read", 12, 4),
            ("write", 0, 4, 0x4433_2211),
            ("write", 4, 4, 0x8877_6655),
        ]

    @pytest.mark.parametrize(("size", "opcodes"), [(1, "ec ee"), (2, "66ed 66ef"), (4, "ed ef")])
    def test_device_at_ports_gets_the_guests_accesses(self, run: MakeEmulated, size: int, opcodes: str) -> None:
        guest, device = run(), Recorder()
        guest.map_ports(device, 8, 0x500)
        guest.run(bytes.fromhex("66ba0405 31c0" + opcodes))  # mov $0x504, %dx; xor %eax, %eax; in; out
        read = int.from_bytes(tell_offsets(4, size), "little")
        assert device.accesses == [("read", 4, size), ("write", 4, size, read)]

    def test_string_output_reaches_the_device_byte_by_byte(self, run: MakeEmulated) -> None:
        guest, device = run(), Recorder()
        guest.map_ports(device, 1, 0x500)
        guest.system.write(RESULT, b"abc")
        # mov $RESULT, %esi; mov $3, %ecx; mov $0x500, %dx; rep outsb
        guest.run(bytes.fromhex("be00000200 b903000000 66ba0005 f36e"))
        assert bytes(device.written) == b"abc"

    @pytest.mark.parametrize("address", [8 * MIB, DEVICE], ids=hex)
    def test_where_nothing_is_reads_give_ones_and_writes_are_lost(self, run: MakeEmulated, address: int) -> None:
        guest = run()
        guest.run(store(address, 4) + load(address, 4), BootMode.LONG)
        assert guest.result(4) == b"\xff" * 4

    def test_where_nothing_is_beyond_4_gib_reads_give_ones(self, run: MakeEmulated) -> None:
        guest = run()
        # movabs $0x180000000, %rbx; movb $0x5a, (%rbx); mov (%rbx), %al; mov %al, RESULT
        code = bytes.fromhex("48bb 0000008001000000 c6035a 8a03 880425 00000200")
        boot_flat(guest.machine, code + DONE, CODE, mode=BootMode.LONG)
        guest.system.write(0x2000 + 6 * 8, (6 * GIB | 0x83).to_bytes(8, "little"))  # a page of a GiB at 6 GiB
        guest.machine.resume()
        guest.output.wait_for(1)
        assert guest.result(1) == b"\xff"

    def test_unknown_ports_read_as_ones(self, run: MakeEmulated) -> None:
        guest = run()
        guest.run(bytes.fromhex("e580 a300000200"))  # in $0x80, %eax; mov %eax, RESULT
        assert guest.result(5) == b"\xff\xff\xff\xff\0"

    def test_rom_is_read_and_run_but_not_written(self, run: MakeEmulated) -> None:
        guest = run()
        rom = guest.memory.rom("rom", bytes.fromhex("b85a000000 c3") + b"ROM")  # mov $0x5a, %eax; ret
        guest.root.add(rom, 0x30_0000, priority=1)
        # mov $0x300000, %ebx; mov $0x7000, %esp; call *%ebx; mov %eax, RESULT; movl $0, 6(%ebx); mov 6(%ebx), %eax; ...
        guest.run(
            bytes.fromhex("bb00003000 bc00700000 ffd3 a300000200 c7430600000000 8b4306 a304000200"),
        )
        assert guest.result(7) == b"\x5a\0\0\0ROM"

    def test_writes_to_a_rom_device_are_callbacks(self, run: MakeEmulated) -> None:
        guest, device = run(), Recorder()
        guest.root.add(guest.memory.rom_device("flash", b"read", device), DEVICE)
        guest.run(load(DEVICE, 4) + store(DEVICE + 8, 2) + store(DEVICE + 0x11, 2), BootMode.LONG)
        assert guest.result(4) == b"read"
        assert device.accesses == [("write", 8, 2, 0x2211), ("write", 0x11, 1, 0x11), ("write", 0x12, 1, 0x22)]

    def test_trapped_rom_device_is_read_by_callbacks(self, run: MakeEmulated) -> None:
        guest, device = run(), Recorder()
        flash = guest.memory.rom_device("flash", b"read", device)
        guest.root.add(flash, DEVICE)
        flash.set_trapped(True)
        guest.run(load(DEVICE + 4, 2), BootMode.LONG)
        assert guest.result(2) == tell_offsets(4, 2)

    def test_part_of_a_page_is_reached_without_being_mapped(self, run: MakeEmulated) -> None:
        guest = run()
        ram = guest.memory.ram("small", PAGE_SIZE)
        guest.root.add(guest.memory.alias("part", ram, 0, 0x100), DEVICE + 0x80)
        guest.run(store(DEVICE + 0x80, 4) + load(DEVICE + 0x7E, 4), BootMode.LONG)
        assert guest.result(4) == b"\xff\xff\x11\x22"


class TestTopology:
    def test_what_a_device_remaps_is_there_at_the_next_instruction(self, run: MakeEmulated) -> None:
        guest = run()
        one, other = (guest.memory.ram(name, PAGE_SIZE) for name in ("one", "other"))
        guest.root.add(one, DEVICE)

        class Bank(MemoryRegionOps):
            def write(self, offset: int, size: int, value: int) -> None:
                with guest.memory.transaction():
                    guest.root.remove(one)
                    guest.root.add(other, DEVICE)

        guest.map(Bank(), address=DEVICE + MIB)
        # movb $1, DEVICE; movb $0, DEVICE + MIB; movb $2, DEVICE
        guest.run(bytes.fromhex("c605000000d001 c605000010d000 c605000000d002"))
        assert one.block is not None
        assert other.block is not None
        assert (one.block.memory[0], other.block.memory[0]) == (1, 2)

    def test_device_that_was_written_is_not_written_again_when_it_remaps(self, run: MakeEmulated) -> None:
        guest, writes = run(), []
        ram = guest.memory.ram("more", PAGE_SIZE)

        class Adds(MemoryRegionOps):
            def write(self, offset: int, size: int, value: int) -> None:
                writes.append(value)
                guest.root.add(ram, DEVICE + 2 * MIB)

        guest.map(Adds(), address=DEVICE + MIB)
        guest.run(bytes.fromhex("c605000010d007"))
        assert writes == [7]

    def test_memory_comes_and_goes_while_the_guest_runs(self, run: MakeEmulated) -> None:
        guest = run()
        more = guest.memory.ram("more", PAGE_SIZE)
        guest.start(COUNT)
        for _ in range(10):
            guest.wait_until_counted()
            guest.root.add(more, DEVICE)
            guest.wait_until_counted()
            guest.root.remove(more)

    def test_what_was_written_to_memory_that_goes_is_reported(self, run: MakeEmulated) -> None:  # D6
        guest = run()
        more = guest.memory.ram("more", 4 * PAGE_SIZE)
        guest.root.add(more, DEVICE)
        guest.memory.start_logging(TrackingReason.MIGRATION)
        for region in guest.memory.ram_regions:
            region.test_and_clear_dirty(0, region.size, Client.MIGRATION)
        guest.run(bytes.fromhex("c605002000d001"))  # movb $1, DEVICE + 0x2000
        guest.root.remove(more)
        assert written(more) == [2]


def written(region: MemoryRegion) -> list[int]:
    assert region.block is not None
    found = PageBitmap(region.block.pages)
    region.harvest_dirty(found)
    return [int(page) for page in found.indices()]


@pytest.mark.parametrize("tracker", TRACKERS)
class TestTracking:
    @pytest.fixture
    def guest(self, run: MakeEmulated, tracker: str) -> Emulated:
        try:
            return run(tracker=tracker).boot_dirtier()
        except HostError as error:
            require(tracker, False, str(error))
            raise

    def test_log_of_a_running_dirtier_has_its_pages(self, guest: Emulated, tracker: str) -> None:  # D1
        machine = guest.machine
        assert machine.tracker == tracker
        machine.memory.start_logging(TrackingReason.MIGRATION)
        machine.resume()
        guest.wait_for_rounds()
        guest.harvest()
        guest.wait_for_rounds()
        machine.pause()
        found = guest.harvest()
        assert set(range(FIRST // PAGE_SIZE, LAST // PAGE_SIZE)) <= set(found)
        if tracker != "null":
            assert len(found) <= (LAST - FIRST) // PAGE_SIZE + 8
            assert guest.harvest() == []

    def test_no_page_is_lost_between_two_harvests(self, guest: Emulated, tracker: str) -> None:  # D1
        machine, memory = guest.machine, guest.memory
        memory.start_logging(TrackingReason.MIGRATION)
        guest.harvest()
        block = memory.blocks[RAM_NAME]
        before = block.array.copy()
        for _ in range(5):
            machine.resume()
            guest.wait_for_rounds(1)
            machine.pause()
            found = set(guest.harvest())
            changed = (block.array != before).reshape(-1, PAGE_SIZE).any(axis=1).nonzero()[0]
            assert set(changed.tolist()) <= found
            before = block.array.copy()


class TestState:
    def test_saved_machine_goes_on_in_another(self, run: MakeEmulated) -> None:
        source, target = run().boot_dirtier(), run()
        source.machine.resume()
        source.wait_for_rounds(3)
        source.machine.pause()
        left, rounds = source.contents(), source.rounds

        target.memory.blocks[RAM_NAME].array[:] = source.memory.blocks[RAM_NAME].array
        target.machine.load_state(source.machine.save_state())
        assert target.violation() is None
        target.machine.resume()
        target.wait_for_rounds(3)
        target.machine.pause()

        assert target.violation() is None
        assert target.rounds >= rounds + 2
        assert set(target.output.data) == {ord("B")}
        assert source.contents() == left

    def test_machine_that_ran_forgets_its_translations_when_another_state_is_loaded(self, run: MakeEmulated) -> None:
        guest = run().start("66baf803 b031 ee ebfe")  # send '1', and stay there
        guest.output.wait_for(1)
        guest.machine.pause()
        state = guest.machine.save_state()
        state["cpu0"]["rip"] = (0x10000).to_bytes(8, "little")
        guest.memory.blocks[RAM_NAME].memory[0x10005] = ord("2")  # as a migration writes: nobody is told
        guest.machine.load_state(state)
        guest.machine.resume()
        assert guest.output.wait_for(2) == b"12"

    def test_machine_that_halted_is_halted_in_another(self, run: MakeEmulated) -> None:
        source, target = run().start("66baf803 b021 ee f4 b03f ee ebfe"), run()
        source.output.wait_for(1)
        source.machine.pause()
        target.memory.blocks[RAM_NAME].array[:] = source.memory.blocks[RAM_NAME].array
        target.machine.load_state(source.machine.save_state())
        target.machine.resume()
        target.machine.pause()
        assert target.output.data == b""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("serial0"), "the state is of another machine: only one side has serial0"),
            (lambda state: state.update(kvm={}), "the state is of another machine: only one side has kvm"),
            (lambda state: state["cpu0"].pop("rax"), "not the state of an emulated x86 processor"),
            (lambda state: state["cpu0"].update(rax=b"1234567"), "not the state of an emulated x86 processor"),
            (lambda state: state["cpu0"].update(xmm0=bytes(1 << 20)), "not the state of an emulated x86 processor"),
            (lambda state: state["cpu0"].update(more=b""), "not the state of an emulated x86 processor"),
            (lambda state: state["cpu0"].update(cr0=(1 << 31).to_bytes(8, "little")), "no processor has CR0"),
            (lambda state: state["cpu0"].update(efer=(1 << 10).to_bytes(8, "little")), "no processor has CR0"),
            (lambda state: state["cpu0"].update(efer=(1 << 12).to_bytes(8, "little")), "SVM cannot be moved"),
            (lambda state: state["port92"].clear(), "not the state of port 0x92"),
        ],
        ids=[
            "part missing",
            "part too many",
            "missing",
            "short",
            "long",
            "more",
            "paging",
            "long mode",
            "svm",
            "device",
        ],
    )
    def test_state_that_cannot_be_is_refused(
        self, run: MakeEmulated, change: Callable[[MachineState], object], message: str
    ) -> None:  # M5
        machine = run().boot_dirtier().machine
        state = machine.save_state()
        change(state)
        with pytest.raises(UsageError, match=message):
            machine.load_state(state)


def test_pause_takes_milliseconds_whatever_the_guest_does(run: MakeEmulated) -> None:
    guest = run().start(COUNT)
    guest.wait_until_counted(COUNTER)
    taken = []
    for _ in range(10):
        began = time.monotonic()
        guest.machine.pause()
        taken.append(time.monotonic() - began)
        guest.machine.resume()
        guest.wait_until_counted(COUNTER)
    assert min(taken) < 0.05  # the aim is 10 ms, on a host that has the time

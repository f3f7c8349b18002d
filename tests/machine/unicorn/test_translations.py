import threading
from collections.abc import Iterator

import pytest
from support.running import CODE, COUNTER, RESULT, Emulated, MakeEmulated, listing
from support.waiting import wait_until
from unicorn import unicorn_const as const

from dirtylog.machine import BootMode, boot_flat
from dirtylog.machine.unicorn.engine import mapped_ram
from dirtylog.machine.unicorn.translations import HostWrites
from dirtylog.memory import Client, Memory, MemoryRegionOps, TrackingReason
from dirtylog.units import MIB, PAGE_SIZE

CALLEE = RESULT
TWO_PAGES = listing("""
    bc00700000    mov $0x7000, %esp
    e8 f6ff0000   call 0x20000
    a300500000    mov %eax, 0x5000
    ebf4          jmp .-10
""")
"""Calls what is at CALLEE, again and again, and leaves what that returns at COUNTER."""


def returns(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(4, "little") + b"\xc3"  # mov $value, %eax; ret


def translated(guest: Emulated) -> list[int]:
    """Has the addresses of blocks written down as Unicorn translates them; the guest stands still."""
    found: list[int] = []
    engine = guest.machine._engine
    assert engine is not None
    engine._uc.hook_add(const.UC_HOOK_EDGE_GENERATED, lambda _, block, *__: found.append(block.pc))
    return found


def wait_for(guest: Emulated, value: int) -> None:
    wait_until(lambda: guest.word(COUNTER) == value, f"the guest saw {value}")


class TestHostWrites:
    @pytest.fixture
    def memory(self) -> Iterator[Memory]:
        memory = Memory()
        yield memory
        memory.close()

    def test_each_page_is_taken_once_where_the_guest_sees_it(self, memory: Memory) -> None:
        root, ram = memory.container("root"), memory.ram("ram", 8 * PAGE_SIZE)
        root.add(memory.alias("high", ram, 4 * PAGE_SIZE, 4 * PAGE_SIZE), 16 * PAGE_SIZE)
        root.add(memory.alias("low", ram, 0, 5 * PAGE_SIZE), 0)
        shown = mapped_ram(memory.address_space("space", root))
        writes = HostWrites()
        writes.note(ram, 3, 3)
        writes.note(ram, 7, 1)
        pages = [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in writes.take(shown)]
        assert pages == [(3, 5), (16, 18), (19, 20)]
        assert writes.take(shown) == []

    def test_a_page_that_was_taken_is_clean_for_the_code_client_and_for_no_other(self, memory: Memory) -> None:
        ram = memory.ram("ram", 4 * PAGE_SIZE)
        writes = HostWrites()
        writes.note(ram, 1, 2)
        writes.take(())
        assert [ram.is_dirty(page * PAGE_SIZE, 1, Client.CODE) for page in range(4)] == [True, False, False, True]
        assert ram.count_dirty(0, ram.size, Client.MIGRATION) == 4


class TestHostWritesCode:
    @pytest.fixture
    def guest(self, run: MakeEmulated) -> Emulated:
        guest = run()
        guest.system.write(CALLEE, returns(1))
        guest.start(TWO_PAGES)
        wait_for(guest, 1)
        return guest

    def test_write_while_it_stands_still_is_executed_at_once(self, guest: Emulated) -> None:
        guest.machine.pause()
        guest.system.write(CALLEE, returns(2))
        guest.system.write(COUNTER, bytes(4))
        guest.machine.resume()
        wait_for(guest, 2)
        guest.machine.pause()

    def test_write_while_it_runs_is_executed_at_once(self, guest: Emulated) -> None:
        for value in range(2, 40):
            guest.system.write(CALLEE, returns(value))
            wait_for(guest, value)

    def test_only_what_was_written_is_translated_again(self, run: MakeEmulated) -> None:
        guest = run()
        guest.system.write(CALLEE, returns(1))
        found = translated(guest)
        guest.start(TWO_PAGES)
        wait_for(guest, 1)
        guest.machine.pause()
        kept = {address for address in found if address // PAGE_SIZE == CODE // PAGE_SIZE}
        assert kept
        found.clear()

        guest.system.write(CALLEE, returns(3))
        guest.system.write(2 * MIB, bytes(MIB))
        guest.machine.resume()
        wait_for(guest, 3)
        guest.machine.pause()

        assert CALLEE in found
        assert kept.isdisjoint(found)  # others may be new: where it was stopped, a block begins

    def test_code_that_device_writes_is_executed_at_once(self, run: MakeEmulated) -> None:
        guest = run()

        class Loads(MemoryRegionOps):
            def write(self, offset: int, size: int, value: int) -> None:
                guest.system.write(CALLEE, returns(value))

        guest.map_ports(Loads(), 1, 0x500)
        guest.map(Loads())
        guest.system.write(CALLEE, returns(1))
        call = "ff d3 8904b5 00500000 46"  # call *%ebx; mov %eax, 0x5000(, %esi, 4); inc %esi
        # mov $0x7000, %esp; mov $CALLEE, %ebx; xor %esi, %esi; mov $0x500, %dx; then between the calls
        # mov $2, %al; out %al, %dx; and movb $3, DEVICE
        guest.run(
            bytes.fromhex("bc00700000 bb00000200 31f6 66ba0005" + call + "b002 ee" + call + "c605000000d003" + call)
        )
        assert [guest.word(0x5000 + 4 * n) for n in range(3)] == [1, 2, 3]

    def test_code_that_the_guest_writes_itself_is_executed_at_once(self, run: MakeEmulated) -> None:
        guest = run()
        guest.system.write(CALLEE, returns(1))
        # mov $0x7000, %esp; mov $CALLEE, %ebx; call *%ebx; movb $2, 1(%ebx); call *%ebx; mov %eax, 0x5000
        guest.run(bytes.fromhex("bc00700000 bb00000200 ffd3 c6430102 ffd3 a300500000"))
        assert guest.word(COUNTER) == 2

    def test_code_behind_page_tables_is_found_by_its_physical_address(self, run: MakeEmulated) -> None:
        guest = run()
        # mov $0x40200000, %rbx: mapped to 2 MiB below; 1: call *%rbx; mov %eax, 0x5000; jmp 1b
        code = bytes.fromhex("bc00700000 bb00002040 ffd3 890425 00500000 ebf5")
        boot_flat(guest.machine, code, CODE, mode=BootMode.LONG)
        guest.system.write(0x4000 + 8, (2 * MIB | 0x83).to_bytes(8, "little"))  # the second directory's second page
        guest.system.write(2 * MIB, returns(1))
        guest.machine.resume()
        wait_for(guest, 1)
        for value in range(2, 6):
            guest.system.write(2 * MIB, returns(value))
            wait_for(guest, value)

    def test_writers_do_not_wait_for_a_device_that_waits_for_them(self, run: MakeEmulated) -> None:
        guest = run()
        entered, go = threading.Event(), threading.Event()

        class Waits(MemoryRegionOps):
            def write(self, offset: int, size: int, value: int) -> None:
                entered.set()
                assert go.wait(5)

        guest.map(Waits())
        guest.start("c605000000d003 ebfe")  # movb $3, DEVICE; jmp .
        assert entered.wait(5)
        guest.system.write(CALLEE, returns(1))
        go.set()
        guest.machine.pause()


def test_code_bits_are_clean_where_translations_may_be(run: MakeEmulated) -> None:
    guest = run()
    (ram,) = guest.memory.ram_regions
    guest.start(TWO_PAGES)
    guest.machine.pause()
    assert not ram.is_dirty(CODE, 1, Client.CODE)
    guest.system.write(CODE, guest.system.read(CODE, 1))
    assert ram.is_dirty(CODE, 1, Client.CODE)
    guest.system.write(COUNTER, bytes(4))
    guest.system.write(CALLEE, returns(1))
    guest.machine.resume()
    wait_for(guest, 1)
    guest.machine.pause()
    assert not ram.is_dirty(CODE, 1, Client.CODE)


def test_host_writes_reach_migration_as_well(run: MakeEmulated) -> None:  # D12
    guest = run()
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.harvest()
    guest.system.write(3 * MIB, b"x")
    guest.machine.save_state()  # which drops translations, and clears bits of the code client
    assert guest.harvest() == [3 * MIB // PAGE_SIZE]

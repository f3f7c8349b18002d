from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext

import numpy as np
import pytest
from support.kvm import KVMWorld
from support.running import DEVICE, MakeRunning, Recorder, Running, count_exits, listing, tell_offsets
from support.waiting import wait_until

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import KVM, VM
from dirtylog.linux.kvm_abi import Capability, MemorySlotFlag
from dirtylog.machine.kvm.slots import MemorySlots
from dirtylog.memory import Client, Memory, MemoryRegion, PageBitmap, TrackingReason, Words
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE


class SlotTable(VM):
    """What KVM would hold: slot → (flags, guest address, size, host address). Refuses what KVM refuses."""

    def __init__(self, limit: int = 3, *, readonly: bool = True) -> None:
        self.limit = limit
        self.readonly = readonly
        self.slots: dict[int, tuple[int, int, int, int]] = {}

    def check(self, capability: Capability) -> int:
        return {Capability.NR_MEMSLOTS: self.limit, Capability.READONLY_MEM: int(self.readonly)}[capability]

    def set_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        assert 0 <= slot < self.limit
        if size == 0:
            del self.slots[slot]
            return
        for other, (_, start, length, _) in self.slots.items():
            assert other == slot or gpa + size <= start or start + length <= gpa
        assert slot not in self.slots or not (self.slots[slot][0] ^ flags) & MemorySlotFlag.READONLY
        self.slots[slot] = flags, gpa, size, hva

    def get_dirty_log(self, slot: int, words: Words) -> None:
        assert self.slots[slot][0] & MemorySlotFlag.LOG_DIRTY_PAGES
        words[:] = 0

    def seen(self) -> dict[int, tuple[int, int]]:
        """Guest address → size and host address."""
        return {gpa: (size, hva) for _, gpa, size, hva in self.slots.values()}


class Board:
    def __init__(self, vm: SlotTable | None = None) -> None:
        self.vm = vm or SlotTable()
        self.held = 0
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", 8 * PAGE_SIZE)
        self.root: MemoryRegion = self.memory.container("root")
        self.listener = MemorySlots(self.vm, KVMLogMode.LEGACY).listener(self.hold)
        self.memory.register(self.listener, self.memory.address_space("space", self.root))

    @contextmanager
    def hold(self) -> Iterator[None]:
        before = dict(self.vm.slots)
        self.held += 1
        yield
        assert before != self.vm.slots

    def window(self, first: int, pages: int) -> MemoryRegion:
        return self.memory.alias("window", self.ram, first * PAGE_SIZE, pages * PAGE_SIZE)

    def flags(self) -> dict[int, int]:
        """Guest address → flags of the slot there."""
        return {gpa: flags for flags, gpa, *_ in self.vm.slots.values()}

    def host(self, page: int) -> int:
        assert self.ram.block is not None
        return self.ram.block.mapping.address + page * PAGE_SIZE


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def test_slots_follow_what_the_guest_sees(board: Board) -> None:
    window = board.window(5, 2)
    board.root.add(board.ram, 1 << 20)
    board.root.add(window, 4 << 30)
    assert board.vm.seen() == {
        1 << 20: (8 * PAGE_SIZE, board.host(0)),
        4 << 30: (2 * PAGE_SIZE, board.host(5)),
    }

    board.root.remove(board.ram)
    assert board.vm.seen() == {4 << 30: (2 * PAGE_SIZE, board.host(5))}

    board.memory.unregister(board.listener)
    assert board.vm.slots == {}


def test_section_that_moves_within_a_transaction_never_overlaps_itself(board: Board) -> None:  # T1
    board.root.add(board.ram, 0)
    with board.memory.transaction():
        board.root.remove(board.ram)
        board.root.add(board.ram, PAGE_SIZE)
    assert board.vm.seen() == {PAGE_SIZE: (8 * PAGE_SIZE, board.host(0))}


def test_slot_numbers_are_used_again(board: Board) -> None:
    for _ in range(5):
        board.root.add(board.ram, 0)
        board.root.remove(board.ram)
    assert board.vm.slots == {}


def test_slots_run_out_with_an_error(board: Board) -> None:
    for place in range(3):
        board.root.add(board.window(0, 1), place * 16 * PAGE_SIZE)
    with pytest.raises(HostError, match="no more than 3 memory slots") as caught:
        board.root.add(board.window(0, 1), 1 << 30)
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    ("offset", "size", "address", "seen"),
    [
        (0, 2 * PAGE_SIZE, PAGE_SIZE, (PAGE_SIZE, 2 * PAGE_SIZE, 0)),
        (0x800, 3 * PAGE_SIZE, 0x800, (PAGE_SIZE, 2 * PAGE_SIZE, 1)),
        (0x801, 3 * PAGE_SIZE, PAGE_SIZE + 0x801, (2 * PAGE_SIZE, 2 * PAGE_SIZE, 1)),
        (PAGE_SIZE, PAGE_SIZE + 1, 0, (0, PAGE_SIZE, 1)),
        (1, 2 * PAGE_SIZE - 1, 1, (PAGE_SIZE, PAGE_SIZE, 1)),
        (0, PAGE_SIZE - 1, 0, None),
        (1, 2 * PAGE_SIZE - 2, 1, None),
    ],
)
def test_section_off_page_boundaries_shrinks_to_whole_pages(
    board: Board, offset: int, size: int, address: int, seen: tuple[int, int, int] | None
) -> None:
    odd = board.memory.alias("odd", board.ram, offset, size)
    board.root.add(odd, address)
    assert board.vm.seen() == ({} if seen is None else {seen[0]: (seen[1], board.host(seen[2]))})
    board.root.remove(odd)
    assert board.vm.seen() == {}


@pytest.mark.parametrize(("offset", "address"), [(1, 0), (0, 1), (0x800, PAGE_SIZE)])
def test_section_whose_pages_begin_within_host_pages_is_refused(board: Board, offset: int, address: int) -> None:
    with pytest.raises(UsageError, match="in the middle of a host page") as caught:
        board.root.add(board.memory.alias("odd", board.ram, offset, 3 * PAGE_SIZE), address)
    assert caught.value.remedy is not None
    assert board.vm.slots == {}


def test_slots_of_what_is_not_to_be_written_are_read_only(board: Board) -> None:
    readonly = MemorySlotFlag.READONLY
    rom, device = board.memory.rom("rom", b"x"), board.memory.rom_device("flash", b"x", Recorder())
    with board.memory.transaction():
        board.root.add(rom, 1 << 20)
        board.root.add(device, 2 << 20)
        board.root.add(board.ram, 3 << 20)
    assert board.flags() == {1 << 20: readonly, 2 << 20: readonly, 3 << 20: 0}

    board.ram.set_readonly(True)
    device.set_trapped(True)
    assert board.flags() == {1 << 20: readonly, 3 << 20: readonly}
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert board.flags() == {at << 20: readonly | MemorySlotFlag.LOG_DIRTY_PAGES for at in (1, 3)}
    board.ram.set_readonly(False)
    assert board.flags()[3 << 20] == MemorySlotFlag.LOG_DIRTY_PAGES


def test_kernel_without_read_only_memory_is_named() -> None:
    old = Board(SlotTable(readonly=False))
    with pytest.raises(HostError, match=r"no read-only memory, which .*'rom'"):
        old.root.add(old.memory.rom("rom", b"x"), 0)
    old.root.add(old.ram, 1 << 20)
    assert old.vm.seen().keys() == {1 << 20}
    old.memory.close()


@pytest.mark.parametrize("kind", ["mmio", "reservation"])
def test_what_has_no_memory_has_no_slot(board: Board, kind: str) -> None:
    memory = board.memory
    board.root.add(
        memory.mmio("x", 1 << 20, Recorder()) if kind == "mmio" else memory.reservation("x", 1 << 20), 1 << 20
    )
    assert board.vm.slots == {}


def test_writers_are_held_where_one_slot_takes_anothers_place(board: Board) -> None:
    window = board.window(0, 2)
    board.root.add(window, 0)
    board.root.remove(window)
    assert board.held == 0

    board.root.add(window, 0)
    with board.memory.transaction():
        board.root.remove(window)
        board.root.add(board.window(2, 2), PAGE_SIZE)
    assert board.held == 1


def test_writers_are_held_where_something_logged_goes_or_comes(board: Board) -> None:  # D1 D6
    board.root.add(board.ram, 0)
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert board.held == 0
    board.root.remove(board.ram)
    assert board.held == 1
    board.root.add(board.ram, 0)
    assert board.held == 2


def test_logging_is_a_flag_of_every_slot(board: Board) -> None:
    board.root.add(board.ram, 0)
    board.root.add(board.window(0, 1), 1 << 30)

    assert set(board.flags().values()) == {0}
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert set(board.flags().values()) == {MemorySlotFlag.LOG_DIRTY_PAGES}
    board.root.add(board.window(0, 1), 2 << 30)
    assert set(board.flags().values()) == {MemorySlotFlag.LOG_DIRTY_PAGES}
    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert set(board.flags().values()) == {0}


ROM = 0xE000_0000
READ_WRITE_READ = listing("""
    a1000000e0            mov 0xe0000000, %eax
    a300000200            mov %eax, 0x20000
    c705000000e078563412  movl $0x12345678, 0xe0000000
    a1000000e0            mov 0xe0000000, %eax
    a304000200            mov %eax, 0x20004
""")


def test_guest_reads_rom_directly_and_cannot_write_it(run: MakeRunning, monkeypatch: pytest.MonkeyPatch) -> None:  # A6
    guest, exits = run(), count_exits(monkeypatch)
    rom = guest.memory.rom("rom", b"read")
    guest.root.add(rom, ROM)

    guest.run(READ_WRITE_READ)

    assert guest.result(8) == b"readread"
    assert exits == [ROM]  # the write
    assert rom.block is not None
    assert bytes(rom.block.memory) == b"read".ljust(PAGE_SIZE, b"\0")


WRITE_42 = listing("""
    c6050000020042  movb $0x42, 0x20000
""")
JUMP_TO_ROM = listing("""
    b8000000e0  mov $0xe0000000, %eax
    ffd0        call *%eax
""")
JUMP_BACK = listing("""
    c3  ret
""")


def test_guest_runs_code_in_rom(run: MakeRunning) -> None:
    guest = run()
    guest.root.add(guest.memory.rom("rom", WRITE_42 + JUMP_BACK), ROM)
    guest.run(JUMP_TO_ROM)
    assert guest.result(1) == b"\x42"


def test_part_of_memory_turns_into_rom_and_back(run: MakeRunning) -> None:  # V3, V5
    guest = run()
    window = guest.memory.alias("window", guest.memory.ram_regions[0], 0, PAGE_SIZE)
    guest.system.write(0, b"read")
    guest.root.add(window, ROM)
    window.set_readonly(True)
    guest.run(READ_WRITE_READ)
    assert (guest.result(8), guest.system.read(0, 4)) == (b"readread", b"read")

    window.set_readonly(False)
    guest.run(READ_WRITE_READ)
    assert (guest.result(8), guest.system.read(0, 4)) == (b"read\x78\x56\x34\x12", b"\x78\x56\x34\x12")


def test_rom_device_reads_directly_unless_trapped_and_its_writes_reach_the_callback(  # A6
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, device, exits = run(), Recorder(), count_exits(monkeypatch)
    flash = guest.memory.rom_device("flash", b"read", device)
    guest.root.add(flash, ROM)
    write = ("write", 0, 4, 0x12345678)

    for _ in range(2):
        guest.run(READ_WRITE_READ)
        assert guest.result(8) == b"readread"
        assert (device.accesses, exits) == ([write], [ROM])
        device.accesses.clear()
        exits.clear()

        flash.set_trapped(True)
        guest.run(READ_WRITE_READ)
        assert guest.result(8) == tell_offsets(0, 4) * 2
        assert (device.accesses, exits) == ([("read", 0, 4), write, ("read", 0, 4)], [ROM] * 3)
        device.accesses.clear()
        exits.clear()
        flash.set_trapped(False)


def test_device_may_change_its_rom_and_trap_itself(run: MakeRunning) -> None:
    guest = run()

    class Flash(Recorder):
        """Programs itself, and answers status while it does: the first read ends that."""

        def write(self, offset: int, size: int, value: int) -> None:
            assert flash.block is not None
            flash.block.memory[offset : offset + size] = value.to_bytes(size, "little")
            flash.set_trapped(True)

        def read(self, offset: int, size: int) -> int:
            flash.set_trapped(False)
            return 0x6B6F  # "ok"

    flash = guest.memory.rom_device("flash", b"read", Flash())
    guest.root.add(flash, ROM)
    guest.run(READ_WRITE_READ)
    assert guest.result(8) == b"readok\0\0"
    guest.run(READ_WRITE_READ)
    assert guest.result(8) == b"\x78\x56\x34\x12ok\0\0"


READ_AROUND = listing("""
    be000800d0            mov $0xd0000800, %esi
    bf00100200            mov $0x21000, %edi
    b900300000            mov $0x3000, %ecx
    fc                    cld
    f3a4                  rep movsb
    c705fc3700d061626364  movl $0x64636261, 0xd00037fc
    c705002000d065666768  movl $0x68676665, 0xd0002000
    a1003800d0            mov 0xd0003800, %eax
    a300000200            mov %eax, 0x20000
""")


def test_memory_off_page_boundaries_is_whole_for_the_guest(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch
) -> None:  # A1
    guest, exits = run(), count_exits(monkeypatch)
    ram = guest.memory.ram("odd", 4 * PAGE_SIZE)
    assert ram.block is not None
    ram.block.array[:] = np.resize(np.arange(251, dtype=np.uint8), ram.size)
    expected = ram.block.array[0x800:0x3800].tobytes()
    guest.root.add(guest.memory.alias("window", ram, 0x800, 3 * PAGE_SIZE), DEVICE + 0x800)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.harvest("odd")

    guest.run(READ_AROUND)

    assert guest.system.read(0x21000, 3 * PAGE_SIZE) == expected
    assert guest.result(4) == b"\xff\xff\xff\xff"
    assert ram.block.array[0x37FC:0x3800].tobytes() == b"abcd"
    assert ram.block.array[0x2000:0x2004].tobytes() == b"efgh"
    assert {address // PAGE_SIZE * PAGE_SIZE for address in exits} == {DEVICE, DEVICE + 3 * PAGE_SIZE}
    # D10, D12; and on nested paging a page that is new to the vCPU is reported, even if it is only read.
    assert guest.harvest("odd") in ([2, 3], [1, 2, 3])


WRITE_THROUGH_BOTH = listing("""
    c605001000d001  movb $1, 0xd0001000
    c605003040d002  movb $2, 0xd0403000
""")


@pytest.mark.parametrize("mode", KVMLogMode)
def test_writes_through_each_place_that_shows_memory_are_logged(run: MakeRunning, mode: KVMLogMode) -> None:  # D1, T7
    guest = run(log_mode=mode)
    ram = guest.memory.ram("shared", 8 * PAGE_SIZE)
    guest.root.add(guest.memory.alias("low", ram, 2 * PAGE_SIZE, 2 * PAGE_SIZE), DEVICE)
    guest.root.add(guest.memory.alias("all", ram, 0, 8 * PAGE_SIZE), DEVICE + (4 << 20))
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.harvest("shared")
    for _ in range(2):
        guest.run(WRITE_THROUGH_BOTH)
        assert guest.harvest("shared") == [3]
    assert guest.harvest("shared") == []
    assert ram.block is not None
    assert ram.block.memory[3 * PAGE_SIZE] == 2


WINDOW = 0x80_0000
ADD_TO_PAGES = listing("""
    bf00008000    1: mov $0x800000, %edi
    ff07          2: incl (%edi)
    81c700100000  add $0x1000, %edi
    81ff00008200  cmp $0x820000, %edi
    75f0          jne 2b
    ff0500500000  incl 0x5000
    ebe3          jmp 1b
""")


Change = Callable[[Running, MemoryRegion], object]


def replace(guest: Running, window: MemoryRegion) -> None:
    """Have the window show something else from one moment to the next."""
    other = guest.memory.alias("other", guest.memory.ram_regions[0], 2 * MIB, window.size)  # not where the code is
    with guest.memory.transaction():
        guest.root.remove(window)
        guest.root.add(other, WINDOW)


def replace_back(guest: Running, window: MemoryRegion) -> None:
    with guest.memory.transaction():
        guest.root.remove(guest.root.children[0])
        guest.root.add(window, WINDOW)


@pytest.mark.parametrize("mode", KVMLogMode)
@pytest.mark.parametrize(
    ("away", "back"),
    [
        (lambda guest, window: guest.root.remove(window), lambda guest, window: guest.root.add(window, WINDOW)),
        (lambda guest, window: window.set_enabled(False), lambda guest, window: window.set_enabled(True)),
        (lambda guest, window: window.move(2 * WINDOW), lambda guest, window: window.move(WINDOW)),
        (lambda guest, window: window.set_readonly(True), lambda guest, window: window.set_readonly(False)),
        (replace, replace_back),
    ],
    ids=["remove", "disable", "move", "protect", "replace"],
)
def test_no_write_is_lost_when_logged_memory_goes_under_a_running_guest(  # D1, D2, D3, D6
    run: MakeRunning, mode: KVMLogMode, away: Change, back: Change
) -> None:
    guest = run(log_mode=mode)
    ram = guest.memory.ram("moving", 32 * PAGE_SIZE)
    assert ram.block is not None
    memory, copy = ram.block.array, np.zeros(ram.size, np.uint8)
    window = guest.memory.alias("window", ram, 0, ram.size)
    guest.root.add(window, WINDOW)
    guest.start(ADD_TO_PAGES)
    guest.memory.start_logging(TrackingReason.MIGRATION)

    def copy_what_was_written() -> None:
        for page in guest.harvest("moving"):
            span = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            copy[span] = memory[span]

    for turn in range(10):
        guest.wait_until_counted()
        if turn % 2:
            copy_what_was_written()
            guest.wait_until_counted()
        away(guest, window)
        guest.machine.pause()
        copy_what_was_written()
        assert copy.any()
        assert (copy == memory).all()
        guest.machine.resume()
        back(guest, window)


REPORT = listing("""
    a100008000    1: mov 0x800000, %eax
    a300000200    mov %eax, 0x20000
    ff0500500000  incl 0x5000
    ebee          jmp 1b
""")


def test_running_guest_sees_memory_come_move_and_go(run: MakeRunning) -> None:  # V4, T9
    guest = run()
    ram, other = guest.memory.ram("ram", PAGE_SIZE), guest.memory.ram("other", PAGE_SIZE)
    for region, content in ((ram, b"1111"), (other, b"2222")):
        assert region.block is not None
        region.block.memory[:4] = content
    guest.start(REPORT)

    def sees(content: bytes) -> None:
        wait_until(lambda: guest.result(4) == content, f"the guest saw {content!r}")

    sees(b"\xff\xff\xff\xff")
    guest.root.add(ram, WINDOW)
    sees(b"1111")
    guest.root.add(other, WINDOW, priority=1)
    sees(b"2222")
    other.set_enabled(False)
    sees(b"1111")
    ram.move(WINDOW + PAGE_SIZE)
    sees(b"\xff\xff\xff\xff")
    other.set_enabled(True)
    sees(b"2222")
    with guest.memory.transaction():
        guest.root.remove(other)
        ram.move(WINDOW)
    sees(b"1111")
    guest.root.remove(ram)
    sees(b"\xff\xff\xff\xff")


def test_section_too_large_for_a_slot_spans_several() -> None:
    vm = SlotTable(limit=4)
    memory = Memory()
    ram, root = memory.ram("ram", 200 * PAGE_SIZE), memory.container("root")
    assert ram.block is not None
    hva = ram.block.mapping.address
    memory.register(
        MemorySlots(vm, KVMLogMode.LEGACY, max_pages=64).listener(nullcontext), memory.address_space("space", root)
    )
    root.add(ram, 0)
    size = 64 * PAGE_SIZE
    assert vm.seen() == {n * size: (min(size, (200 - 64 * n) * PAGE_SIZE), hva + n * size) for n in range(4)}
    memory.start_logging(TrackingReason.MIGRATION)
    assert all(flags & MemorySlotFlag.LOG_DIRTY_PAGES for flags, *_ in vm.slots.values())
    memory.sync_dirty_log()
    root.remove(ram)
    assert vm.slots == {}
    memory.close()


def test_section_for_which_the_slots_do_not_suffice_has_none() -> None:
    vm = SlotTable(limit=3)
    memory = Memory()
    ram, root = memory.ram("ram", 200 * PAGE_SIZE), memory.container("root")
    memory.register(
        MemorySlots(vm, KVMLogMode.LEGACY, max_pages=64).listener(nullcontext), memory.address_space("space", root)
    )
    with pytest.raises(HostError, match="memory slots"):
        root.add(ram, 0)
    assert vm.slots == {}
    memory.close()


@pytest.mark.parametrize("mode", KVMLogMode)
def test_guest_that_writes_in_several_slots_of_a_section_loses_nothing(kvm: KVM, mode: KVMLogMode) -> None:  # D1 D2
    with closing(KVMWorld(kvm, mode, 200, max_slot_pages=64)) as world:
        world.root.add(world.ram, 0)
        world.memory.start_logging(TrackingReason.MIGRATION)
        world.ram.snapshot_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
        for pages in ([0, 63, 64, 130, 199], [63, 191, 192]):
            world.write([page * PAGE_SIZE for page in pages])
            world.memory.sync_dirty_log()
            found = PageBitmap(200)
            world.ram.harvest_dirty(found)
            assert found.indices().tolist() == pages

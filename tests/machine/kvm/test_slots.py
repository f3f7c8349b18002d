from collections.abc import Iterator

import pytest

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import Capability, MemorySlotFlag
from dirtylog.machine.kvm.slots import MemorySlots
from dirtylog.memory import Memory, MemoryRegion, TrackingReason, Words
from dirtylog.trackers import KVMLogMode
from dirtylog.units import PAGE_SIZE


class SlotTable(VM):
    """What KVM would hold: slot → (flags, guest address, size, host address). Refuses what KVM refuses."""

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self.slots: dict[int, tuple[int, int, int, int]] = {}

    def check(self, capability: Capability) -> int:
        return self.limit if capability is Capability.NR_MEMSLOTS else 0

    def set_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        assert 0 <= slot < self.limit
        if size == 0:
            del self.slots[slot]
            return
        for other, (_, start, length, _) in self.slots.items():
            assert other == slot or gpa + size <= start or start + length <= gpa
        self.slots[slot] = flags, gpa, size, hva

    def get_dirty_log(self, slot: int, words: Words) -> None:
        assert self.slots[slot][0] & MemorySlotFlag.LOG_DIRTY_PAGES
        words[:] = 0

    def seen(self) -> dict[int, tuple[int, int]]:
        """Guest address → size and host address."""
        return {gpa: (size, hva) for _, gpa, size, hva in self.slots.values()}


class Board:
    def __init__(self) -> None:
        self.vm = SlotTable()
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", 8 * PAGE_SIZE)
        self.root: MemoryRegion = self.memory.container("root")
        self.listener = MemorySlots(self.vm, KVMLogMode.LEGACY).listener()
        self.memory.register(self.listener, self.memory.address_space("space", self.root))

    def window(self, first: int, pages: int) -> MemoryRegion:
        return self.memory.alias("window", self.ram, first * PAGE_SIZE, pages * PAGE_SIZE)

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


@pytest.mark.parametrize(("offset", "size", "address"), [(1, PAGE_SIZE, 0), (0, PAGE_SIZE + 1, 0), (0, PAGE_SIZE, 1)])
def test_section_off_page_boundaries_is_refused(board: Board, offset: int, size: int, address: int) -> None:
    with pytest.raises(UsageError, match="not mapped on page boundaries"):
        board.root.add(board.memory.alias("odd", board.ram, offset, size), address)
    assert board.vm.slots == {}


def test_logging_is_a_flag_of_every_slot(board: Board) -> None:
    board.root.add(board.ram, 0)
    board.root.add(board.window(0, 1), 1 << 30)

    def flags() -> set[int]:
        return {flags for flags, *_ in board.vm.slots.values()}

    assert flags() == {0}
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert flags() == {MemorySlotFlag.LOG_DIRTY_PAGES}
    board.root.add(board.window(0, 1), 2 << 30)
    assert flags() == {MemorySlotFlag.LOG_DIRTY_PAGES}
    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert flags() == {0}

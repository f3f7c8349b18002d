"""Two machines' memories in one process: what happens to one is nothing to the other."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from support.listeners import Follower, IORecorder, Told
from support.waiting import BOUND, Task

from dirtylog.errors import UsageError
from dirtylog.memory import Client, IOEventFD, Memory, MemoryListener, MemoryRegionOps, TrackingReason
from dirtylog.units import PAGE_SIZE


class Board:
    """A memory like any other; all have the same names in them."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.root = self.memory.container("root")
        self.ram = self.memory.ram("ram", 4 * PAGE_SIZE)
        self.device = self.memory.rom_device("device", b"rom", MemoryRegionOps())
        self.root.add(self.ram, 0)
        self.root.add(self.device, 8 * PAGE_SIZE)
        self.space = self.memory.address_space("space", self.root)
        self.told: list[Told] = []
        self.memory.register(IORecorder(self.told), self.space)
        self.follower = Follower()
        self.memory.register(self.follower, self.space)
        self.told.clear()

    def change_everything(self) -> None:
        memory = self.memory
        with memory.transaction():
            self.ram.move(16 * PAGE_SIZE)
            self.device.set_trapped(True)
            self.device.add_eventfd(IOEventFD(0, 4, False, 0, 3))
            self.device.add_coalescing(8, 4)
            self.root.add(memory.reservation("kept", PAGE_SIZE), 0)
        memory.set_code_client(True)
        memory.start_logging(TrackingReason.MIGRATION)
        self.ram.start_logging_display()
        self.space.write(16 * PAGE_SIZE, b"dirt")
        memory.set_running(False)
        for client in Client:
            self.ram.snapshot_and_clear_dirty(0, self.ram.size, client)
        self.space.write(17 * PAGE_SIZE, b"dirt")
        memory.stop_logging(TrackingReason.MIGRATION)
        self.follower.check(self.space)

    def dirty(self) -> list[bool]:
        return [self.ram.is_dirty(page * PAGE_SIZE, 1, client) for page in range(4) for client in Client]


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board]]:
    boards = Board(), Board()
    yield boards
    for board in boards:
        board.memory.close()


def test_changes_and_logging_of_one_memory_leave_the_other_as_it_was(boards: tuple[Board, Board]) -> None:  # V8
    busy, idle = boards
    idle.memory.flush = lambda: pytest.fail("nothing of this memory changes")
    view, dirty = idle.space.view, idle.dirty()

    busy.change_everything()

    assert idle.told == []
    assert idle.space.view is view
    assert idle.dirty() == dirty
    assert idle.space.read(0, 16) == bytes(16)
    assert (idle.memory.tracking, idle.memory.global_clients) == (TrackingReason(0), Client(0))
    idle.follower.check(idle.space)
    busy.memory.close()
    idle.memory.flush = None
    idle.change_everything()


def test_change_of_one_memory_waits_for_no_transaction_of_the_other(boards: tuple[Board, Board]) -> None:  # V8
    one, other = boards
    with one.memory.transaction():
        one.ram.set_enabled(False)
        Task(other.change_everything).join()
    one.follower.check(one.space)


def test_callback_of_one_memory_may_change_the_other(boards: tuple[Board, Board]) -> None:  # T10 V8
    one, other = boards

    class Messenger(MemoryListener):
        def commit(self) -> None:
            if one.ram.address and not other.ram.address:
                other.ram.move(one.ram.address)

    one.memory.register(Messenger(), one.space)
    one.ram.move(32 * PAGE_SIZE)

    assert other.ram.address == 32 * PAGE_SIZE
    other.follower.check(other.space)


def test_both_may_be_changed_at_the_same_time(boards: tuple[Board, Board]) -> None:  # V8
    start = threading.Barrier(2)

    def change(board: Board) -> None:
        start.wait(BOUND)
        for number in range(50):
            board.ram.move((number % 7) * 16 * PAGE_SIZE)
            board.memory.start_logging(TrackingReason.MIGRATION)
            board.ram.snapshot_and_clear_dirty(0, board.ram.size, Client.MIGRATION)
            board.memory.stop_logging(TrackingReason.MIGRATION)
            board.follower.check(board.space)

    for task in [Task(partial(change, board)) for board in boards]:
        task.join()
    assert [told for told in boards[0].told if told.section] == [told for told in boards[1].told if told.section]


def test_regions_listeners_and_address_spaces_of_another_memory_are_refused(boards: tuple[Board, Board]) -> None:
    # V8
    one, other = boards
    spare = other.memory.container("spare")
    for refused in (
        lambda: one.root.add(spare, 0),
        lambda: one.memory.alias("window", other.ram, 0, PAGE_SIZE),
        lambda: one.memory.address_space("space", other.root),
        lambda: one.memory.register(Follower(), other.space),
    ):
        with pytest.raises(UsageError, match="another memory"):
            refused()
    one.memory.unregister(other.follower)
    one.memory.remove_address_space(other.space)
    assert one.told == other.told == []
    other.follower.check(other.space)

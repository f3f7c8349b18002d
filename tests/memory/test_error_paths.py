from collections.abc import Callable, Iterator

import pytest
from support.devices import ByteDevice
from support.listeners import IORecorder, Recorder, Told

from dirtylog.errors import HostError, UsageError
from dirtylog.memory import Client, Memory, MemoryListener, MemoryRegionSection, TrackingReason
from dirtylog.units import PAGE_SIZE

PAGES = 16
SIZE = PAGES * PAGE_SIZE


class Board:
    """A container that an address space shows, RAM that is not mapped yet, and a recorder."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.ram = self.memory.ram("ram", SIZE)
        self.root = self.memory.container("root")
        self.space = self.memory.address_space("space", self.root)
        self.log: list[Told] = []
        self.recorder = IORecorder(self.log, "x")
        self.memory.register(self.recorder, self.space)

    def meanwhile(self, action: Callable[[], None]) -> None:
        """Have another change come first, once: after the next one was asked for, before it has the lock."""

        def flush() -> None:
            self.memory.flush = None
            action()

        self.memory.flush = flush

    def told(self, *callbacks: str) -> list[str]:
        """Which of some callbacks were called, in order."""
        return [told.callback for told in self.log if told.callback in callbacks]


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def test_display_logging_that_another_stops_first_is_started_again(board: Board) -> None:  # D1
    board.root.add(board.ram, 0)
    board.ram.start_logging_display()

    board.meanwhile(board.ram.stop_logging_display)
    board.ram.start_logging_display()

    assert board.told("log_start", "log_stop") == ["log_start", "log_stop", "log_start"]
    assert board.ram.logging == Client.DISPLAY
    assert board.space.view.ranges[0].logging == Client.DISPLAY


def test_display_logging_that_another_stops_first_is_not_stopped_twice(board: Board) -> None:
    board.root.add(board.ram, 0)
    board.ram.start_logging_display()

    board.meanwhile(board.ram.stop_logging_display)
    with pytest.raises(UsageError, match="the display does not log"):
        board.ram.stop_logging_display()

    board.ram.start_logging_display()
    assert board.told("log_start", "log_stop") == ["log_start", "log_stop", "log_start"]


def test_region_that_another_maps_first_is_not_mapped_twice(board: Board) -> None:
    other = board.memory.container("other")
    board.meanwhile(lambda: other.add(board.ram, 0))

    with pytest.raises(UsageError, match=r"is mapped in .*other.* already"):
        board.root.add(board.ram, 0)

    assert board.root.children == ()
    assert other.children == (board.ram,)
    assert board.ram.container is other


def test_containers_that_are_mapped_in_each_other_at_once_do_not_close_a_circle(board: Board) -> None:  # V7
    inner = board.memory.container("inner")
    board.meanwhile(lambda: inner.add(board.root, 0))

    with pytest.raises(UsageError, match="would contain itself"):
        board.root.add(inner, 0)

    assert board.root.children == ()


def test_region_that_another_removes_first_is_not_moved(board: Board) -> None:
    board.root.add(board.ram, 0)
    board.meanwhile(lambda: board.root.remove(board.ram))

    with pytest.raises(UsageError, match="is not mapped anywhere"):
        board.ram.move(SIZE)

    assert board.root.children == ()
    assert board.ram.address == 0
    assert board.space.view.ranges == ()


def test_region_that_another_removes_first_is_not_removed_twice(board: Board) -> None:
    board.root.add(board.ram, 0)
    board.meanwhile(lambda: board.root.remove(board.ram))

    with pytest.raises(UsageError, match="is not mapped in"):
        board.root.remove(board.ram)

    assert board.told("region_del") == ["region_del"]


class Global(MemoryListener):
    """Syncs all memory at once."""

    def __init__(self, log: list[Told], name: str, priority: int) -> None:
        self.log = log
        self.name = name
        self.priority = priority

    def log_sync_global(self, last_stage: bool) -> None:
        self.log.append(Told(self.name, "log_sync_global"))


def test_sync_reaches_listeners_by_priority_whichever_kind_they_offer(board: Board) -> None:  # T2 T8
    board.memory.unregister(board.recorder)
    board.root.add(board.ram, 0)
    for name, priority in [("last", 9), ("third", 5), ("first", -1), ("second", 1)]:
        listener = (Recorder if priority in (5, -1) else Global)(board.log, name, priority)
        board.memory.register(listener, board.space)
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.log.clear()

    board.memory.sync_dirty_log()

    assert [(told.listener, told.callback) for told in board.log] == [
        ("first", "log_sync"),
        ("second", "log_sync_global"),
        ("third", "log_sync"),
        ("last", "log_sync_global"),
    ]


class ClearFails(MemoryListener):
    """Cannot clear."""

    def log_clear(self, section: MemoryRegionSection) -> None:
        raise HostError("the log cannot be cleared")


def take(board: Board) -> None:
    board.ram.test_and_clear_dirty(PAGE_SIZE, 3 * PAGE_SIZE, Client.DISPLAY)


def snapshot(board: Board) -> None:
    board.ram.snapshot_and_clear_dirty(PAGE_SIZE, 3 * PAGE_SIZE, Client.DISPLAY)


@pytest.mark.parametrize("clear", [take, snapshot])
def test_pages_whose_clear_fails_stay_dirty(board: Board, clear: Callable[[Board], None]) -> None:  # D1 T11
    board.root.add(board.ram, 0)
    board.ram.start_logging_display()
    board.ram.test_and_clear_dirty(0, SIZE, Client.DISPLAY)
    board.ram.set_dirty(0, 3 * PAGE_SIZE)
    board.memory.register(ClearFails(), board.space)

    with pytest.raises(HostError, match="cannot be cleared"):
        clear(board)

    dirty = [board.ram.is_dirty(page * PAGE_SIZE, PAGE_SIZE, Client.DISPLAY) for page in range(PAGES)]
    assert dirty == [page < 3 for page in range(PAGES)]


class CoalescingFails(MemoryListener):
    """Cannot give coalesced parts up."""

    priority = 5

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        raise HostError(f"the part at {address:#x} stays")


def test_all_hear_of_all_coalesced_parts_that_go_though_one_raises(board: Board) -> None:  # T11 E5
    device = board.memory.mmio("device", PAGE_SIZE, ByteDevice(PAGE_SIZE))
    board.root.add(device, 0)
    board.memory.register(CoalescingFails(), board.space)
    for offset in (0, 8, 16):
        device.add_coalescing(offset, 4)
    board.recorder.io.clear()

    with pytest.raises(HostError, match="the part at 0x0 stays"):
        device.clear_coalescing()

    assert board.recorder.io == [("coalesced_io_del", offset, 4) for offset in (0, 8, 16)]
    assert device.coalesced == ()


class RemovalFails(MemoryListener):
    """Cannot let a section go."""

    def region_del(self, section: MemoryRegionSection) -> None:
        raise HostError("the section stays")


def test_address_space_goes_with_all_its_listeners_though_one_raises(board: Board) -> None:  # T5 T11
    board.root.add(board.ram, 0)
    failing = RemovalFails()
    board.memory.register(failing, board.space)

    with pytest.raises(HostError, match="the section stays"):
        board.memory.remove_address_space(board.space)

    assert board.memory.address_spaces == ()
    assert board.space.view.ranges == ()
    assert board.told("region_del") == ["region_del"]
    other = board.memory.address_space("other", board.memory.container("empty"))
    for listener in (failing, board.recorder):  # refused while they follow another
        board.memory.register(listener, other)

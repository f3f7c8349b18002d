from collections.abc import Callable, Iterator

import pytest
from support.devices import ByteDevice
from support.listeners import Follower, IORecorder, Told
from support.waiting import Task

from dirtylog.errors import UsageError
from dirtylog.memory import CoalescedRange, IOEventFD, Memory, MemoryRegion, TrackingReason
from dirtylog.units import PAGE_SIZE

AT = 4 * PAGE_SIZE
Heard = list[tuple[str, int, int]]


def eventfd(address: int, size: int = 4, fd: int = 3, data: int | None = None) -> IOEventFD:
    return IOEventFD(address, size, data is not None, data or 0, fd)


class Board:
    """A device of one page at 16 KiB, and a recorder whose ``io`` has eventfds and coalesced parts."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.registers = ByteDevice(PAGE_SIZE)
        self.device: MemoryRegion = self.memory.mmio("device", PAGE_SIZE, self.registers)
        self.root = self.memory.container("root")
        self.root.add(self.device, AT)
        self.space = self.memory.address_space("space", self.root)
        self.log: list[Told] = []
        self.recorder = self.listen("x")
        self.follower = Follower()
        self.memory.register(self.follower, self.space)

    def listen(self, name: str, priority: int = 0) -> IORecorder:
        recorder = IORecorder(self.log, name, priority)
        self.memory.register(recorder, self.space)
        return recorder

    def heard(self) -> Heard:
        """What the recorder heard since the last time."""
        self.follower.check(self.space)
        heard, self.recorder.io = self.recorder.io, []
        return heard

    def callbacks(self) -> list[str]:
        """Which callbacks of the recorder were called since the last time."""
        callbacks = [told.callback for told in self.log if told.listener == "x"]
        self.log.clear()
        return callbacks


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    board.callbacks()
    yield board
    board.memory.close()


def test_change_of_eventfds_alone_tells_nothing_else(board: Board) -> None:  # E1
    board.device.add_eventfd(eventfd(8))
    assert board.callbacks() == ["eventfd_add"]
    assert board.heard() == [("eventfd_add", AT + 8, 4)]

    board.device.remove_eventfd(eventfd(8))
    assert board.callbacks() == ["eventfd_del"]
    assert board.heard() == [("eventfd_del", AT + 8, 4)]


def test_eventfds_are_told_ascending_removals_first_after_the_ranges(board: Board) -> None:  # E1
    for address in (16, 8):
        board.device.add_eventfd(eventfd(address))
    board.heard()
    board.callbacks()
    with board.memory.transaction():
        board.device.add_eventfd(eventfd(24))
        board.device.add_eventfd(eventfd(8, data=1))
        board.device.remove_eventfd(eventfd(16))
        board.device.add_eventfd(eventfd(8, fd=9))
        board.device.remove_eventfd(eventfd(8))
        board.root.add(board.memory.ram("ram", PAGE_SIZE), 0)

    assert board.callbacks() == [
        "begin", "region_add", "region_nop", "eventfd_del", "eventfd_del", "eventfd_add", "eventfd_add", "eventfd_add",
        "commit",
    ]  # fmt: skip
    assert [address - AT for _, address, _ in board.heard()] == [8, 16, 8, 8, 24]


def test_eventfd_that_comes_and_goes_in_one_transaction_is_not_told(board: Board) -> None:  # E1
    with board.memory.transaction():
        board.device.add_eventfd(eventfd(8))
        board.device.remove_eventfd(eventfd(8))
    assert board.callbacks() == []


def test_order_of_eventfds_among_listeners_is_the_reverse_of_that_of_ranges(board: Board) -> None:  # E2 T2
    board.memory.unregister(board.recorder)
    for name, priority in [("late", 9), ("early", 1), ("middle", 5)]:
        board.listen(name, priority)
    board.log.clear()

    board.device.add_eventfd(eventfd(0))
    board.device.remove_eventfd(eventfd(0))

    assert [(told.listener, told.callback) for told in board.log] == [
        *((name, "eventfd_add") for name in ("late", "middle", "early")),
        *((name, "eventfd_del") for name in ("early", "middle", "late")),
    ]


def test_order_of_coalesced_parts_among_listeners_is_that_of_ranges(board: Board) -> None:  # T2 E5
    board.memory.unregister(board.recorder)
    for name, priority in [("late", 9), ("early", 1), ("middle", 5)]:
        board.listen(name, priority)
    board.log.clear()

    board.device.add_coalescing(0, 4)
    board.device.clear_coalescing()

    assert [(told.listener, told.callback) for told in board.log] == [
        *((name, "coalesced_io_add") for name in ("early", "middle", "late")),
        *((name, "coalesced_io_del") for name in ("late", "middle", "early")),
    ]


def test_eventfd_follows_its_region(board: Board) -> None:  # E3
    board.device.add_eventfd(eventfd(8))
    board.heard()

    board.device.move(2 * AT)
    assert board.heard() == [("eventfd_del", AT + 8, 4), ("eventfd_add", 2 * AT + 8, 4)]
    board.device.set_enabled(False)
    assert board.heard() == [("eventfd_del", 2 * AT + 8, 4)]
    board.device.set_enabled(True)
    board.heard()
    board.root.remove(board.device)
    assert board.heard() == [("eventfd_del", 2 * AT + 8, 4)]


def test_eventfd_is_told_for_each_place_that_shows_it_and_whole(board: Board) -> None:  # E3
    board.device.add_eventfd(eventfd(6, 8))
    board.heard()
    for name, offset, size, at in [("all", 0, 64, 0), ("tail", 13, 4, 100), ("head", 0, 7, 200), ("none", 14, 9, 300)]:
        board.root.add(board.memory.alias(name, board.device, offset, size), at)

    assert board.heard() == [("eventfd_add", 6, 8), ("eventfd_add", 100 - 7, 8), ("eventfd_add", 206, 8)]


def test_eventfd_in_two_pieces_of_its_region_is_told_once(board: Board) -> None:  # E3 E6
    board.device.add_eventfd(eventfd(8, 8))
    board.root.add(board.memory.reservation("hole", 2), AT + 10, priority=1)
    assert board.heard() == [("eventfd_add", AT + 8, 8)]

    late = board.listen("late")
    assert late.io == [("eventfd_add", AT + 8, 8)]
    board.memory.unregister(late)
    assert late.io[1:] == [("eventfd_del", AT + 8, 8)]


def test_eventfd_below_something_else_is_not_told(board: Board) -> None:  # E3
    board.device.add_eventfd(eventfd(8))
    board.heard()
    cover = board.memory.reservation("cover", 16)

    board.root.add(cover, AT, priority=1)
    assert board.heard() == [("eventfd_del", AT + 8, 4)]
    board.root.remove(cover)
    assert board.heard() == [("eventfd_add", AT + 8, 4)]


@pytest.mark.parametrize("size", [0, 1])
def test_eventfd_at_the_first_byte_of_a_range_is_told(board: Board, size: int) -> None:  # E3 E4
    board.device.add_eventfd(eventfd(0, size))
    assert board.heard() == [("eventfd_add", AT, size)]


def test_eventfd_of_any_length_is_where_its_address_is(board: Board) -> None:  # E4
    board.device.add_eventfd(eventfd(PAGE_SIZE - 1, 0))
    assert board.heard() == [("eventfd_add", AT + PAGE_SIZE - 1, 0)]

    board.device.set_size(PAGE_SIZE - 1)
    assert board.heard() == [("eventfd_del", AT + PAGE_SIZE - 1, 0)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (eventfd(-1), "an eventfd for 4 bytes at -0x1"),
        (eventfd(PAGE_SIZE), "an eventfd for 4 bytes at 0x1000"),
        (eventfd(0, 3), "an eventfd for 3 bytes"),
        (eventfd(0, 16), "an eventfd for 16 bytes"),
        (eventfd(0, -1), "an eventfd for -1 bytes"),
        (eventfd(0, 0, data=5), "any length cannot match data"),  # E4
        (eventfd(0, 1, data=256), "no write of 1 bytes has the value 0x100"),
        (eventfd(0, 1, data=-1), "no write of 1 bytes has the value"),
    ],
)
def test_impossible_eventfd_is_refused(board: Board, wrong: IOEventFD, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        board.device.add_eventfd(wrong)
    assert board.callbacks() == []


def test_eventfd_twice_or_of_nobody_is_refused(board: Board) -> None:
    board.device.add_eventfd(eventfd(0))
    with pytest.raises(UsageError, match="has that eventfd already"):
        board.device.add_eventfd(eventfd(0))
    with pytest.raises(UsageError, match="has no such eventfd"):
        board.device.remove_eventfd(eventfd(0, fd=4))
    assert board.heard() == [("eventfd_add", AT, 4)]


def test_coalesced_part_is_told_when_it_comes_and_goes_and_nothing_else_is(board: Board) -> None:  # E5
    board.device.add_coalescing(8, 4)
    board.device.add_coalescing(32, 8)
    board.device.clear_coalescing()

    assert board.callbacks() == ["coalesced_io_add", "coalesced_io_add", "coalesced_io_del", "coalesced_io_del"]
    assert board.heard() == [
        ("coalesced_io_add", AT + 8, 4), ("coalesced_io_add", AT + 32, 8),
        ("coalesced_io_del", AT + 8, 4), ("coalesced_io_del", AT + 32, 8),
    ]  # fmt: skip
    assert board.device.coalesced == ()
    board.device.clear_coalescing()
    assert board.heard() == []


def test_coalesced_part_comes_right_after_its_range_and_goes_right_before_it(board: Board) -> None:  # E5
    board.device.add_coalescing(0, 4)
    board.root.add(board.memory.ram("low", PAGE_SIZE), 0)
    board.root.add(board.memory.ram("high", PAGE_SIZE), 2 * AT)
    board.callbacks()

    board.device.move(AT + PAGE_SIZE)

    assert board.callbacks() == [
        "begin", "coalesced_io_del", "region_del", "region_nop", "region_add", "coalesced_io_add", "region_nop",
        "commit",
    ]  # fmt: skip


def test_coalesced_part_of_a_range_that_stays_is_not_told(board: Board) -> None:  # E5
    board.device.add_coalescing(0, 4)
    board.heard()
    board.root.add(board.memory.ram("low", PAGE_SIZE), 0)
    assert board.heard() == []


def test_coalesced_part_is_cropped_to_each_range_that_shows_some_of_it(board: Board) -> None:  # E5
    board.device.add_coalescing(8, 16)
    board.heard()
    for name, offset, size, at in [("all", 0, 64, 0), ("tail", 20, 9, 100), ("head", 0, 10, 200), ("none", 24, 9, 300)]:
        board.root.add(board.memory.alias(name, board.device, offset, size), at)
    parts = [(8, 16), (100, 4), (208, 2)]
    assert board.heard() == [("coalesced_io_add", address, size) for address, size in parts]

    board.root.add(board.memory.reservation("hole", 4), AT + 12, priority=1)
    assert board.heard() == [
        ("coalesced_io_del", AT + 8, 16), ("coalesced_io_add", AT + 8, 4), ("coalesced_io_add", AT + 16, 8)
    ]  # fmt: skip
    board.device.clear_coalescing()
    assert {(address, size) for _, address, size in board.heard()} == {*parts, (AT + 8, 4), (AT + 16, 8)}


def test_coalesced_part_of_a_region_that_goes_in_the_same_transaction_is_told_once(board: Board) -> None:  # E5
    board.device.add_coalescing(0, 4)
    board.heard()
    with board.memory.transaction():
        board.device.clear_coalescing()
        board.root.remove(board.device)
    assert board.heard() == [("coalesced_io_del", AT, 4)]

    with board.memory.transaction():
        board.root.add(board.device, AT)
        board.device.add_coalescing(0, 4)
    assert board.heard() == [("coalesced_io_add", AT, 4)]


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (-1, 4), (0, -4), (PAGE_SIZE - 1, 2), (PAGE_SIZE, 1)])
def test_impossible_coalesced_part_is_refused(board: Board, offset: int, size: int) -> None:
    with pytest.raises(UsageError, match="cannot be coalesced"):
        board.device.add_coalescing(offset, size)
    assert board.device.coalesced == ()


def test_late_listener_is_told_of_what_the_others_know_and_that_it_is_gone(board: Board) -> None:  # E6
    board.device.add_coalescing(8, 4)
    board.device.add_coalescing(PAGE_SIZE - 4, 4)
    board.device.add_eventfd(eventfd(0))
    board.root.add(board.memory.alias("window", board.device, 0, 16), 0)

    late = board.listen("late")

    assert [told.callback for told in board.log if told.listener == "late"] == [
        "begin", "region_add", "coalesced_io_add", "region_add", "coalesced_io_add", "coalesced_io_add",
        "eventfd_add", "eventfd_add", "commit",
    ]  # fmt: skip
    come = [entry for entry in late.io if entry[0].endswith("add")]
    board.memory.unregister(late)
    gone = [entry for entry in late.io if entry[0].endswith("del")]
    assert [entry[1:] for entry in gone] == [entry[1:] for entry in come]
    assert board.heard()[-1] == ("eventfd_add", 0, 4)  # the others heard nothing of it


@pytest.mark.parametrize(("change", "callback"), [("add_eventfd", "eventfd_add"), ("remove_eventfd", "eventfd_del")])
def test_listener_that_joins_in_the_midst_of_a_change_costs_the_others_nothing(
    board: Board, change: str, callback: str
) -> None:
    # E6
    if change == "remove_eventfd":
        board.device.add_eventfd(eventfd(8))
    board.heard()
    late = Follower()
    with board.memory.transaction():
        getattr(board.device, change)(eventfd(8))
        board.memory.register(late, board.space)

    assert board.heard() == [(callback, AT + 8, 4)]
    late.check(board.space)


def test_listener_that_leaves_in_the_midst_of_a_change_hears_of_all_it_knew(board: Board) -> None:  # E6
    board.device.add_eventfd(eventfd(8))
    with board.memory.transaction():
        board.device.remove_eventfd(eventfd(8))
        board.device.add_eventfd(eventfd(16))
        board.memory.unregister(board.follower)
    board.follower.check_gone()


def test_eventfds_that_nobody_wanted_are_told_to_the_first_who_does(board: Board) -> None:  # E6
    board.memory.unregister(board.recorder)
    board.memory.unregister(board.follower)
    board.device.add_eventfd(eventfd(8))
    assert board.space.eventfds == {}

    assert board.listen("first").io == [("eventfd_add", AT + 8, 4)]


CHANGES: list[tuple[str, Callable[[Board], object]]] = [
    ("map", lambda board: board.root.add(board.memory.container("more"), 0)),
    ("unmap", lambda board: board.root.remove(board.device)),
    ("move", lambda board: board.device.move(0)),
    ("hide", lambda board: board.device.set_enabled(False)),
    ("eventfd", lambda board: board.device.add_eventfd(eventfd(0))),
    ("coalesce", lambda board: board.device.add_coalescing(0, 4)),
    ("coalesce no longer", lambda board: board.device.clear_coalescing()),
    ("start logging", lambda board: board.memory.start_logging(TrackingReason.MIGRATION)),
    ("address space", lambda board: board.memory.address_space("more", board.root)),
]


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_held_back_writes_are_delivered_before_any_change(board: Board, change: Callable[[Board], object]) -> None:
    # E7
    board.device.add_coalescing(8, 4)
    heard: list[tuple[list[str], tuple[CoalescedRange, ...]]] = []
    board.callbacks()
    board.memory.flush = lambda: heard.append((board.callbacks(), board.device.coalesced))

    change(board)

    assert heard[0] == ([], (CoalescedRange(8, 4),))


def test_held_back_writes_are_delivered_once_for_nested_transactions(board: Board) -> None:  # E7
    flushes: list[int] = []
    board.memory.flush = lambda: flushes.append(1)
    with board.memory.transaction():
        board.device.move(0)
        with board.memory.transaction():
            board.device.add_coalescing(0, 4)
    assert flushes == [1]


def test_held_back_writes_are_delivered_before_their_device_is_accessed(board: Board) -> None:  # E7
    held_back = [b"held"]
    board.device.add_coalescing(8, 4)

    def flush() -> None:
        while held_back:
            board.space.write(AT + 8, held_back.pop())

    board.memory.flush = flush

    board.space.write(AT + 12, b"late")

    assert [call[:3] for call in board.registers.calls] == [("write", 8, 4), ("write", 12, 4)]
    held_back.append(b"more")
    assert board.space.read(AT + 8, 4) == b"more"


def test_access_to_a_device_that_holds_nothing_back_delivers_nothing(board: Board) -> None:  # E7
    board.memory.flush = lambda: pytest.fail("there is nothing to deliver")
    board.space.read(AT, 4)
    board.space.write(AT, b"data")


def test_delivery_leaves_the_memory_to_others(board: Board) -> None:  # E7
    # A device's callback, under a lock that delivery takes too, changes the memory in another thread.
    def flush() -> None:
        board.memory.flush = None
        Task(lambda: board.device.move(8 * PAGE_SIZE)).join()

    board.memory.flush = flush
    board.root.add(board.memory.ram("ram", PAGE_SIZE), 0)

    assert board.device.address == 8 * PAGE_SIZE


def test_error_of_a_delivery_leaves_the_memory_as_it_was(board: Board) -> None:  # E7
    def flush() -> None:
        raise UsageError("the device had enough")

    board.memory.flush = flush
    with pytest.raises(UsageError, match="had enough"):
        board.root.remove(board.device)
    board.memory.flush = None

    assert board.device.container is board.root
    board.root.remove(board.device)
    board.follower.check(board.space)

import threading
from collections.abc import Callable, Iterator

import pytest
from support.boards import Board, at
from support.listeners import Recorder, Seen, Told

from dirtylog.errors import HostError, UsageError
from dirtylog.memory import Client, Memory, MemoryRegion, MemoryRegionOps, TrackingReason
from dirtylog.units import PAGE_SIZE


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def test_outermost_transaction_tells_once_removals_first_then_the_rest_ascending(board: Board) -> None:  # T1
    board.map(board.d, 6)
    board.listen()
    with board.memory.transaction():
        board.root.remove(board.b)
        with board.memory.transaction():
            board.root.remove(board.a)
            board.map(board.a, 5)
        board.map(board.c, 7)
        assert board.told == []

    assert board.heard() == ["x:begin", "x:del:a", "x:del:b", "x:add:a", "x:nop:d", "x:add:c", "x:commit"]


def test_transaction_without_a_change_tells_nothing(board: Board) -> None:  # T1
    board.listen()
    with board.memory.transaction():
        pass
    assert board.told == []


def test_transaction_that_ends_with_an_error_tells_what_was_changed(board: Board) -> None:  # T1
    board.listen()

    def fail_half_way() -> None:
        with board.memory.transaction():
            board.root.remove(board.a)
            raise HostError("out of something")

    with pytest.raises(HostError, match="out of something"):
        fail_half_way()
    assert board.heard() == ["x:begin", "x:del:a", "x:nop:b", "x:commit"]


def test_sections_say_what_is_seen_where(board: Board) -> None:
    board.listen()
    window = board.memory.alias("window", board.a, 0, PAGE_SIZE)
    board.map(window, 9)

    assert Told("x", "region_add", at("a", 9)) in board.told


def test_range_that_is_covered_in_part_is_removed_and_its_rest_added(board: Board) -> None:  # T3
    big = board.memory.ram("big", 4 * PAGE_SIZE)
    board.map(big, 10)
    board.listen()

    board.map(board.c, 11, priority=1)

    changes = [(told.callback, told.section) for told in board.told if told.callback in ("region_add", "region_del")]
    assert changes == [
        ("region_del", Seen("big", 0, 10 * PAGE_SIZE, 4 * PAGE_SIZE)),
        ("region_add", Seen("big", 0, 10 * PAGE_SIZE, PAGE_SIZE)),
        ("region_add", at("c", 11)),
        ("region_add", Seen("big", 2 * PAGE_SIZE, 12 * PAGE_SIZE, 2 * PAGE_SIZE)),
    ]


def test_additions_reach_low_priorities_first_and_removals_last(board: Board) -> None:  # T2
    board.listen("late", priority=20)
    board.listen("early", priority=1)
    board.listen("middle", priority=10)
    board.listen("second", priority=1)

    board.map(board.c, 8)
    order = ["early", "second", "middle", "late"]
    assert [name for name in board.heard() if "add" in name] == [f"{name}:add:c" for name in order]

    board.root.remove(board.c)
    told = board.heard()
    assert [name for name in told if "del" in name] == [f"{name}:del:c" for name in reversed(order)]
    assert [name for name in told if "begin" in name] == [f"{name}:begin" for name in order]
    assert [name for name in told if "commit" in name] == [f"{name}:commit" for name in order]


def test_starts_reach_low_priorities_first_and_stops_last(board: Board) -> None:  # T2
    board.root.remove(board.b)
    board.listen("late", priority=2)
    board.listen("early", priority=1)

    board.memory.start_logging(TrackingReason.MIGRATION)
    assert [name for name in board.heard() if "log" in name] == [
        "early:log_global_start", "late:log_global_start", "early:log_start:a", "late:log_start:a",
    ]  # fmt: skip

    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert [name for name in board.heard() if "log" in name] == [
        "late:log_stop:a", "early:log_stop:a", "late:log_global_stop", "early:log_global_stop",
    ]  # fmt: skip


def test_change_of_logging_is_told_after_nop_and_removes_nothing(board: Board) -> None:  # T3
    board.listen()
    board.a.start_logging_display()

    assert board.heard() == ["x:begin", "x:nop:a", "x:log_start:a", "x:nop:b", "x:commit"]

    board.memory.start_logging(TrackingReason.MIGRATION)
    starts = [(told.section, told.old, told.new) for told in board.told if told.callback == "log_start"]
    both = Client.DISPLAY | Client.MIGRATION
    assert starts == [(at("a", 0), Client.DISPLAY, both), (at("b", 4), Client(0), Client.MIGRATION)]

    board.told.clear()
    board.a.stop_logging_display()
    stops = [(told.callback, told.section, told.old, told.new) for told in board.told if "log" in told.callback]
    assert stops == [("log_stop", at("a", 0), both, Client.MIGRATION)]


def test_one_client_may_take_over_from_another_in_one_transaction(board: Board) -> None:
    board.a.start_logging_display()
    board.listen()
    with board.memory.transaction():
        board.a.stop_logging_display()
        board.memory.set_code_client(True)

    changes = [(told.callback, told.old, told.new) for told in board.told if told.section == at("a", 0)]
    assert changes == [
        ("region_nop", Client(0), Client(0)),
        ("log_start", Client.DISPLAY, Client.CODE),
        ("log_stop", Client.DISPLAY, Client.CODE),
    ]


def test_section_that_appears_logged_gets_no_log_start_and_one_that_goes_no_log_stop(board: Board) -> None:  # T4
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.listen()

    board.map(board.c, 8)
    assert board.c.logging == Client.MIGRATION
    assert board.heard() == ["x:begin", "x:nop:a", "x:nop:b", "x:add:c", "x:commit"]

    board.root.remove(board.c)
    assert board.heard() == ["x:begin", "x:del:c", "x:nop:a", "x:nop:b", "x:commit"]


def test_new_listener_is_told_all_that_is_there(board: Board) -> None:  # T5
    board.memory.start_logging(TrackingReason.MIGRATION)
    recorder = board.listen("early")
    board.memory.unregister(recorder)
    board.told.clear()

    board.memory.register(recorder, board.space)

    assert board.told[3] == Told("early", "log_start", at("a", 0), Client(0), Client.MIGRATION)
    assert board.heard() == [
        "early:begin", "early:log_global_start", "early:add:a", "early:log_start:a", "early:add:b", "early:log_start:b",
        "early:commit",
    ]  # fmt: skip


def test_leaving_listener_is_told_that_all_is_gone(board: Board) -> None:  # T5
    board.a.start_logging_display()
    recorder = board.listen()

    board.memory.unregister(recorder)

    assert board.told[1] == Told("x", "log_stop", at("a", 0), Client.DISPLAY, Client(0))
    assert board.heard() == ["x:begin", "x:log_stop:a", "x:del:a", "x:del:b", "x:commit"]
    board.map(board.c, 8)
    board.memory.unregister(recorder)
    assert board.told == []


def test_listener_hears_of_its_own_address_space_only(board: Board) -> None:
    other = board.memory.address_space("other", board.memory.container("other root"))
    board.listen("other", space=other)
    board.listen()

    board.map(board.c, 8)

    assert [name for name in board.heard() if name.startswith("other")] == ["other:begin", "other:commit"]


def test_two_address_spaces_are_told_one_after_the_other_in_one_transaction(board: Board) -> None:  # T1
    root = board.memory.container("second root")
    second = board.memory.address_space("second", root)
    board.listen("first")
    board.listen("second", space=second)
    with board.memory.transaction():
        root.add(board.memory.alias("again", board.a, 0, PAGE_SIZE), 0)
        board.root.remove(board.a)

    assert board.heard() == [
        "first:begin", "second:begin", "first:del:a", "first:nop:b", "second:add:a", "first:commit", "second:commit",
    ]  # fmt: skip


def test_address_spaces_that_show_the_same_share_a_view_and_hear_of_their_own_sections(board: Board) -> None:  # V6
    whole = board.memory.alias("whole", board.root, 0, board.root.size)
    only = board.memory.container("only")
    only.add(board.memory.alias("cpu", board.root, 0, board.root.size), 0)
    spaces = [board.memory.address_space(region.name, region) for region in (whole, only)]
    assert all(space.view is board.space.view for space in spaces)

    for space in spaces:
        board.listen(space.name, space=space)
    board.map(board.c, 8)

    assert all(space.view is board.space.view for space in spaces)
    assert board.heard() == [
        "whole:begin", "only:begin", "whole:nop:a", "whole:nop:b", "whole:add:c", "only:nop:a", "only:nop:b",
        "only:add:c", "whole:commit", "only:commit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "differ",
    [
        lambda board, root: root.set_readonly(True),
        lambda board, root: root.set_target_offset(PAGE_SIZE),
        lambda board, root: root.set_size(PAGE_SIZE),
    ],
)
def test_address_spaces_that_show_something_else_have_views_of_their_own(
    board: Board, differ: Callable[[Board, MemoryRegion], None]
) -> None:  # V6
    root = board.memory.alias("root", board.root, 0, board.root.size)
    other = board.memory.address_space("other", root)

    differ(board, root)

    assert other.view is not board.space.view
    assert other.view.ranges != board.space.view.ranges


def test_views_that_show_nothing_are_one(board: Board) -> None:  # V6
    spaces = [board.memory.address_space(name, board.memory.container(name)) for name in ("empty", "void")]
    assert spaces[0].view is spaces[1].view
    assert spaces[0].view.ranges == ()


def test_view_that_was_taken_before_a_change_stays_as_it_was(board: Board) -> None:  # V6
    before = board.space.view
    ranges = before.ranges
    board.root.remove(board.a)
    assert before.ranges is ranges
    assert before.lookup(0) is not None


def test_listener_cannot_be_registered_twice(board: Board) -> None:
    recorder = board.listen()
    with pytest.raises(UsageError, match="registered already"):
        board.memory.register(recorder, board.space)


def test_listener_cannot_sync_in_both_ways(board: Board) -> None:  # T8
    class Both(Recorder):
        def log_sync_global(self, last_stage: bool) -> None:
            raise AssertionError

    with pytest.raises(UsageError, match="both log_sync and log_sync_global"):
        board.memory.register(Both(board.told), board.space)
    assert board.told == []


@pytest.mark.parametrize("change", ["topology_changed", "eventfds_changed"])
def test_change_outside_a_transaction_is_refused(board: Board, change: str) -> None:
    board.listen()
    with board.memory.transaction():
        pass
    with pytest.raises(UsageError, match=r"outside a transaction; use 'with memory\.transaction"):
        getattr(board.memory, change)()
    assert board.told == []


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE + 1, 100])
def test_ram_of_no_whole_pages_is_refused_and_its_name_stays_free(size: int) -> None:
    memory = Memory()
    with pytest.raises(UsageError, match="whole number of 4096-byte pages"):
        memory.ram("ram", size)
    memory.ram("ram", PAGE_SIZE)
    memory.close()


def test_blocks_are_known_by_unique_names_in_order(board: Board) -> None:
    assert list(board.memory.blocks) == ["a", "b", "c", "d"]
    assert [region.name for region in board.memory.ram_regions] == ["a", "b", "c", "d"]
    with pytest.raises(UsageError, match="RAM block named 'a' already"):
        board.memory.ram("a", PAGE_SIZE)


@pytest.mark.parametrize("size", [0, -1, (1 << 64) + 1])
def test_region_of_an_impossible_size_is_refused(board: Board, size: int) -> None:
    memory = board.memory
    for make in (
        lambda: memory.container("odd", size),
        lambda: memory.alias("odd", board.a, 0, size),
        lambda: memory.mmio("odd", size, MemoryRegionOps()),
        lambda: memory.reservation("odd", size),
        lambda: memory.container("resized").set_size(size),
    ):
        with pytest.raises(UsageError, match=rf"the region '(odd|resized)' of {size} bytes; sizes are 1 to 2\*\*64"):
            make()


@pytest.mark.parametrize("offset", [-1, 1 << 64])
def test_alias_of_an_impossible_offset_is_refused(board: Board, offset: int) -> None:
    with pytest.raises(UsageError, match=r"the offset .* in 'odd'; offsets are 0 to"):
        board.memory.alias("odd", board.a, offset, PAGE_SIZE)
    alias = board.memory.alias("window", board.a, 0, PAGE_SIZE)
    with pytest.raises(UsageError, match=r"the offset .* in 'window'; offsets are 0 to"):
        alias.set_target_offset(offset)
    assert alias.target_offset == 0


@pytest.mark.parametrize("make", ["rom", "rom_device"])
def test_rom_without_content_is_refused(board: Board, make: str) -> None:
    args = (MemoryRegionOps(),) if make == "rom_device" else ()
    with pytest.raises(UsageError, match="the ROM 'empty' is empty"):
        getattr(board.memory, make)("empty", b"", *args)
    assert "empty" not in board.memory.blocks


def test_two_memories_never_meet(board: Board) -> None:  # V8
    other = Memory()
    foreign = other.container("foreign")
    with pytest.raises(UsageError, match="another memory"):
        board.memory.alias("window", foreign, 0, 1)
    with pytest.raises(UsageError, match="another memory"):
        board.memory.address_space("space", foreign)
    with pytest.raises(UsageError, match="another memory"):
        board.memory.register(Recorder([]), other.address_space("space", foreign))


def test_closing_twice_is_fine(board: Board) -> None:
    board.memory.close()
    board.memory.close()


def test_transaction_of_one_thread_keeps_others_out(board: Board) -> None:
    board.listen()
    started = threading.Event()

    def change() -> None:
        started.set()
        board.map(board.c, 8)

    other = threading.Thread(target=change)
    with board.memory.transaction():
        other.start()
        assert started.wait(30)
        board.root.remove(board.a)
        assert board.c.container is None
    other.join(30)

    assert board.heard() == [
        "x:begin", "x:del:a", "x:nop:b", "x:commit", "x:begin", "x:nop:b", "x:add:c", "x:commit",
    ]  # fmt: skip


def test_ram_that_the_host_cannot_map_is_refused_with_a_remedy() -> None:
    with pytest.raises(HostError, match="cannot map") as caught:
        Memory().ram("huge", 1 << 62)
    assert caught.value.remedy is not None


def test_discarded_block_is_closed_and_its_name_is_free(board: Board) -> None:
    spare = board.memory.ram("spare", PAGE_SIZE)
    board.memory.discard(spare)
    assert "spare" not in board.memory.blocks
    assert spare not in board.memory.ram_regions
    board.memory.discard(board.memory.ram("spare", 2 * PAGE_SIZE))
    with pytest.raises(UsageError, match="has no block"):
        board.memory.discard(spare)


def test_region_that_is_shown_is_not_discarded(board: Board) -> None:
    spare = board.memory.ram("spare", PAGE_SIZE)
    board.root.add(board.memory.alias("window", spare, 0, PAGE_SIZE), 1 << 40)
    with pytest.raises(UsageError, match="still shown"):
        board.memory.discard(spare)


def test_region_that_is_logged_is_not_discarded(board: Board) -> None:  # D1
    spare = board.memory.ram("spare", PAGE_SIZE)
    board.memory.start_logging(TrackingReason.MIGRATION)
    with pytest.raises(UsageError, match="is logged"):
        board.memory.discard(spare)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    spare.start_logging_display()
    with pytest.raises(UsageError, match="is logged"):
        board.memory.discard(spare)
    spare.stop_logging_display()
    board.memory.discard(spare)


def test_container_has_nothing_to_discard(board: Board) -> None:
    with pytest.raises(UsageError, match="has no block"):
        board.memory.discard(board.root)

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.listeners import Recorder, Seen, Told

from dirtylog.errors import HostError, UsageError
from dirtylog.memory import (
    AddressSpace,
    Client,
    Memory,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    TrackingReason,
)
from dirtylog.units import PAGE_SIZE


class Board:
    """Four RAM regions of one page, of which ``a`` and ``b`` are mapped; and a log that listeners share."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.root = self.memory.container("root")
        self.a, self.b, self.c, self.d = (self.memory.ram(name, PAGE_SIZE) for name in "abcd")
        self.space = self.memory.address_space("space", self.root)
        self.told: list[Told] = []
        with self.memory.transaction():
            self.map(self.a, 0)
            self.map(self.b, 4)

    def map(self, region: MemoryRegion, page: int, priority: int = 0) -> None:
        self.root.add(region, page * PAGE_SIZE, priority=priority)

    def listen(self, name: str = "x", priority: int = 0, space: AddressSpace | None = None) -> Recorder:
        recorder = Recorder(self.told, name, priority)
        self.memory.register(recorder, space or self.space)
        self.told.clear()
        return recorder

    def heard(self) -> list[str]:
        """Callbacks as ``listener:callback:region``, and forgets them."""
        heard = [
            ":".join(
                [told.listener, told.callback.removeprefix("region_")] + ([told.section.region] if told.section else [])
            )
            for told in self.told
        ]
        self.told.clear()
        return heard


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def at(region: str, page: int) -> Seen:
    return Seen(region, 0, page * PAGE_SIZE, PAGE_SIZE)


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


def test_transaction_that_ends_with_an_error_tells_what_was_changed(board: Board) -> None:
    board.listen()

    def fail_half_way() -> None:
        with board.memory.transaction():
            board.root.remove(board.a)
            raise HostError("out of something")

    with pytest.raises(HostError, match="out of something"):
        fail_half_way()
    assert board.heard() == ["x:begin", "x:del:a", "x:nop:b", "x:commit"]


def test_commit_callback_may_change_the_topology_again(board: Board) -> None:
    class Meddler(MemoryListener):
        def commit(self) -> None:
            if board.c.container is None:
                board.map(board.c, 9)

    board.listen()
    board.memory.register(Meddler(), board.space)
    assert board.heard() == ["x:begin", "x:nop:a", "x:nop:b", "x:add:c", "x:commit"]


def test_commit_callback_that_changes_nothing_is_not_told_again(board: Board) -> None:
    class Visitor(MemoryListener):
        def commit(self) -> None:
            with board.memory.transaction():
                pass

    board.listen()
    board.memory.register(Visitor(), board.space)
    board.map(board.c, 8)
    assert board.heard() == ["x:begin", "x:nop:a", "x:nop:b", "x:add:c", "x:commit"]


def test_topology_cannot_change_outside_a_transaction(board: Board) -> None:
    with pytest.raises(UsageError, match="outside a transaction"):
        board.memory.topology_changed()


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
        board.memory.start_logging(TrackingReason.MIGRATION)

    changes = [(told.callback, told.old, told.new) for told in board.told if told.section == at("a", 0)]
    assert changes == [
        ("region_nop", Client(0), Client(0)),
        ("log_start", Client.DISPLAY, Client.MIGRATION),
        ("log_stop", Client.DISPLAY, Client.MIGRATION),
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


class GlobalSync(MemoryListener):
    def __init__(self) -> None:
        self.stages: list[bool] = []

    def log_sync_global(self, last_stage: bool) -> None:
        self.stages.append(last_stage)


def test_sync_asks_for_each_logged_section_or_once_for_all(board: Board) -> None:  # T8
    board.a.start_logging_display()
    board.listen()
    whole = GlobalSync()
    board.memory.register(whole, board.space)

    board.memory.sync_dirty_log()
    assert board.heard() == ["x:log_sync:a"]
    board.memory.sync_dirty_log(board.b, last_stage=True)
    assert board.heard() == []
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.told.clear()
    board.memory.sync_dirty_log(board.b)
    assert board.told == [Told("x", "log_sync", at("b", 4))]
    assert whole.stages == [False, True, False]


def test_after_sync_reaches_everybody(board: Board) -> None:
    board.listen("one", priority=1)
    board.listen("zero")
    board.memory.after_sync()
    assert board.heard() == ["zero:log_global_after_sync", "one:log_global_after_sync"]


def test_global_start_precedes_section_starts_and_only_the_first_reason_counts(board: Board) -> None:  # T6
    board.listen()
    board.memory.start_logging(TrackingReason.DIRTY_RATE)
    assert board.heard() == [
        "x:log_global_start", "x:begin", "x:nop:a", "x:log_start:a", "x:nop:b", "x:log_start:b", "x:commit",
    ]  # fmt: skip

    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert board.memory.tracking == TrackingReason.DIRTY_RATE | TrackingReason.MIGRATION
    assert board.told == []

    board.memory.stop_logging(TrackingReason.DIRTY_RATE)
    assert board.told == []

    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert board.heard() == [
        "x:begin", "x:nop:a", "x:log_stop:a", "x:nop:b", "x:log_stop:b", "x:commit", "x:log_global_stop",
    ]  # fmt: skip


def test_reason_that_was_not_given_cannot_be_taken_back(board: Board) -> None:
    board.listen()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.told.clear()
    with pytest.raises(UsageError, match="not logged for"):
        board.memory.stop_logging(TrackingReason.MIGRATION | TrackingReason.DIRTY_RATE)
    assert board.memory.tracking == TrackingReason.MIGRATION
    assert board.told == []


@pytest.mark.parametrize("change", ["start_logging", "stop_logging"])
def test_no_reason_at_all_is_refused(board: Board, change: str) -> None:
    board.listen()
    with pytest.raises(UsageError, match="without a reason"):
        getattr(board.memory, change)(TrackingReason(0))
    assert board.told == []


def test_failed_global_start_is_undone_for_those_told_before_in_reverse(board: Board) -> None:
    class Unable(Recorder):
        def log_global_start(self) -> None:
            raise HostError("no memory for the log")

    board.listen("one", priority=1)
    board.listen("two", priority=2)
    unable = Unable(board.told, "unable", 3)
    board.memory.register(unable, board.space)
    board.listen("four", priority=4)

    with pytest.raises(HostError, match="no memory for the log"):
        board.memory.start_logging(TrackingReason.MIGRATION)

    assert board.heard() == [
        "one:log_global_start", "two:log_global_start", "two:log_global_stop", "one:log_global_stop",
    ]  # fmt: skip
    assert not board.memory.tracking
    assert board.a.logging == Client(0)

    board.memory.unregister(unable)
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert board.a.logging == Client.MIGRATION


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
def test_container_or_alias_of_an_impossible_size_is_refused(board: Board, size: int) -> None:
    with pytest.raises(UsageError, match="a container of"):
        board.memory.container("odd", size)
    with pytest.raises(UsageError, match="an alias of"):
        board.memory.alias("odd", board.a, 0, size)


@pytest.mark.parametrize("offset", [-1, 1 << 64])
def test_alias_of_an_impossible_offset_is_refused(board: Board, offset: int) -> None:
    with pytest.raises(UsageError, match="an alias of"):
        board.memory.alias("odd", board.a, offset, PAGE_SIZE)


def test_two_memories_never_meet(board: Board) -> None:
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


class Mirror(MemoryListener):
    """Keeps a view of its own from what it is told, and fails where that cannot be."""

    def __init__(self) -> None:
        self.sections: dict[int, tuple[MemoryRegion, int, int]] = {}
        self.logging: dict[int, Client] = {}
        self._last = -1

    def _value(self, section: MemoryRegionSection) -> tuple[MemoryRegion, int, int]:
        return section.region, section.offset_within_region, section.size

    def _ascending(self, section: MemoryRegionSection) -> int:
        assert section.offset_within_address_space > self._last
        self._last = section.offset_within_address_space
        return self._last

    def begin(self) -> None:
        self._last = -1
        self._additions = False

    def region_del(self, section: MemoryRegionSection) -> None:
        assert not self._additions
        assert self.sections.pop(self._ascending(section)) == self._value(section)
        del self.logging[section.offset_within_address_space]

    def region_add(self, section: MemoryRegionSection) -> None:
        self._second_pass()
        address = self._ascending(section)
        assert address not in self.sections
        self.sections[address] = self._value(section)
        self.logging[address] = section.region.logging

    def region_nop(self, section: MemoryRegionSection) -> None:
        self._second_pass()
        assert self.sections[self._ascending(section)] == self._value(section)

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        assert self.logging[section.offset_within_address_space] == old
        self.logging[section.offset_within_address_space] = new

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        # Where some clients start and others stop at once, both are told with the same old and new.
        assert self.logging[section.offset_within_address_space] in (old, new)
        self.logging[section.offset_within_address_space] = new

    def _second_pass(self) -> None:
        if not self._additions:
            self._additions, self._last = True, -1


step = st.tuples(st.sampled_from(["move", "toggle", "display", "migration"]), st.integers(0, 2), st.integers(0, 8))


@settings(deadline=None, max_examples=60)
@given(transactions=st.lists(st.lists(step, min_size=1, max_size=4), max_size=8))
def test_listener_can_follow_any_change_from_what_it_is_told(transactions: list[list[tuple[str, int, int]]]) -> None:
    # T1 T3 T4
    memory = Memory()
    root, ram = memory.container("root"), memory.ram("ram", 4 * PAGE_SIZE)
    pieces = [memory.ram("other", 2 * PAGE_SIZE), memory.alias("head", ram, 0, 2 * PAGE_SIZE), ram]
    space = memory.address_space("space", root)
    mirror = Mirror()
    memory.register(mirror, space)
    for steps in transactions:
        with memory.transaction():
            for action, number, page in steps:
                piece = pieces[number]
                if action in ("move", "toggle") and piece.container is not None:
                    root.remove(piece)
                if action == "move" or (action == "toggle" and page % 2):
                    root.add(piece, page * PAGE_SIZE, priority=page % 3)
                if action == "display":
                    (ram.stop_logging_display if ram.logging & Client.DISPLAY else ram.start_logging_display)()
                if action == "migration":
                    (memory.stop_logging if memory.tracking else memory.start_logging)(TrackingReason.MIGRATION)

        shown = {flat.start: (flat.region, flat.offset, flat.size) for flat in space.view.ranges}
        assert mirror.sections == shown
        assert mirror.logging == {flat.start: flat.logging for flat in space.view.ranges}
    memory.unregister(mirror)
    assert mirror.sections == {}
    memory.close()


def test_ram_that_the_host_cannot_map_is_refused_with_a_remedy() -> None:
    with pytest.raises(HostError, match="cannot map") as caught:
        Memory().ram("huge", 1 << 62)
    assert caught.value.remedy is not None

"""Syncs, and the reasons why all memory is logged."""

from collections.abc import Iterator

import pytest
from support.boards import Board, at
from support.listeners import Recorder, Told

from dirtylog.errors import HostError, UsageError
from dirtylog.memory import Client, MemoryListener, TrackingReason


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


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
    board.memory.start_logging(TrackingReason.DIRTY_LIMIT)
    assert board.heard() == [
        "x:log_global_start", "x:begin", "x:nop:a", "x:log_start:a", "x:nop:b", "x:log_start:b", "x:commit",
    ]  # fmt: skip

    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.start_logging(TrackingReason.MIGRATION)
    assert board.memory.tracking == TrackingReason.DIRTY_LIMIT | TrackingReason.MIGRATION
    assert board.told == []

    board.memory.stop_logging(TrackingReason.DIRTY_LIMIT)
    assert board.told == []

    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert board.heard() == [
        "x:begin", "x:nop:a", "x:log_stop:a", "x:nop:b", "x:log_stop:b", "x:commit", "x:log_global_stop",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "client"),
    [
        (TrackingReason.MIGRATION, Client.MIGRATION),
        (TrackingReason.DIRTY_LIMIT, Client.MIGRATION),
        (TrackingReason.DIRTY_RATE, Client.WATCH),
    ],
)
def test_each_reason_logs_for_its_client(board: Board, reason: TrackingReason, client: Client) -> None:
    board.memory.start_logging(reason)
    assert board.a.logging == client
    board.memory.stop_logging(reason)
    assert board.a.logging == Client(0)


def test_second_client_starts_and_stops_without_the_first_and_without_a_global_start(board: Board) -> None:  # T6
    watch, both = Client.WATCH, Client.WATCH | Client.MIGRATION
    board.memory.start_logging(TrackingReason.DIRTY_RATE)
    board.listen()

    board.memory.start_logging(TrackingReason.MIGRATION)
    assert [told for told in board.told if "log" in told.callback] == [
        Told("x", "log_start", at("a", 0), watch, both),
        Told("x", "log_start", at("b", 4), watch, both),
    ]

    board.told.clear()
    board.memory.stop_logging(TrackingReason.DIRTY_RATE)
    assert [told for told in board.told if "log" in told.callback] == [
        Told("x", "log_stop", at("a", 0), both, Client.MIGRATION),
        Told("x", "log_stop", at("b", 4), both, Client.MIGRATION),
    ]


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


def test_failed_global_start_is_undone_for_those_told_before_in_reverse(board: Board) -> None:  # T13
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


def test_stop_waits_while_the_machine_stands_still(board: Board) -> None:  # T12
    board.listen()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.set_running(False)
    board.told.clear()

    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert board.told == []
    assert board.a.logging == Client.MIGRATION
    with pytest.raises(UsageError, match="not logged for"):
        board.memory.stop_logging(TrackingReason.MIGRATION)

    board.memory.set_running(True)
    assert [name for name in board.heard() if "log" in name] == [
        "x:log_stop:a", "x:log_stop:b", "x:log_global_stop"
    ]  # fmt: skip
    assert not board.memory.tracking
    board.memory.set_running(False)
    board.memory.set_running(True)
    assert board.told == []


def test_start_keeps_a_stop_from_happening_that_waits_for_the_same_reason(board: Board) -> None:  # T12
    board.listen()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.set_running(False)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    board.told.clear()

    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.set_running(True)

    assert board.told == []
    assert board.memory.tracking == TrackingReason.MIGRATION


def test_start_for_another_reason_first_stops_what_waited(board: Board) -> None:  # T12
    board.listen()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.memory.set_running(False)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    board.told.clear()

    board.memory.start_logging(TrackingReason.DIRTY_RATE)

    assert [name for name in board.heard() if "log" in name] == [
        "x:log_stop:a", "x:log_stop:b", "x:log_global_stop",
        "x:log_global_start", "x:log_start:a", "x:log_start:b",
    ]  # fmt: skip
    assert board.memory.tracking == TrackingReason.DIRTY_RATE


def test_stops_that_wait_happen_together(board: Board) -> None:  # T12
    board.listen()
    both = TrackingReason.MIGRATION | TrackingReason.DIRTY_RATE
    board.memory.start_logging(both)
    board.memory.set_running(False)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    board.memory.stop_logging(TrackingReason.DIRTY_RATE)
    board.told.clear()

    board.memory.set_running(True)

    assert board.heard().count("x:log_global_stop") == 1
    assert not board.memory.tracking


@pytest.mark.parametrize("change", ["start_logging", "stop_logging"])
def test_logging_of_all_cannot_change_inside_a_transaction(board: Board, change: str) -> None:  # T14
    board.memory.start_logging(TrackingReason.MIGRATION)
    with board.memory.transaction(), pytest.raises(UsageError, match="inside a transaction; end it first"):
        getattr(board.memory, change)(TrackingReason.MIGRATION)
    assert board.memory.tracking == TrackingReason.MIGRATION


def test_code_client_logs_all_memory_from_the_end_of_the_transaction_on(board: Board) -> None:
    board.listen()
    board.memory.set_code_client(True)
    assert (board.a.logging, board.d.logging) == (Client.CODE, Client.CODE)
    assert board.heard() == ["x:begin", "x:nop:a", "x:log_start:a", "x:nop:b", "x:log_start:b", "x:commit"]
    board.memory.set_code_client(False)
    assert board.a.logging == Client(0)

import logging
from collections.abc import Iterator

import pytest
from support.streams import refusals

from dirtylog.migration import refusals as refusals_module
from dirtylog.migration.refusals import BURST, INTERVAL, LOGGER, Refusals


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(refusals_module, "time", clock)
    return clock


@pytest.fixture
def logged() -> Iterator[list[str]]:
    with refusals() as logged:
        yield logged


def test_each_is_logged_with_what_and_why(clock: _Clock, logged: list[str]) -> None:
    Refusals().add("refused a connection from 10.0.0.1:5", "it is Tuesday")
    assert logged == ["refused a connection from 10.0.0.1:5: it is Tuesday"]


def test_flood_writes_few_records_and_the_next_one_tells_how_many_are_missing(clock: _Clock, logged: list[str]) -> None:
    log = Refusals()
    for _ in range(BURST + 1000):
        log.add("x", "y")
    assert logged == ["x: y"] * BURST
    clock.now += INTERVAL
    log.add("x", "z")
    assert logged[BURST:] == ["refused 1000 more connections, too many to be told one by one", "x: z"]


def test_long_peace_allows_no_more_at_once_than_a_short_one(clock: _Clock, logged: list[str]) -> None:
    log = Refusals()
    clock.now += 1000 * INTERVAL
    for _ in range(2 * BURST):
        log.add("x", "y")
    assert len(logged) == BURST


def test_close_tells_how_many_are_missing_once(clock: _Clock, logged: list[str]) -> None:
    log = Refusals()
    for _ in range(BURST + 3):
        log.add("x", "y")
    log.close()
    log.close()
    assert logged[BURST:] == ["refused 3 more connections, too many to be told one by one"]


def test_reason_that_a_peer_made_up_is_one_short_line(clock: _Clock, logged: list[str]) -> None:
    log = Refusals()
    log.add("x", "no\ndirtylog: all is well\x1b[2J")
    log.add("x", "y" * 10_000)
    assert logged[0] == r"x: no\ndirtylog: all is well\x1b[2J"
    assert len(logged[1]) < 400


def test_defect_is_logged_as_an_error_with_its_traceback(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    defect = ZeroDivisionError("oh")
    Refusals().add("x", "y", defect)
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.ERROR, "dirtylog.migration")
    assert record.exc_info is not None
    assert record.exc_info[1] is defect


def test_library_says_nothing_by_itself() -> None:
    assert [type(handler) for handler in LOGGER.handlers] == [logging.NullHandler]

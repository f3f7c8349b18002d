"""The rules of stamps: what keeps them has no complaints, and each way to break one is found out."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from support.require import require
from support.waiting import BOUND

from dirtylog.errors import UsageError
from dirtylog.memory import Numbers, Words
from dirtylog.testing import Case, ContractError, Differences, ModelCase, ModelTracker, Stamps, Writing
from dirtylog.testing.board import MOST_ROUNDS
from dirtylog.testing.mechanisms import MECHANISMS
from dirtylog.testing.model import PageLog
from dirtylog.testing.writers import WriterThreads
from dirtylog.trackers.null import NullTracker
from dirtylog.units import PAGE_SIZE

PAGES = 199
PLAIN = Differences()
CLEARS = Differences(clears_on_collect="it is made so")
ROUNDS = 300
"""Until when a broken tracker is found out. It takes a few."""


def run(
    tracker: Callable[..., ModelTracker], differences: Differences = PLAIN, *, pages: int = PAGES, rounds: int = ROUNDS
) -> None:
    bus = threading.RLock()
    case = ModelCase(tracker(pages, clears_on_collect=bool(differences.clears_on_collect), bus=bus), bus)
    with Stamps(case, differences, Writing.THREADS, seed=1) as stamps:
        stamps.run(rounds)


class LosesAPage(ModelTracker):
    def write(self, page: int) -> None:
        if page != 100:
            super().write(page)


class InventsAPage(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        words[1] |= np.uint64(1)

    def _protect(self, log: list[PageLog], page: int, end: int) -> None:
        log[page] = PageLog.PROTECTED


class ClearsTheNeighbours(ModelTracker):
    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        for index in np.flatnonzero(words):
            log[first + 64 * int(index) : first + 64 * int(index) + 64] = [PageLog.PROTECTED] * 64


class ClearsWhenItCollects(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        self._armed("collect")[:] = [PageLog.PROTECTED] * self.pages

    def clear(self, first: int, count: int, words: Words) -> None:
        pass


class AwaitsWrites(ModelTracker):
    def __init__(self, *args: int, **options: bool) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._written = threading.Semaphore(0)

    def write(self, page: int) -> None:
        super().write(page)
        self._written.release()

    def _await_writes(self) -> None:
        while self._written.acquire(blocking=False):
            pass
        for _ in range(20):
            assert self._written.acquire(timeout=BOUND)


class ClearsLate(AwaitsWrites):
    """What is written between the call and the next collect is lost. Here, something is."""

    def __init__(self, *args: int, **options: bool) -> None:
        super().__init__(*args, **options)
        self._late: list[int] = []

    def clear(self, first: int, count: int, words: Words) -> None:
        super().clear(first, count, words)
        self._await_writes()

    def _protect(self, log: list[PageLog], page: int, end: int) -> None:
        self._late.append(page)

    def _collect(self, words: Words) -> None:
        for page in self._late:
            self._armed("collect")[page] = PageLog.PROTECTED
        self._late.clear()
        super()._collect(words)


class CollectsInTwoSteps(AwaitsWrites):
    """As soft-dirty bits do: they are read, and then all are cleared. Here, something is written in between."""

    def collect(self, words: Words) -> None:
        super().collect(words)
        self._await_writes()
        with self._bus:
            self._armed("collect")[:] = [PageLog.PROTECTED] * self.pages


class Forgets(ModelTracker):
    """A page is reported once only, though it is not cleared."""

    def _collect(self, words: Words) -> None:
        log = self._armed("collect")
        before = list(log)
        super()._collect(words)
        for page in range(64, 128):
            if before[page] is PageLog.COLLECTED:
                words[1] &= ~np.uint64(1 << page % 64)


@pytest.mark.parametrize("differences", [PLAIN, CLEARS], ids=["split", "clears on collect"])
@pytest.mark.parametrize("pages", [1, 2, 64, 199])
def test_model_keeps_the_rules(differences: Differences, pages: int) -> None:  # D1 D2 D3 D5
    run(ModelTracker, differences, pages=pages, rounds=20)


@pytest.mark.parametrize(
    ("tracker", "differences", "complaint"),
    [
        (LosesAPage, PLAIN, "pages 100 of 199 were written.* and not reported"),
        (LosesAPage, CLEARS, "pages 100 of 199 were written.* and not reported"),
        (InventsAPage, PLAIN, "pages 64 of 199 were reported, and not written since they were cleared"),
        (InventsAPage, CLEARS, "pages 64 of 199 were reported, and not written since they were cleared"),
        (ClearsTheNeighbours, PLAIN, "not reported"),
        (ClearsWhenItCollects, PLAIN, "never cleared, and not reported any more"),
        (ClearsLate, PLAIN, "written.* and not reported"),
        (CollectsInTwoSteps, CLEARS, "not reported"),
        (Forgets, PLAIN, "never cleared, and not reported any more"),
    ],
)
def test_broken_tracker_is_found_out(tracker: type[ModelTracker], differences: Differences, complaint: str) -> None:
    # D1 D2 D5 D9
    with pytest.raises(ContractError, match=rf"^round \d+: .*{complaint}"):
        run(tracker, differences)


class ModelThatIsSlowToWrite(ModelCase):
    """A store is noted, and lands later: as a page fault does it."""

    def stamp(self, pages: Numbers, place: int, stamps: Numbers) -> None:
        for page, stamp in zip(pages.tolist(), stamps.tolist(), strict=True):
            with self._bus:
                self._model.write(page)
            time.sleep(0)
            with self._bus:
                self._model.write(page)  # it may have been cleared meanwhile; then the store faults again
                self.memory.view("<u4")[page * (PAGE_SIZE // 4) + place] = stamp


def test_store_that_lands_after_it_was_reported_is_no_invention() -> None:
    bus = threading.RLock()
    case = ModelThatIsSlowToWrite(ModelTracker(PAGES, bus=bus), bus)
    with Stamps(case, PLAIN, Writing.THREADS, seed=2) as stamps:
        stamps.run(50)


class CollectsAtLeisure(ModelTracker):
    """Loses what is written meanwhile."""

    def collect(self, words: Words) -> None:
        super().collect(words)
        for _ in range(100):
            time.sleep(0)
        with self._bus:
            self._armed("collect")[:] = [PageLog.PROTECTED] * self.pages


def test_writers_stand_still_while_a_tracker_collects_that_needs_it() -> None:
    run(CollectsAtLeisure, replace(CLEARS, held_while_collecting="it is made so"), rounds=50)


def test_writers_stand_still_before_a_tracker_collects_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 0

    def stand(writers: WriterThreads) -> None:
        nonlocal held
        held += 1
        before(writers)

    before = WriterThreads.stand
    monkeypatch.setattr(WriterThreads, "stand", stand)
    run(ModelTracker, replace(PLAIN, held_before_collecting="it is made so"), rounds=20)
    assert held == 20


def test_what_a_tracker_is_blind_to_is_not_reported() -> None:
    with pytest.raises(ContractError, match="reported, though they are written where the tracker is blind"):
        run(ModelTracker, Differences(blind_to={Writing.THREADS: "it is said"}))


def test_tracker_that_is_said_to_report_everything_does() -> None:
    with pytest.raises(ContractError, match="not reported, though the tracker reports everything"):
        run(ModelTracker, Differences(reports_everything="it is said"))


def test_tracker_that_reports_more_keeps_the_other_rules() -> None:
    memory = np.zeros(PAGES * PAGE_SIZE, np.uint8)
    with Stamps(Case(NullTracker(PAGES), memory), Differences(reports_more="all"), Writing.THREADS, seed=1) as stamps:
        stamps.run(10)
    with pytest.raises(ContractError, match=r"pages 100 of 199 were written.* and not reported"):
        run(LosesAPage, Differences(reports_more="it is said"))


def test_tally_tells_what_happened() -> None:
    mechanism = MECHANISMS["write-watch"]
    require("write-watch", mechanism.failure() is None, str(mechanism.failure()))
    case = mechanism.make(1001)
    with Stamps(case, mechanism.differences, Writing.UNICORN, seed=1) as stamps:
        tally = stamps.run(100)
    case.close()

    assert tally.rounds == 100
    assert tally.reported + tally.unreported == 100 * 1001
    assert min(tally.reported, tally.unreported, tally.cleared) > 100


def test_private_memory_is_not_for_other_processes() -> None:
    case = Case(NullTracker(1), np.zeros(PAGE_SIZE, np.uint8))
    with pytest.raises(UsageError, match="other processes do not have this memory"):
        Stamps(case, PLAIN, Writing.PROCESSES, seed=1)


def test_more_rounds_than_stamps_can_tell_apart_are_refused() -> None:
    with (
        Stamps(Case(NullTracker(1), np.zeros(PAGE_SIZE, np.uint8)), PLAIN, Writing.THREADS, seed=1) as stamps,
        pytest.raises(UsageError, match="begin anew"),
    ):
        stamps.run(MOST_ROUNDS + 1)


def test_tracker_is_disarmed_and_writers_end_when_it_is_closed() -> None:
    before = threading.active_count()
    tracker = ModelTracker(PAGES)
    stamps = Stamps(ModelCase(tracker, nullcontext()), PLAIN, Writing.THREADS, seed=1)
    stamps.run(1)

    stamps.close()
    stamps.close()

    assert not tracker.armed
    assert threading.active_count() == before

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from support.require import require
from support.waiting import wait_until

from dirtylog.errors import DirtylogError, HostError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.testing import writers as subject
from dirtylog.testing.board import LAST_COUNT, STAMP_BITS, Board
from dirtylog.testing.contract import Case
from dirtylog.testing.emulated import UnicornGuest
from dirtylog.testing.kvm import KVMGuest
from dirtylog.testing.stamping_process import _LAST_COUNT
from dirtylog.testing.writers import WriterProcesses, Writers, WriterThreads, stores
from dirtylog.trackers.null import NullTracker
from dirtylog.units import PAGE_SIZE

PAGES = 100
PLACE = 7
KINDS = ["threads", "processes", "kvm", "unicorn"]


class Bench:
    """Writers of one kind, and what they write."""

    def __init__(self, kind: str, undo: ExitStack) -> None:
        self.board = undo.enter_context(closing(Board(PAGES)))
        self.mapping = undo.enter_context(closing(MemfdMapping("test", PAGES * PAGE_SIZE)))
        self.words = self.mapping.array.view("<u4").reshape(PAGES, PAGE_SIZE // 4)
        self.board.window = 10, 20
        self.board.begin(1)
        self.writers = undo.enter_context(closing(self._make(kind)))

    def _make(self, kind: str) -> Writers:
        if kind == "threads":
            case = Case(NullTracker(PAGES), self.mapping.array)
            return WriterThreads(self.board, 2, stores(case, self.board, PLACE, 1))
        if kind == "processes":
            return WriterProcesses(self.mapping.fd, self.board, PLACE, 1)
        if kind == "unicorn":
            return UnicornGuest(self.mapping.address, PAGES).stamp(self.board, PLACE, 1)
        try:
            return KVMGuest(self.mapping.address, PAGES).stamp(self.board, PLACE, 1, closes=True)
        except HostError as error:
            require("kvm", False, str(error))
            raise

    def wait_for_round(self, number: int) -> None:
        self.board.begin(number)
        self.writers.wait_until(lambda: self.board.all_are_in(number, self.writers.count), "come")

    @property
    def stamped(self) -> set[int]:
        return set(np.flatnonzero(self.words.any(axis=1)).tolist())


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with ExitStack() as undo:
        yield Bench(request.param, undo)


def test_writers_stand_still_at_first_and_when_they_are_told_to(bench: Bench) -> None:
    assert not bench.stamped
    bench.writers.resume()
    bench.wait_for_round(2)
    for _ in range(20):
        with bench.writers.held():
            before = bench.words.copy()
            bench.board.begin(3)
            assert (bench.words == before).all()
    bench.wait_for_round(4)


def test_writers_stamp_the_pages_of_the_window_with_the_round(bench: Bench) -> None:
    bench.writers.resume()
    wait_until(lambda: bench.stamped == set(range(10, 30)), "every page was stamped")
    bench.wait_for_round(2)
    bench.board.window = 60, 45
    wait_until(lambda: bench.stamped == {*range(5), *range(10, 30), *range(60, 100)}, "the window moved")
    bench.writers.stand()

    stamps = bench.words[:, PLACE : PLACE + bench.writers.count]
    assert set((stamps[60:] >> STAMP_BITS).ravel().tolist()) <= {0, 2}  # not each page by each writer
    assert not np.delete(bench.words, range(PLACE, PLACE + bench.writers.count), axis=1).any()


def test_writer_that_has_noted_a_round_stores_nothing_older(bench: Bench) -> None:
    bench.writers.resume()
    for number in range(2, 100):
        bench.wait_for_round(number)
        bench.words[:] = 0
        bench.board.window = number % 50, 50
        wait_until(lambda: bool(bench.words.any()), "something was stored")
        stamps = bench.words[bench.words != 0]
        assert (stamps >> STAMP_BITS == number).all()


def test_writers_that_count_to_the_end_stay_there(bench: Bench) -> None:
    bench.board.window = 0, 1
    bench.writers.resume()
    bench.wait_for_round(2)
    wait_until(lambda: (bench.words[0, PLACE] & LAST_COUNT) > 1000, "it counted")
    assert bench.words[0, PLACE] >> STAMP_BITS == 2
    assert _LAST_COUNT == LAST_COUNT


def test_writers_end_once(bench: Bench) -> None:
    bench.writers.resume()
    bench.writers.close()
    before = bench.words.copy()
    bench.writers.close()
    assert (bench.words == before).all()


def test_what_ends_a_thread_is_raised_by_its_owner() -> None:
    def fail(writer: int) -> None:
        raise DirtylogError(f"writer {writer} had enough")

    with closing(Board(PAGES)) as board, closing(WriterThreads(board, 1, fail)) as writers:
        writers.resume()
        with pytest.raises(DirtylogError, match="writer 0 had enough"):
            writers.wait_until(lambda: False, "come")
        with pytest.raises(DirtylogError, match="writer 0 had enough"):
            writers.stand()
        with pytest.raises(DirtylogError, match="writer 0 had enough"):
            writers.resume()


def test_process_that_is_gone_is_missed() -> None:
    with ExitStack() as undo:
        bench = Bench("processes", undo)
        bench.writers.resume()
        assert isinstance(bench.writers, WriterProcesses)
        os.kill(bench.writers.pids[0], signal.SIGKILL)
        with pytest.raises(HostError, match="ended with status -9"):
            bench.writers.wait_until(lambda: False, "come")


def test_writers_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BOUND", 0.01)
    with ExitStack() as undo:
        bench = Bench("processes", undo)
        with pytest.raises(HostError, match=r"writers did not come to round 2 within 0 s"):
            bench.writers.wait_until(lambda: False, "come to round 2")


def test_thread_that_does_not_stand_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BOUND", 0.01)
    stop: list[bool] = []

    def go_on(writer: int) -> None:
        wait_until(lambda: stop, "it was told to")

    with closing(Board(PAGES)) as board, closing(WriterThreads(board, 1, go_on)) as writers:
        writers.resume()
        with pytest.raises(HostError, match="did not stand still"):
            writers.stand()
        stop.append(True)
        monkeypatch.setattr(subject, "BOUND", 60.0)

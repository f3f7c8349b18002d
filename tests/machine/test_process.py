import mmap
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from support.own_memory import require_soft_dirty, require_write_watch
from support.waiting import Task, wait_until

from dirtylog.errors import DirtylogError, UsageError
from dirtylog.machine import Process, RunState
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Slowdown,
    parse_address,
)
from dirtylog.trackers.own_memory import TRACKERS
from dirtylog.units import PAGE_SIZE

_PAGES = 200


class Counting:
    """A thread that adds 1 to every page of a buffer in order, for ever, and writes a page of one that it made itself.

    Attributes:
        done: how many pages it has written.
    """

    def __init__(self, tracker: str = "comparison", loads: bool = True) -> None:
        self.done = 0
        self.calls: list[str] = []
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self.own = memoryview(mmap.mmap(-1, 2 * PAGE_SIZE))
        self.process = Process(
            {"pages": _PAGES * PAGE_SIZE - 1, "own": self.own},
            resume=self.resume,
            pause=self.pause,
            save=lambda: self.done.to_bytes(8, "little"),
            load=self.load if loads else None,
            tracker=tracker,
        )
        self.pages = self.process.array("pages", (_PAGES, PAGE_SIZE // 8), np.uint64)

    def resume(self) -> None:
        self.calls.append("resume")
        self._halt.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pause(self) -> None:
        self.calls.append("pause")
        self._halt.set()
        assert self._thread is not None
        self._thread.join()

    def load(self, state: bytes) -> None:
        self.calls.append("load")
        self.done = int.from_bytes(state, "little")

    def _run(self) -> None:
        while not self._halt.wait(0.0005):
            for _ in range(20):
                self.pages[self.done % _PAGES, 7] += 1
                self.own[PAGE_SIZE] = self.done % 251
                self.done += 1

    def check(self) -> None:
        rounds, rest = divmod(self.done, _PAGES)
        assert self.pages[:, 7].tolist() == [rounds + 1] * rest + [rounds] * (_PAGES - rest)
        assert self.own[PAGE_SIZE] == (self.done - 1) % 251


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _counting(stack: ExitStack, tracker: str = "comparison") -> Counting:
    counting = Counting(tracker)
    stack.callback(counting.process.close)
    return counting


def _move(source: Process, destination: Process, path: Path, parameters: Parameters) -> OutgoingMigration:
    address = parse_address(f"unix:{path}")
    incoming = Task(IncomingMigration(destination, Listener(address)).run)
    outgoing = OutgoingMigration(source, address, parameters)
    outgoing.run()
    incoming.join()
    return outgoing


@pytest.mark.parametrize("tracker", TRACKERS)
def test_writers_that_are_moved_lose_no_write(stack: ExitStack, tmp_path: Path, tracker: str) -> None:  # D1
    if tracker == "write-watch":
        require_write_watch()
    elif tracker == "soft-dirty":
        require_soft_dirty()
    source, destination = _counting(stack, tracker), _counting(stack, tracker)
    source.process.resume()
    wait_until(lambda: source.done > 2 * _PAGES, "the writer is under way")
    _move(source.process, destination.process, tmp_path / "moved", Parameters(downtime_limit=5.0))
    moved = source.done
    assert (source.process.state, destination.process.state) == (RunState.POSTMIGRATE, RunState.RUNNING)
    assert destination.calls == ["load", "resume"]
    wait_until(lambda: destination.done > moved + 2 * _PAGES, "the writer goes on")
    destination.process.pause()
    destination.check()
    source.check()
    assert source.done == moved


def test_shared_memory_is_the_destinations_afterwards(stack: ExitStack, tmp_path: Path) -> None:
    sides = [
        Process({"cells": 3 * PAGE_SIZE}, resume=lambda: None, pause=lambda: None, tracker="comparison")
        for _ in range(2)
    ]
    for side in sides:
        stack.callback(side.close)
    before, after = (side.array("cells", 3 * PAGE_SIZE, np.uint8) for side in sides)
    before[:] = 7
    outgoing = _move(sides[0], sides[1], tmp_path / "moved", Parameters(share_memory=True))
    assert after.tolist() == [7] * after.size
    assert not before.any()
    assert outgoing.statistics.bytes == 0


def test_memory_of_the_callers_cannot_be_shared(stack: ExitStack, tmp_path: Path) -> None:
    source = _counting(stack)
    with pytest.raises(UsageError, match="of 2 blocks of memory 1 can be shared by descriptor"):
        OutgoingMigration(source.process, parse_address(f"unix:{tmp_path}/x"), Parameters(share_memory=True))


def test_state_that_is_refused_leaves_the_writers_where_they_are(stack: ExitStack, tmp_path: Path) -> None:
    source, destination = _counting(stack), _counting(stack)

    def refuse(_: bytes) -> None:
        raise UsageError("not mine")

    destination.process._load = refuse
    source.process.resume()
    address = parse_address(f"unix:{tmp_path}/x")
    incoming = Task(IncomingMigration(destination.process, Listener(address)).run)
    with pytest.raises(DirtylogError, match="not mine"):
        OutgoingMigration(source.process, address, Parameters()).run()
    with pytest.raises(UsageError, match="not mine"):
        incoming.join()
    assert source.process.state is RunState.RUNNING
    assert "resume" not in destination.calls


@pytest.mark.parametrize(
    "state", [{}, {"process": {}}, {"cpu0": {"state": b""}}, {"process": {"state": b"", "x": b""}}]
)
def test_state_of_another_machine_is_refused(stack: ExitStack, state: dict[str, dict[str, bytes]]) -> None:
    counting = _counting(stack)
    with pytest.raises(UsageError, match="not the state of a process"):
        counting.process.load_state(state)


def test_state_of_writers_at_work_is_refused(stack: ExitStack) -> None:
    counting = _counting(stack)
    counting.process.resume()
    with pytest.raises(UsageError, match="pause it first"):
        counting.process.save_state()


def test_process_without_state_has_an_empty_one() -> None:
    with closing(Process({"a": 1}, resume=lambda: None, pause=lambda: None, tracker="null")) as process:
        assert process.save_state() == {"process": {"state": b""}}
        process.load_state({"process": {"state": b"whatever"}})


def test_writers_that_are_held_stand_still_and_write_on(stack: ExitStack) -> None:
    counting = _counting(stack)
    counting.process.resume()
    with counting.process._held(), counting.process._held():
        assert counting.calls == ["resume", "pause"]
        assert counting.process.state is RunState.RUNNING
    assert counting.calls == ["resume", "pause", "resume"]


def test_writers_that_stand_still_are_held_as_they_are(stack: ExitStack) -> None:
    counting = _counting(stack)
    with counting.process._held():
        pass
    assert counting.calls == []


def test_close_stops_the_writers_once() -> None:
    counting = Counting()
    counting.process.resume()
    wait_until(lambda: counting.done, "the writer is under way")
    for _ in range(2):
        counting.process.close()
    assert counting.calls == ["resume", "pause"]
    counting.check()


def test_auto_converge_is_refused_before_anything_starts(stack: ExitStack, tmp_path: Path) -> None:
    counting = _counting(stack)
    with pytest.raises(UsageError, match="cannot be slowed down"):
        OutgoingMigration(
            counting.process, parse_address(f"unix:{tmp_path}/x"), Parameters(slowdown=Slowdown.AUTO_CONVERGE)
        )
    with pytest.raises(UsageError, match="cannot be slowed down"):
        counting.process.throttle(0.5)


@pytest.mark.parametrize(
    ("buffers", "tracker", "reason"),
    [
        ({}, "null", "without buffers"),
        ({"a": 0}, "null", "not a positive whole number"),
        ({"a": PAGE_SIZE}, "kvm", "no tracker 'kvm'"),
        ({"a": memoryview(bytearray(100))}, "null", "not whole 4096-byte pages"),
        ({"a": memoryview(bytes(PAGE_SIZE))}, "null", "read-only"),
    ],
)
def test_bad_buffers_are_refused(buffers: dict[str, int | memoryview], tracker: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Process(buffers, resume=lambda: None, pause=lambda: None, tracker=tracker)


@pytest.mark.parametrize(
    ("name", "shape", "reason"), [("b", 1, "no buffer 'b'"), ("a", 513, "does not fit"), ("a", (0, 4), "does not fit")]
)
def test_array_that_is_not_there_is_refused(name: str, shape: int | tuple[int, ...], reason: str) -> None:
    with (
        closing(Process({"a": 100}, resume=lambda: None, pause=lambda: None, tracker="null")) as process,
        pytest.raises(UsageError, match=reason),
    ):
        process.array(name, shape)

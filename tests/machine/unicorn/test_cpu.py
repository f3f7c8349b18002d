import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.waiting import wait_until

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.unicorn import cpu as module
from dirtylog.machine.unicorn.cpu import EmulatedCPU


class FakeEngine:
    """Counts its slices; does in one what a test wants."""

    def __init__(self) -> None:
        self.slices = 0
        self.ended_soon = 0
        self.halts = False
        self.todo: list[Any] = []

    def run(self) -> bool:
        self.slices += 1
        if self.todo:
            self.todo.pop()()
        return self.halts

    def end_soon(self) -> None:
        self.ended_soon += 1


class Bench:
    """A processor with a fake engine."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.prepared = 0
        self.ended: list[DirtylogError] = []
        self.cpu = EmulatedCPU("vcpu", self._prepare, self.ended.append)

    def _prepare(self) -> Any:
        self.prepared += 1
        return self.engine

    def wait_for_slices(self, more: int = 2) -> None:
        wanted = self.engine.slices + more
        wait_until(lambda: self.engine.slices >= wanted, "it ran on")

    def park(self) -> None:
        self.cpu.request_park()
        self.cpu.wait_parked()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.cpu.close()


def test_it_runs_when_told_and_stands_still_when_told(bench: Bench) -> None:
    assert bench.engine.slices == 0
    bench.cpu.run()
    bench.wait_for_slices()
    bench.park()
    before = bench.engine.slices
    bench.cpu.wait_parked()
    assert bench.engine.slices == before


def test_it_prepares_once_as_long_as_nothing_changes(bench: Bench) -> None:
    bench.cpu.run()
    bench.wait_for_slices(20)
    bench.park()
    assert bench.prepared == 1


def test_refresh_has_it_prepare_anew(bench: Bench) -> None:
    bench.cpu.run()
    bench.wait_for_slices()
    bench.cpu.refresh()
    wait_until(lambda: bench.prepared == 2, "it prepared anew")
    bench.wait_for_slices()


def test_it_stays_out_while_it_is_held(bench: Bench) -> None:
    bench.cpu.run()
    bench.wait_for_slices()
    with bench.cpu.held():
        before = bench.engine.slices
        with bench.cpu.held():
            pass
        assert bench.engine.slices == before
    bench.wait_for_slices()


def test_held_processor_can_be_parked(bench: Bench) -> None:
    bench.cpu.run()
    bench.wait_for_slices()
    with bench.cpu.held():
        bench.park()


def test_halted_processor_does_not_run_until_told_again(bench: Bench) -> None:
    bench.engine.halts = True
    bench.cpu.run()
    wait_until(lambda: bench.engine.slices == 1, "it ran")
    bench.cpu.refresh()
    bench.park()
    assert bench.engine.slices == 1
    bench.cpu.run()
    wait_until(lambda: bench.engine.slices == 2, "it looked again")


def test_what_ends_the_guest_is_told_when_it_stands_still(bench: Bench) -> None:
    def fail() -> None:
        raise HostError("broken")

    bench.engine.todo.append(fail)
    bench.cpu.run()
    wait_until(lambda: bool(bench.ended), "it was told")
    bench.cpu.wait_parked()
    assert str(bench.ended[0]) == "broken"
    assert bench.cpu.failure is bench.ended[0]


def test_in_a_callback_it_is_outside_and_ends_soon_if_something_changed(bench: Bench) -> None:
    entered, go = threading.Event(), threading.Event()

    def call() -> None:
        with bench.cpu.callback():
            entered.set()
            assert go.wait(5)

    bench.engine.todo.append(call)
    bench.cpu.run()
    assert entered.wait(5)
    assert bench.cpu.in_callback
    bench.cpu.refresh()  # returns, though the callback does not
    with bench.cpu.held():
        go.set()
    wait_until(lambda: bench.engine.ended_soon == 1, "it was asked to end")
    wait_until(lambda: bench.prepared == 2, "it prepared anew")


def test_callback_may_ask_for_what_it_would_have_to_wait_for(bench: Bench) -> None:
    done = threading.Event()

    def call() -> None:
        with bench.cpu.callback():
            bench.cpu.refresh()
            with bench.cpu.held():
                pass
            done.set()

    bench.engine.todo.append(call)
    bench.cpu.run()
    assert done.wait(5)
    wait_until(lambda: bench.prepared == 2, "it prepared anew")


def test_one_that_does_not_stop_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    bench.engine.todo.append(go.wait)
    bench.cpu.run()
    wait_until(lambda: bench.engine.slices == 1, "it runs")
    monkeypatch.setattr(module, "PARK_TIMEOUT", 0.01)
    with pytest.raises(HostError, match="vcpu did not stop"):
        bench.park()
    go.set()


def test_close_is_idempotent_and_final(bench: Bench) -> None:
    bench.cpu.run()
    bench.cpu.close()
    bench.cpu.close()
    bench.cpu.run()
    before = bench.engine.slices
    bench.cpu.wait_parked()
    assert bench.engine.slices == before

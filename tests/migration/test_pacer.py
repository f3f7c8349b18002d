import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.errors import CancelledError
from dirtylog.migration import pacer as pacer_module
from dirtylog.migration.pacer import Pacer


class _Clock(threading.Event):
    """Time that passes only by waiting, and an event that nobody sets."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout >= 0
        self.now += timeout
        return self.is_set()


class _Paced(Pacer):
    """A pacer whose rate is said with each piece."""

    def __init__(self, cancelled: threading.Event) -> None:
        super().__init__(lambda seconds: cancelled.wait(seconds), lambda: self.rate)
        self.rate = 0
        self.begin()

    def send(self, size: int, rate: int) -> None:
        self.rate = rate
        self.pace(size)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(pacer_module, "time", clock)
    return clock


def test_sender_without_a_limit_never_waits(clock: _Clock) -> None:
    pacer = _Paced(clock)
    for _ in range(10):
        pacer.send(1 << 30, 0)
    assert clock.now == 1000.0


def test_sender_takes_as_long_as_its_rate_says(clock: _Clock) -> None:
    pacer = _Paced(clock)
    for _ in range(10):
        pacer.send(100, 1000)
    assert clock.now == pytest.approx(1001.0)


def test_time_that_sending_took_counts(clock: _Clock) -> None:
    pacer = _Paced(clock)
    for _ in range(10):
        clock.now += 0.05
        pacer.send(100, 1000)
    assert clock.now == pytest.approx(1001.0)


def test_wait_that_took_too_long_is_made_up_for(clock: _Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def oversleep(timeout: float | None = None) -> bool:
        assert timeout is not None
        clock.now += timeout + (0.005 if timeout else 0)
        return False

    monkeypatch.setattr(clock, "wait", oversleep)
    pacer = _Paced(clock)
    for _ in range(100):
        pacer.send(100, 1000)
    assert clock.now == pytest.approx(1010.0, abs=0.02)


def test_wait_that_took_very_long_is_made_up_for_by_a_slice_at_most(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = _Paced(clock)
    wait = clock.wait

    def suspended(timeout: float | None = None) -> bool:
        clock.now += 60
        return wait(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(clock, "wait", suspended)
        pacer.send(10, 1000)
    before = clock.now
    pacer.send(1000, 1000)
    assert clock.now == pytest.approx(before + 0.9)


def test_idle_time_is_not_made_up_for(clock: _Clock) -> None:
    pacer = _Paced(clock)
    pacer.send(1, 1000)
    clock.now += 60
    pacer.rate = 1000
    pacer.begin()
    before = clock.now
    pacer.send(1000, 1000)
    assert clock.now == pytest.approx(before + 1)


def test_new_rate_counts_from_the_next_piece_on(clock: _Clock) -> None:
    pacer = _Paced(clock)
    pacer.send(100, 100)
    pacer.send(100, 1000)
    assert clock.now == pytest.approx(1001.1)
    pacer.send(100, 0)
    assert clock.now == pytest.approx(1001.1)


@pytest.mark.parametrize("rate", [0, 1])
def test_cancelled_sender_is_told_without_waiting(rate: int) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        _Paced(cancelled).send(1 << 40, rate)


@given(st.lists(st.integers(1, 1 << 22), min_size=1, max_size=20), st.integers(1 << 20, 1 << 30))
def test_no_sequence_of_pieces_exceeds_the_rate(sizes: list[int], rate: int) -> None:
    clock = _Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pacer_module, "time", clock)
        pacer = _Paced(clock)
        for size in sizes:
            pacer.send(size, rate)
    assert clock.now - 1000.0 == pytest.approx(sum(sizes) / rate, rel=1e-6, abs=1e-6)


def test_rate_that_is_raised_shortens_the_wait_under_way(clock: _Clock) -> None:
    rates = iter([10, *[10] * 5, *[1000] * 100])
    Pacer(clock.wait, lambda: next(rates)).pace(100)
    assert clock.now < 1000.0 + 1.0  # and not 10 seconds


def test_limit_that_is_lifted_ends_the_wait_under_way(clock: _Clock) -> None:
    rates = iter([1, 1, 1, 0])
    Pacer(clock.wait, lambda: next(rates)).pace(1 << 20)
    assert clock.now < 1000.0 + 1.0

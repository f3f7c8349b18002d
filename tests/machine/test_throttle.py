import threading
from collections.abc import Callable

import pytest

from dirtylog.machine import throttle as module
from dirtylog.machine.throttle import SLICE, Slices, Throttle

SHARES = [0.2, 0.5, 0.9, 0.99]


class Clock:
    """A clock that moves only when something takes time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Waits(threading.Condition):
    """A condition in whose waits the clock moves on to their ends, after what the test does meanwhile."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.meanwhile: Callable[[], float | None] = lambda: None
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        woken = self.meanwhile()
        self._clock.now += timeout if woken is None else woken
        self.waits.append(timeout)
        return woken is not None


class Stand:
    """A throttle, and the thread that obeys it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module, "time", self.clock)
        self.changed = Waits(self.clock)
        self.wanted = True
        self.throttle = Throttle(self.changed, lambda: self.wanted)

    def run(self, seconds: float) -> None:
        """The vCPU is in the guest for some time, and then looks whether it is to rest."""
        self.clock.now += seconds
        self.throttle.rest()


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(monkeypatch)


@pytest.mark.parametrize(("percent", "milliseconds"), [(1, 10 / 99), (20, 2.5), (50, 10), (90, 90), (99, 990)])
def test_rest_after_a_slice_is_what_qemu_takes(percent: int, milliseconds: float) -> None:
    slices = Slices()
    slices.share = percent / 100
    assert slices.rest == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize("share", SHARES)
def test_vcpu_that_comes_out_at_each_slices_end_loses_the_share(stand: Stand, share: float) -> None:
    stand.throttle.set(share)
    began = stand.clock.now
    for _ in range(100):
        stand.run(stand.throttle.left + 1e-9)
    assert len(stand.changed.waits) == 100
    assert sum(stand.changed.waits) / (stand.clock.now - began) == pytest.approx(share, abs=1e-4)


def test_vcpu_that_comes_out_in_between_runs_its_slice_to_the_end(stand: Stand) -> None:
    stand.throttle.set(0.5)
    for _ in range(9):
        stand.run(SLICE / 9.5)
    assert stand.changed.waits == []
    stand.run(SLICE / 9.5)
    assert stand.changed.waits == [pytest.approx(SLICE)]


def test_lateness_makes_slices_longer_and_not_rests(stand: Stand) -> None:
    stand.throttle.set(0.5)
    for _ in range(10):
        stand.run(10 * SLICE)
    assert stand.changed.waits == [pytest.approx(SLICE)] * 10


def test_vcpu_without_a_throttle_never_rests(stand: Stand) -> None:
    stand.run(1e6)
    stand.throttle.set(0.9)
    stand.throttle.set(0.0)
    stand.run(1e6)
    assert stand.changed.waits == []


def test_new_throttle_begins_with_a_slice(stand: Stand) -> None:
    stand.clock.now += 1e6
    stand.throttle.set(0.9)
    assert stand.throttle.left == pytest.approx(SLICE)


@pytest.mark.parametrize(("share", "left"), [(0.0, 0.0), (0.5, 0.0), (0.95, 0.1)])
def test_change_reaches_a_vcpu_that_rests(stand: Stand, share: float, left: float) -> None:
    def change() -> float | None:
        stand.changed.meanwhile = lambda: None
        stand.throttle.set(share)
        return 0.09

    stand.throttle.set(0.99)
    stand.changed.meanwhile = change
    stand.run(SLICE)
    assert stand.changed.waits == pytest.approx([0.99] + [left] * bool(left))


def test_stop_ends_a_rest(stand: Stand) -> None:
    def stop() -> float:
        stand.wanted = False
        return 0.0

    stand.throttle.set(0.99)
    stand.changed.meanwhile = stop
    before = stand.clock.now
    stand.run(SLICE)
    assert stand.clock.now == pytest.approx(before + SLICE)
    stand.run(SLICE)  # and there is none while it is to stop
    assert len(stand.changed.waits) == 1


def test_slice_is_over_in_the_midst_of_a_rest_only_after_it(stand: Stand) -> None:
    left: list[float] = []

    def look() -> None:
        left.append(stand.throttle.left)

    stand.throttle.set(0.9)
    stand.changed.meanwhile = look
    stand.run(SLICE)
    assert left == [pytest.approx(10 * SLICE)]


def test_other_time_outside_counts_to_no_slice(stand: Stand) -> None:
    stand.throttle.set(0.5)
    stand.clock.now += SLICE / 2
    stand.throttle.stand_still(lambda: 7 * SLICE)
    assert stand.throttle.left == pytest.approx(SLICE)


@pytest.mark.parametrize(("later", "stood"), [(9.0, 4.0), (4.0, 4.0), (2.5, 2.5), (1.0, 1.0), (0.0, 1.0)])
def test_time_to_stand_still_may_become_shorter_meanwhile_and_not_longer(
    stand: Stand, later: float, stood: float
) -> None:
    seconds = [4.0]

    def change() -> float | None:
        stand.changed.meanwhile = lambda: None
        seconds[0] = later
        stand.throttle.look_again()
        return 1.0

    stand.changed.meanwhile = change
    began = stand.clock.now
    stand.throttle.stand_still(lambda: seconds[0])
    assert stand.clock.now == pytest.approx(began + stood)


def test_vcpu_that_is_to_stop_does_not_stand_still_before(stand: Stand) -> None:
    stand.wanted = False
    stand.throttle.stand_still(lambda: 4.0)
    assert stand.changed.waits == []

from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.fake_machine import FakeMachine
from support.streams import fake_machine

from dirtylog.errors import UsageError
from dirtylog.migration import Parameters, Slowdown, Statistics
from dirtylog.migration import governor as module
from dirtylog.migration.convergence import ThrottleParameters
from dirtylog.migration.governor import PERIOD, Governor
from dirtylog.migration.switchover import Estimate
from dirtylog.units import MIB, PAGE_SIZE

_BANDWIDTH = 64 * MIB


class Clock:
    """A clock that moves when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Migration:
    """Passes of a second each, over a link of `_BANDWIDTH`."""

    def __init__(self, machine: FakeMachine, clock: Clock, slowdown: Slowdown) -> None:
        self.machine, self.clock = machine, clock
        self.statistics = Statistics()
        self.parameters = Parameters(slowdown=slowdown)
        self.governor = Governor(machine, self.statistics, slowdown)

    def passes(self, *dirtied: float, seconds: float = PERIOD + 0.1) -> list[float]:
        """Shares of what was sent that were dirtied in each pass; how much is taken from the guest after each."""
        throttled = []
        for share in dirtied:
            one = self.statistics.begin_pass()
            self.clock.now += seconds
            one.seconds, one.bandwidth = seconds, float(_BANDWIDTH)
            one.bytes = int(_BANDWIDTH * seconds)
            one.dirtied = int(one.bytes * share) // PAGE_SIZE
            self.governor.judge(Estimate(one.dirtied, _BANDWIDTH), self.parameters)
            self.governor.slow_down(self.parameters)
            throttled.append(self.machine.throttled)
        return throttled


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    with fake_machine() as machine:
        machine.can_limit = True
        yield machine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_guest_is_throttled_step_by_step_and_is_free_afterwards(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.AUTO_CONVERGE)
    with migration.governor:
        assert migration.passes(1.0, 1.0, 0.4, 1.0, 1.0) == [0.0, 0.2, 0.2, 0.2, 0.3]
        assert migration.statistics.throttle == 30
        assert [one.throttle for one in migration.statistics.passes] == [0, 0, 20, 20, 20]
    assert (machine.throttled, migration.statistics.throttle) == (0.0, 0)
    assert machine.limits == []


def test_guest_is_free_after_an_error(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.AUTO_CONVERGE)

    def fail() -> None:
        with migration.governor:
            assert migration.passes(1.0, 1.0)[-1] > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (machine.throttled, migration.statistics.throttle) == (0.0, 0)


def test_short_passes_are_looked_at_together(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.AUTO_CONVERGE)
    with migration.governor:
        # Three passes a period. In the first one too much is dirtied in one of them, and on the whole not.
        assert not any(migration.passes(1.0, 0.1, 0.1, seconds=PERIOD / 2.5))
        assert not any(migration.passes(1.0, 0.1, 0.9, seconds=PERIOD / 2.5))
        assert migration.passes(0.9, 0.9, 0.9, seconds=PERIOD / 2.5) == [0.0, 0.0, 0.2]


def test_parameters_count_from_the_next_decision_on(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.AUTO_CONVERGE)
    with migration.governor:
        migration.passes(1.0, 1.0)
        migration.parameters = replace(
            migration.parameters, throttle=ThrottleParameters(increment=50, maximum=60, initial=10)
        )
        assert migration.passes(1.0, 1.0) == [0.2, 0.6]
        migration.parameters = replace(
            migration.parameters, throttle=ThrottleParameters(initial=10, maximum=15, trigger=100)
        )
        assert migration.passes(1.0) == [0.15]


def test_nothing_is_done_about_a_guest_unless_asked_for(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.NONE)
    machine.throttle(0.5)  # somebody else's
    with migration.governor:
        assert migration.passes(*[1.0] * 10) == [0.5] * 10
    assert (machine.throttled, machine.limits) == (0.5, [])


def test_writers_are_limited_after_two_periods_and_not_afterwards(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.DIRTY_LIMIT)
    migration.parameters = replace(migration.parameters, vcpu_dirty_limit=7, dirty_limit_period=0.5)
    with migration.governor:
        migration.passes(1.0)
        assert machine.limits == []
        migration.passes(1.0, 0.1, 1.0, 1.0)
        assert machine.limits == [(7, 0.5)]
        migration.parameters = replace(migration.parameters, vcpu_dirty_limit=3)
        migration.passes(0.1)
        assert machine.limits == [(7, 0.5), (3, 0.5)]
    assert machine.limits[2:] == [(0, 1.0)]
    assert machine.throttled == 0


def test_machine_that_cannot_limit_writers_is_refused_before_anything_starts(
    machine: FakeMachine, clock: Clock
) -> None:
    machine.can_limit = False
    with pytest.raises(UsageError, match="does not know which vCPU writes"):
        Migration(machine, clock, Slowdown.DIRTY_LIMIT)
    Migration(machine, clock, Slowdown.AUTO_CONVERGE)


def test_guest_that_never_converges_is_called_so_within_three_passes(machine: FakeMachine, clock: Clock) -> None:
    migration = Migration(machine, clock, Slowdown.NONE)
    with migration.governor:
        migration.passes(1.0, 1.0, 1.0)
    verdict = migration.statistics.verdict
    assert verdict is not None
    assert verdict.converges is False
    assert verdict.needed_limit == pytest.approx((PERIOD + 0.1) / 0.9, rel=0.01)

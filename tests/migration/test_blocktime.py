from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.migration import blocktime as blocktime_module
from dirtylog.migration.blocktime import Blocktime

_HOST = 7
"""A thread that is no vCPU's."""


class Clock:
    """Stands still, but where a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(blocktime_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_nobody_waited() -> None:
    blocktime = Blocktime([10])
    assert (blocktime.requests, blocktime.mean, blocktime.quantile(0.5), blocktime.blocked) == (0, 0, 0, 0)
    assert blocktime.vcpu_blocked == [0.0]
    assert list(blocktime.latencies) == []


def test_vcpu_waits_until_its_page_is_there(clock: Clock) -> None:
    blocktime = Blocktime([10, 11])
    blocktime.begin(0, 5, 11, clock.now)
    clock.now += 2
    blocktime.end(0, 4)  # nobody waits for it
    blocktime.end(1, 5)
    clock.now += 1
    blocktime.end(0, 5)
    clock.now += 1
    blocktime.end(0, 5)
    assert blocktime.requests == 1
    assert list(blocktime.latencies) == [3.0]
    assert blocktime.vcpu_blocked == [0.0, 3.0]
    assert blocktime.blocked == 0.0


def test_guest_is_blocked_while_all_its_vcpus_wait(clock: Clock) -> None:
    blocktime = Blocktime([10, 11])
    blocktime.begin(0, 1, 10, clock.now)
    clock.now += 1
    blocktime.begin(0, 2, 11, clock.now)
    clock.now += 2
    blocktime.end(0, 1)
    clock.now += 4
    blocktime.end(0, 2)
    assert blocktime.blocked == 2.0
    assert blocktime.vcpu_blocked == [3.0, 6.0]


def test_vcpu_that_goes_on_to_another_page_before_the_first_is_noted_waits_on(clock: Clock) -> None:
    blocktime = Blocktime([10])
    blocktime.begin(0, 1, 10, clock.now)
    clock.now += 1
    blocktime.begin(0, 2, 10, clock.now)
    clock.now += 1
    blocktime.end(0, 1)
    clock.now += 8
    blocktime.end(0, 2)
    assert list(blocktime.latencies) == [2.0, 9.0]
    assert blocktime.vcpu_blocked == [10.0]
    assert blocktime.blocked == 10.0


def test_page_that_several_wait_for_ends_the_waiting_of_all(clock: Clock) -> None:
    blocktime = Blocktime([10, 11])
    blocktime.begin(0, 1, 10, clock.now)
    clock.now += 1
    blocktime.begin(0, 1, 11, clock.now)
    blocktime.begin(0, 1, _HOST, clock.now)
    clock.now += 1
    blocktime.end(0, 1)
    assert blocktime.requests == 3
    assert sorted(blocktime.latencies) == [1.0, 1.0, 2.0]
    assert blocktime.vcpu_blocked == [2.0, 1.0]
    assert blocktime.blocked == 1.0


def test_vcpu_that_faults_again_on_the_page_it_waits_for_waits_once(clock: Clock) -> None:
    """A signal wakes who waits in the kernel, and touches the page anew."""
    blocktime = Blocktime([10])
    blocktime.begin(0, 1, 10, clock.now)
    clock.now += 1
    blocktime.begin(0, 1, 10, clock.now)
    clock.now += 1
    blocktime.end(0, 1)
    assert blocktime.requests == 1
    assert list(blocktime.latencies) == [2.0]
    assert (blocktime.vcpu_blocked, blocktime.blocked) == ([2.0], 2.0)


def test_others_than_vcpus_count_as_requests_only(clock: Clock) -> None:
    blocktime = Blocktime([10])
    blocktime.begin(0, 1, _HOST, clock.now)
    clock.now += 5
    blocktime.end(0, 1)
    assert (blocktime.requests, list(blocktime.latencies)) == (1, [5.0])
    assert (blocktime.vcpu_blocked, blocktime.blocked) == ([0.0], 0.0)


def test_machine_without_vcpus_is_never_blocked(clock: Clock) -> None:
    blocktime = Blocktime(())
    blocktime.begin(0, 1, 0, clock.now)
    clock.now += 1
    blocktime.end(0, 1)
    assert (blocktime.vcpu_blocked, blocktime.blocked) == ([], 0.0)


def test_latencies_that_are_kept_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocktime_module, "_MOST_LATENCIES", 3)
    blocktime = Blocktime([10])
    for page in range(5):
        blocktime.begin(0, page, 10, clock.now)
        clock.now += 1
        blocktime.end(0, page)
    assert (len(blocktime.latencies), blocktime.requests, blocktime.vcpu_blocked) == (3, 5, [5.0])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_exceeded_by_no_more_than_the_rest(seconds: list[float], share: float) -> None:
    blocktime = Blocktime(())
    blocktime.latencies.extend(seconds)
    quantile = blocktime.quantile(share)
    assert quantile in seconds
    assert sum(one <= quantile for one in seconds) >= share * len(seconds)
    assert blocktime.mean == pytest.approx(sum(seconds) / len(seconds))

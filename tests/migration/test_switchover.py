import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.migration.switchover import MARGIN, Estimate, link_bandwidth, should_switch_over
from dirtylog.units import GIB, PAGE_SIZE

_pages = st.integers(0, 1 << 30)
_bandwidths = st.floats(1.0, 1e12)
_seconds = st.floats(0.0, 1e4)


def test_downtime_is_pages_over_bandwidth_plus_what_is_fixed() -> None:
    assert Estimate(GIB // PAGE_SIZE, GIB, 0.25).downtime == 1.25


def test_unknown_link_with_pages_left_takes_for_ever() -> None:
    assert Estimate(1, 0.0).downtime == math.inf
    assert not should_switch_over(Estimate(1, 0.0), 2000.0)


def test_nothing_left_takes_only_what_is_fixed() -> None:
    assert Estimate(0, 0.0, 0.01).downtime == 0.01


@pytest.mark.parametrize("limit", [0.0, 0.001, 2000.0])
def test_guest_with_nothing_left_to_send_is_stopped_whatever_the_limit(limit: float) -> None:
    assert should_switch_over(Estimate(0, 0.0, 10.0), limit)


def test_limit_of_zero_waits_until_nothing_is_left() -> None:
    assert not should_switch_over(Estimate(1, 1e12), 0.0)


def test_guest_is_stopped_as_soon_as_the_estimate_leaves_the_margin() -> None:
    limit = 0.3
    fits = int(limit * MARGIN * GIB / PAGE_SIZE)
    assert should_switch_over(Estimate(fits, GIB), limit)
    assert not should_switch_over(Estimate(fits + 1, GIB), limit)


@given(_pages, _bandwidths, _seconds, _seconds)
def test_guest_that_is_stopped_stands_still_no_longer_than_the_limit(
    pages: int, bandwidth: float, fixed: float, limit: float
) -> None:
    estimate = Estimate(pages, bandwidth, fixed)
    if pages and should_switch_over(estimate, limit):
        assert estimate.downtime <= limit


@given(_pages, st.integers(0, 1 << 20), _bandwidths, st.floats(1.0, 100.0), _seconds)
def test_fewer_pages_or_a_faster_link_never_delay_the_switchover(
    pages: int, more: int, bandwidth: float, faster: float, limit: float
) -> None:
    if should_switch_over(Estimate(pages + more, bandwidth), limit):
        assert should_switch_over(Estimate(pages, bandwidth), limit)
        assert should_switch_over(Estimate(pages + more, bandwidth * faster), limit)


def test_time_without_cpu_does_not_count_against_the_link() -> None:
    assert link_bandwidth(GIB, 2.0, 0.0) == GIB / 2
    assert link_bandwidth(GIB, 2.0, 1.0) == GIB


@pytest.mark.parametrize(("size", "seconds"), [(0, 1.0), (-1, 1.0), (GIB, 0.0), (GIB, -1.0), (0, 0.0)])
def test_pass_that_says_nothing_gives_no_bandwidth(size: int, seconds: float) -> None:
    assert link_bandwidth(size, seconds, 0.0) == 0.0


@given(st.integers(1, 1 << 50), st.floats(1e-6, 1e4), st.floats(0.0, 1e12))
def test_starvation_makes_a_link_at_most_ten_times_as_fast(size: int, seconds: float, starved: float) -> None:
    plain = size / seconds
    assert plain * (1 - 1e-9) <= link_bandwidth(size, seconds, starved) <= plain * 10 * (1 + 1e-9)

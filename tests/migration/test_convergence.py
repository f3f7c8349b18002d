import math

import pytest

from dirtylog.migration.convergence import AutoConverge, ThrottleParameters, judge
from dirtylog.migration.statistics import PassStatistics
from dirtylog.units import MIB, PAGE_SIZE

_BANDWIDTH = 100 * MIB


def passes(*dirtied: int) -> list[PassStatistics]:
    """Passes over 1 GiB first, then over what was left; each at 100 MiB a second."""
    found, size = [], 1024 * MIB
    for number, left in enumerate(dirtied, 1):
        found.append(
            PassStatistics(
                number, seconds=size / _BANDWIDTH, dirtied=left * MIB // PAGE_SIZE, bandwidth=float(_BANDWIDTH)
            )
        )
        size = left * MIB
    return found


def test_guest_whose_rest_fits_the_limit_is_about_to_be_stopped() -> None:
    verdict = judge(passes(20), limit=0.3, fixed=0.01)

    assert (verdict.converges, verdict.seconds) == (True, 0.0)
    assert verdict.downtime == pytest.approx(0.21)


def test_first_pass_is_too_early_to_tell() -> None:
    assert judge(passes(500), limit=0.3, fixed=0.01).converges is None


def test_passes_that_halve_converge_in_the_sum_of_those_to_come() -> None:
    verdict = judge(passes(400, 200, 100), limit=0.3, fixed=0.0)

    assert verdict.converges is True
    # 100 MiB are left, 27 would fit: two more passes, of 1 s and half a second.
    assert verdict.seconds == pytest.approx(1.5)
    assert verdict.downtime == pytest.approx(0.25)


def test_working_set_written_in_every_pass_is_reported_after_the_second() -> None:
    verdict = judge(passes(500, 499), limit=0.3, fixed=0.0)

    assert verdict.converges is False
    assert verdict.seconds == math.inf
    assert verdict.needed_limit == pytest.approx(4.99 / 0.9)
    assert verdict.needed_bandwidth == pytest.approx(499 * MIB / 0.27)


def test_throttle_that_is_needed_brings_the_rate_down_to_the_link() -> None:
    verdict = judge(passes(500, 1000), limit=0.3, fixed=0.0)

    assert verdict.needed_throttle == pytest.approx(0.5)  # 200 MiB a second are written, 100 are sent


def test_passes_that_grow_never_converge() -> None:
    assert judge(passes(100, 200, 300), limit=0.3, fixed=0.0).converges is False


def test_limit_below_what_is_fixed_waits_for_nothing_to_be_left() -> None:
    assert judge(passes(100, 50), limit=0.005, fixed=0.01).converges is False
    assert judge(passes(100, 0), limit=0.005, fixed=0.01).converges is True


def test_link_of_unknown_speed_gives_no_forecast_of_downtime() -> None:
    one = PassStatistics(1, dirtied=5)

    assert judge([one], limit=0.3, fixed=0.0).downtime == math.inf


def test_guest_is_throttled_after_two_periods_above_the_trigger() -> None:
    throttle = AutoConverge()
    parameters = ThrottleParameters()

    assert [throttle.observe(dirtied, 100, parameters) for dirtied in (51, 50, 51, 51, 51, 51)] == [
        0,
        0,
        20,
        20,
        30,
        30,
    ]


def test_throttle_stops_at_its_maximum() -> None:
    throttle = AutoConverge()
    parameters = ThrottleParameters(initial=5, increment=25, maximum=95)

    seen = [throttle.observe(100, 100, parameters) for _ in range(12)]

    assert seen[1] == 5
    assert seen[-1] == 95


@pytest.mark.parametrize(("percent", "dirtied", "sent", "expected"), [(95, 100, 100, 98), (90, 52, 100, 91)])
def test_slow_tail_takes_smaller_steps_near_the_end(percent: int, dirtied: int, sent: int, expected: int) -> None:
    throttle = AutoConverge(percent)
    parameters = ThrottleParameters(tailslow=True)

    throttle.observe(dirtied, sent, parameters)

    assert throttle.observe(dirtied, sent, parameters) == expected

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.errors import UsageError
from dirtylog.migration.prediction import Sample, Scenario, Workload, predict
from dirtylog.units import MIB, PAGE_SIZE

_PAGES = 1024
_SPEED = 1024 * PAGE_SIZE
"""Bytes a second: the memory takes one."""


def workload(*samples: tuple[float, list[int]], pages: int = _PAGES, stored: int | None = None) -> Workload:
    found = tuple(Sample(seconds, np.array(numbers, np.int64)) for seconds, numbers in samples)
    return Workload(pages, pages if stored is None else stored, found)


def slow_predict(load: Workload, scenario: Scenario, passes: int) -> list[int]:
    """How many pages are dirty after each pass, page by page."""
    per_page = PAGE_SIZE / scenario.bandwidth
    chunk = max(64, -(-scenario.clear_chunk // PAGE_SIZE) // 64 * 64)
    now, to_send, left = 0.0, set(range(load.pages)), []
    for _ in range(passes):
        began, cleared = now, dict.fromkeys(range(load.pages), now)
        chunks: dict[int, float] = {}
        for page in sorted(to_send):
            if scenario.split:
                cleared[page] = chunks.setdefault(page // chunk, now)
            now += per_page
        if not to_send:
            now += per_page
        to_send = set()
        speed = scenario.guest_speed
        for pages, times in load.writes(began * speed, now * speed):
            to_send |= {
                page for page, time in zip(pages.tolist(), times.tolist(), strict=True) if time >= cleared[page] * speed
            }
        left.append(len(to_send))
    return left


def test_idle_memory_takes_one_pass_and_what_is_fixed() -> None:
    prediction = predict(workload((1.0, [])), Scenario(_SPEED, fixed_downtime=0.01))

    assert prediction.converges
    assert [(one.pages, one.dirtied) for one in prediction.passes] == [(_PAGES, 0)]
    assert prediction.passes[0].seconds == pytest.approx(1.0)
    assert prediction.downtime == 0.01
    assert prediction.total == pytest.approx(1.01)
    assert prediction.bytes == _PAGES * PAGE_SIZE


def test_memory_without_contents_takes_no_time() -> None:
    assert predict(workload((1.0, []), stored=256), Scenario(_SPEED)).total == pytest.approx(0.26)


def test_what_is_written_has_contents_wherever_it_lies() -> None:
    load = workload((100.0, list(range(768, 1024))), stored=512)

    weights = load.weights()

    assert set(weights[768:]) == {1.0}
    assert set(weights[:768]) == {1 / 3}
    assert predict(load, Scenario(_SPEED, fixed_downtime=0)).passes[0].pages == 512


def test_more_written_than_stored_is_stored_in_part() -> None:
    weights = workload((1.0, list(range(512))), stored=256).weights()

    assert (set(weights[:512]), set(weights[512:])) == ({0.5}, {0.0})


def test_page_written_in_every_sample_is_left_for_the_switchover() -> None:
    prediction = predict(workload((0.01, [0, 1023])), Scenario(_SPEED, downtime_limit=0.1))

    assert prediction.converges
    assert prediction.passes[-1].dirtied == 2
    assert prediction.downtime == pytest.approx(0.01 + 2 / 1024)


def test_working_set_that_takes_longer_than_the_limit_never_converges() -> None:
    load = workload((0.01, list(range(512))))

    assert not predict(load, Scenario(_SPEED, downtime_limit=0.3), give_up=20).converges
    assert predict(load, Scenario(_SPEED, downtime_limit=0.6), give_up=20).converges


def test_faster_link_at_the_switchover_stops_the_guest_earlier() -> None:
    load = workload((0.01, list(range(512))))

    assert predict(load, Scenario(_SPEED, 0.3, switchover_bandwidth=2 * _SPEED), give_up=20).converges


def test_slower_guest_leaves_less_behind() -> None:
    load = workload((1.0, list(range(1024))))

    assert predict(load, Scenario(_SPEED, split=False), give_up=0.5).passes[0].dirtied == 1024
    half = predict(load, Scenario(_SPEED, split=False, guest_speed=0.5), give_up=0.5).passes[0].dirtied
    assert half == pytest.approx(512, abs=2)


def test_first_pass_may_be_slower_than_the_others() -> None:
    load = workload((0.01, list(range(512))))
    scenario = Scenario(_SPEED, 0.1, first_bandwidth=_SPEED / 4)

    first, second, *_ = predict(load, scenario, give_up=6).passes
    assert (first.seconds, second.seconds) == pytest.approx((4.0, 0.5))


def test_writes_before_a_late_clear_cost_nothing() -> None:
    load = workload((1.0, list(range(960, 1024))))  # written during the first pass, before their chunk's turn
    whole = Scenario(_SPEED, clear_chunk=_PAGES * PAGE_SIZE)
    chunks = Scenario(_SPEED, clear_chunk=64 * PAGE_SIZE)
    at_sync = Scenario(_SPEED, split=False)

    assert [predict(load, one).passes[0].dirtied for one in (at_sync, whole)] == [64, 64]
    assert predict(load, chunks).passes[0].dirtied < 16


def test_time_to_give_up_ends_the_forecast() -> None:
    prediction = predict(workload((0.01, list(range(_PAGES)))), Scenario(_SPEED), give_up=3.5)

    assert (prediction.converges, prediction.downtime, prediction.bytes) == (False, 0.0, 4 * _PAGES * PAGE_SIZE)
    assert prediction.total == pytest.approx(4.0)


@given(
    st.lists(st.tuples(st.floats(0.01, 0.7), st.lists(st.integers(0, 255), unique=True)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([1, 64, 128, 256]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_forecast_agrees_with_the_oracle(
    samples: list[tuple[float, list[int]]], split: bool, chunk: int, speed: float
) -> None:
    load = workload(*((seconds, sorted(pages)) for seconds, pages in samples), pages=256)
    scenario = Scenario(256 * PAGE_SIZE, 0.0, chunk * PAGE_SIZE, split, guest_speed=speed)

    passes = predict(load, scenario, give_up=2.0).passes

    assert [one.dirtied for one in passes] == slow_predict(load, scenario, len(passes))


@given(st.floats(0, 30), st.floats(0, 5))
def test_workload_starts_anew_after_its_last_sample(start: float, length: float) -> None:
    load = workload((1.0, [1, 2]), (0.5, [3]))

    found = sorted(time for _, times in load.writes(start, start + length) for time in times.tolist())

    moments = [
        base + offset + seconds * (page * 0.6180339887498949 % 1.0)
        for base in np.arange(0, 45, 1.5).tolist()
        for offset, seconds, page in ((0, 1.0, 1), (0, 1.0, 2), (1, 0.5, 3))
    ]
    assert found == pytest.approx(sorted(time for time in moments if start <= time < start + length))


def test_workload_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="without samples"):
        workload()
    with pytest.raises(UsageError, match="without samples"):
        workload((0.0, [1]))
    with pytest.raises(UsageError, match="does not have"):
        workload((1.0, [_PAGES]))
    with pytest.raises(UsageError, match="have contents"):
        workload((1.0, []), stored=_PAGES + 1)


@pytest.mark.parametrize(
    "values",
    [
        {"bandwidth": 0},
        {"bandwidth": 1, "switchover_bandwidth": 0},
        {"bandwidth": 1, "first_bandwidth": -1},
        {"bandwidth": 1, "clear_chunk": 0},
        {"guest_speed": 0},
        {"guest_speed": float("nan")},
    ],
)
def test_scenario_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(Scenario(1.0), **values)


def test_the_splits_experiment_keeps_its_order() -> None:
    """The experiment that the split of collecting and clearing was made for, at a hundredth."""
    rng = np.random.default_rng(1)
    hot, cold = 2621, 786
    load = Workload(
        hot + cold, hot + cold, [Sample(0.1, np.unique(cold + rng.integers(0, hot, 22))) for _ in range(600)]
    )
    at_sync = predict(load, Scenario(1.25e6, 0.1, split=False)).total
    totals = [predict(load, Scenario(1.25e6, 0.1, size)).total for size in (10 * MIB, MIB, MIB // 4)]

    assert at_sync >= totals[0] > totals[1] > totals[2]
    assert totals[2] < 0.8 * at_sync

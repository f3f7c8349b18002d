import math

import numpy as np
import pytest
from msgspec.structs import replace
from support.benchmark_runs import a_pass

from benchmarks.support.forecast import Observation, scenario_of, shortest_total
from benchmarks.support.peers import Terms
from dirtylog.migration.prediction import Sample, Scenario, Workload, predict
from dirtylog.units import MIB, PAGE_SIZE

IDLE = Workload(10, 10, [Sample(1.0, np.empty(0, np.int64))])


class TestGuestSpeed:
    def test_thread_that_gets_half_of_what_it_had_halves_the_speed(self) -> None:
        observed = Observation(IDLE, 0.8, 7)
        assert observed.guest_speed({7: 1.0, 8: 0.0}, {7: 1.8, 8: 2.0}, 2.0) == pytest.approx(0.5)

    def test_guest_that_hardly_runs_has_a_speed_nevertheless(self) -> None:
        assert Observation(IDLE, 0.8, 7).guest_speed({7: 1.0}, {7: 1.0}, 2.0) > 0
        assert Observation(IDLE, 0.8, 7).guest_speed({7: 1.0}, {}, 2.0) > 0

    @pytest.mark.parametrize("observed", [Observation(IDLE, 0.8, None), Observation(IDLE, 0.0, 7)])
    def test_guest_of_which_nothing_is_known_has_the_speed_it_had(self, observed: Observation) -> None:
        assert observed.guest_speed({7: 1.0}, {7: 1.1}, 2.0) == 1.0


class TestScenario:
    def test_link_that_is_limited_has_that_speed(self) -> None:
        scenario = scenario_of(Terms(0.1, bandwidth=MIB), [a_pass(1), a_pass(2)], 64 * PAGE_SIZE, 0.5)
        assert scenario == Scenario(
            MIB,
            0.1,
            clear_chunk=64 * PAGE_SIZE,
            split=True,
            first_bandwidth=MIB,
            switchover_bandwidth=MIB,
            guest_speed=0.5,
        )

    def test_link_without_a_limit_has_the_speed_of_the_passes(self) -> None:
        passes = [replace(a_pass(number), seconds=seconds) for number, seconds in ((1, 0.04), (2, 0.02), (3, 0.01))]
        scenario = scenario_of(Terms(0.1), passes, 0, 1.0)
        found = scenario.first_bandwidth, scenario.bandwidth, scenario.switchover_bandwidth
        assert found == pytest.approx((25 * MIB, 50 * MIB, 100 * MIB))
        assert not scenario.split

    def test_migration_of_one_pass_has_its_speed(self) -> None:
        assert scenario_of(Terms(0.1), [a_pass(1)], 0, 1.0).bandwidth == pytest.approx(100 * MIB)


class TestShortestTotal:
    def test_nothing_that_is_written_takes_the_time_of_its_bytes(self) -> None:
        seconds = shortest_total(1000 * MIB, 1, 1.0, Terms(0.0, bandwidth=100 * MIB))
        assert seconds == pytest.approx(10.0)

    def test_guest_that_writes_faster_than_the_link_carries_never_ends(self) -> None:
        assert shortest_total(1000 * MIB, 1000 * MIB, 200.0 * MIB, Terms(0.1, bandwidth=100 * MIB)) == math.inf

    def test_no_forecast_beats_it_and_small_chunks_come_near(self) -> None:
        rng = np.random.default_rng(1)
        hot, cold, bandwidth, rate, step = 26_210, 7860, 11_770_000, 9.4e6, 0.05
        writes = round(rate * step / PAGE_SIZE)
        samples = [Sample(step, np.unique(cold + rng.integers(0, hot, writes))) for _ in range(800)]
        workload = Workload(hot + cold, hot + cold, samples)
        shortest = shortest_total((hot + cold) * PAGE_SIZE, hot * PAGE_SIZE, rate, Terms(0.1, bandwidth=bandwidth))
        total = predict(workload, Scenario(bandwidth, 0.1, MIB // 4)).total
        assert 0.97 * shortest < total < 1.03 * shortest

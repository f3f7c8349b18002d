import json
import math
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.guests import machine

from dirtylog.control.migration_info import MigrationInfo, describe
from dirtylog.control.qmp.messages import Success, encode
from dirtylog.errors import DirtylogError
from dirtylog.migration import (
    DowntimeParts,
    OutgoingMigration,
    Parameters,
    PassStatistics,
    Statistics,
    Status,
    Verdict,
    parse_address,
)
from dirtylog.migration.economy import Way
from dirtylog.migration.statistics import MOST_PASSES
from dirtylog.units import MIB, PAGE_SIZE

_SECONDS: Final = st.just(0.0) | st.floats(1e-9, 1e7)
_COUNTS: Final = st.integers(0, 1 << 60)
_WAYS: Final = st.dictionaries(st.sampled_from(Way), st.tuples(_COUNTS, _COUNTS))
_PASSES: Final = st.builds(
    PassStatistics,
    number=st.integers(1, 1 << 30),
    pages=_COUNTS,
    zero_pages=_COUNTS,
    bytes=_COUNTS,
    seconds=_SECONDS,
    starved=_SECONDS,
    dirtied=_COUNTS,
    bandwidth=st.just(0.0) | st.floats(1e-3, 1e18),
    ways=_WAYS,
    expected_downtime=st.sampled_from((0.0, 0.01, math.inf)) | st.floats(0.01, 1e18),
)
_NUMBERS: Final = st.sampled_from((0.0, math.inf)) | st.floats(0, 1e18)
_VERDICTS: Final = st.builds(
    Verdict,
    converges=st.none() | st.booleans(),
    seconds=_NUMBERS,
    downtime=_NUMBERS,
    needed_limit=_NUMBERS,
    needed_bandwidth=_NUMBERS,
    needed_throttle=st.floats(0, 1),
)
_STATISTICS: Final = st.builds(
    Statistics,
    total_bytes=_COUNTS,
    remaining_pages=_COUNTS,
    passes=st.lists(_PASSES, max_size=8),
    dirty_rate=st.floats(0, 1e18),
    setup_seconds=_SECONDS,
    total_seconds=_SECONDS,
    downtime=_SECONDS,
    downtime_parts=st.none() | st.builds(DowntimeParts, _SECONDS, _SECONDS, _SECONDS, _SECONDS),
    downtime_bytes=_COUNTS,
    found=_COUNTS,
    missed=_COUNTS,
    overflowed=_COUNTS,
    verdict=st.none() | _VERDICTS,
    throttle=st.integers(0, 99),
    verify_seconds=_SECONDS,
    digests=st.dictionaries(st.text(max_size=3), st.binary(max_size=4), max_size=2),
)
_ERRORS: Final = st.none() | st.builds(DirtylogError, st.text(max_size=5))


def test_every_state_has_json_that_reads_back() -> None:
    with machine("fake", boot=False) as guest:

        @given(st.sampled_from(Status), _STATISTICS, _ERRORS, st.sampled_from([1, 2]), st.sampled_from([0, MIB]))
        def check(
            status: Status, statistics: Statistics, error: DirtylogError | None, channels: int, cache: int
        ) -> None:
            parameters = Parameters(channels=channels, delta_cache=cache)
            outgoing = OutgoingMigration(guest, parse_address("unix:x"), parameters)
            outgoing.status, outgoing.statistics, outgoing.error = status, statistics, error
            info = json.loads(encode(Success(describe(outgoing))))["return"]
            assert msgspec.convert(info, MigrationInfo).status == status.value
            assert len(info["x-passes"]) == len(statistics.passes)
            assert ("downtime" in info) == ("x-downtime-us" in info) == (status is Status.COMPLETED)
            assert ("xbzrle-cache" in info) == bool(cache)
            assert ("x-downtime-parts" in info) <= (status is Status.COMPLETED)
            assert ("error-desc" in info) == (status is Status.FAILED)  # a connection that is lost has a test below
            assert ("x-digests" in info) == ("x-verify-us" in info) == bool(statistics.digests)

        check()


@pytest.mark.parametrize(
    ("passes", "mbps", "expected"),
    [
        ([], 0, None),
        ([PassStatistics(1)], 0, None),
        ([PassStatistics(1, bytes=1_000_000, seconds=2.0)], 4, None),
        ([PassStatistics(1, bytes=1, seconds=1.0, bandwidth=1e6, expected_downtime=0.25)], 8, 250),
        ([PassStatistics(1, bytes=1, seconds=1.0, bandwidth=1e6, expected_downtime=math.inf)], 8, None),
        (
            [PassStatistics(1, bytes=1, seconds=1.0, bandwidth=1e6, expected_downtime=0.5), PassStatistics(2)],
            8,
            500,
        ),
    ],
    ids=["nothing", "just-begun", "first-pass", "first-done", "unknown-link", "second-begun"],
)
def test_progress_is_that_of_the_latest_pass_that_tells(
    passes: list[PassStatistics], mbps: float, expected: int | None
) -> None:
    with machine("fake", boot=False) as guest:
        outgoing = OutgoingMigration(guest, parse_address("unix:x"), Parameters())
        outgoing.status, outgoing.statistics.passes = Status.ACTIVE, passes
        info = describe(outgoing)
    assert info.ram.mbps == pytest.approx(mbps)
    assert info.expected_downtime == expected


def test_only_the_last_passes_are_told() -> None:
    with machine("fake", boot=False) as guest:
        outgoing = OutgoingMigration(guest, parse_address("unix:x"), Parameters())
        for _ in range(1, 1000):
            outgoing.statistics.begin_pass()
        info = describe(outgoing)
    assert [one.number for one in info.x_passes] == list(range(1000 - MOST_PASSES, 1000))
    assert info.ram.dirty_sync_count == 999


def test_what_was_saved_is_told_way_by_way_and_of_the_cache() -> None:
    with machine("fake", boot=False) as guest:
        outgoing = OutgoingMigration(guest, parse_address("unix:x"), Parameters(delta_cache=MIB))
        outgoing.statistics = Statistics(
            passes=[
                PassStatistics(1, ways={Way.PLAIN: (10, 10 * PAGE_SIZE + 24)}),
                PassStatistics(2, ways={Way.PLAIN: (1, PAGE_SIZE + 24), Way.DELTA: (8, PAGE_SIZE)}),
            ],
            found=30,
            missed=10,
            overflowed=3,
        )
        info = describe(outgoing)
    assert {name: (way.pages, way.saved) for name, way in info.x_ways.items()} == {
        "plain": (11, 0),
        "delta": (8, 7 * PAGE_SIZE),
    }
    assert [list(one.ways) for one in info.x_passes] == [["plain"], ["plain", "delta"]]
    cache = info.xbzrle_cache
    assert cache is not None
    assert (cache.pages, cache.bytes, cache.encoding_rate) == (8, PAGE_SIZE, 8.0)
    assert (cache.cache_miss, cache.cache_miss_rate, cache.overflow) == (10, 0.25, 3)

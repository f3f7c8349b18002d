from dirtylog.migration.economy import Way
from dirtylog.migration.statistics import (
    ENDED,
    MOST_PASSES,
    PassStatistics,
    Statistics,
    Status,
    Ways,
    sum_ways,
)


def test_totals_are_the_sums_of_the_passes() -> None:
    statistics = Statistics(
        passes=[PassStatistics(1, pages=10, zero_pages=5, bytes=41000), PassStatistics(2, pages=1, bytes=4200)]
    )
    assert (statistics.pages, statistics.zero_pages, statistics.bytes) == (11, 5, 45200)


def test_migration_that_has_not_begun_has_sent_nothing() -> None:
    statistics = Statistics()
    assert (statistics.pages, statistics.zero_pages, statistics.bytes) == (0, 0, 0)


def test_two_migrations_do_not_share_their_passes() -> None:
    Statistics().passes.append(PassStatistics(1))
    assert Statistics().passes == []


def test_status_words_are_those_of_qemu() -> None:
    words = (
        "none setup active pre-switchover device postcopy-active postcopy-paused postcopy-recover completed failed "
        "cancelling cancelled"
    )
    assert [status.value for status in Status] == words.split()
    assert {status.value for status in ENDED} == {"completed", "failed", "cancelled"}


def test_old_passes_are_summed_up_so_that_a_long_migration_stays_small() -> None:
    statistics = Statistics()
    for number in range(1, 3 * MOST_PASSES + 1):
        current = statistics.begin_pass()
        assert current.number == number
        current.pages, current.zero_pages, current.bytes = 2, 1, 8200
        current.ways = {Way.PLAIN: (1, 4100), Way.DELTA: (1, 100)} if number % 2 else {Way.PLAIN: (2, 8200)}
    assert len(statistics.passes) == MOST_PASSES
    assert statistics.pass_count == 3 * MOST_PASSES
    assert (statistics.pages, statistics.zero_pages) == (6 * MOST_PASSES, 3 * MOST_PASSES)
    assert statistics.bytes == 3 * MOST_PASSES * 8200
    odd = 3 * MOST_PASSES // 2
    assert statistics.ways == {Way.PLAIN: (3 * odd, (4100 + 8200) * odd), Way.DELTA: (odd, 100 * odd)}


def test_ways_are_summed_up_and_stay_as_they_are() -> None:
    one: Ways = {Way.FAST: (1, 100)}
    assert sum_ways(one, {Way.PLAIN: (5, 6)}, one) == {Way.FAST: (2, 200), Way.PLAIN: (5, 6)}
    assert one == {Way.FAST: (1, 100)}
    assert sum_ways() == {}

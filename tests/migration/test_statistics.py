from dirtylog.migration.statistics import ENDED, PassStatistics, Statistics, Status


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
    words = "none setup active device completed failed cancelling cancelled"
    assert [status.value for status in Status] == words.split()
    assert {status.value for status in ENDED} == {"completed", "failed", "cancelled"}

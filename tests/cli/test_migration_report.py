from io import StringIO
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from dirtylog.cli.migration_report import progress_line, progress_table, report
from dirtylog.control.migration_info import DowntimePartsInfo, MigrationInfo, PassInfo, RAMInfo, VerdictInfo, WayInfo
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

PASSES: Final = [
    PassInfo(
        number=1,
        pages=25_000,
        zero_pages=237_144,
        bytes=100 * MIB,
        seconds=0.2,
        starved=0.0,
        dirtied=1234,
        bandwidth=600e6,
        expected_downtime=0.018,
    ),
    PassInfo(
        number=2,
        pages=1234,
        zero_pages=0,
        bytes=5 * MIB,
        seconds=0.01,
        starved=0.0,
        dirtied=0,
        bandwidth=500e6,
        expected_downtime=None,
    ),
]
INFO: Final = MigrationInfo(
    status="completed",
    total_time=2345,
    setup_time=12,
    downtime=13,
    x_downtime_us=12_600,
    ram=RAMInfo(
        transferred=105 * MIB,
        remaining=0,
        total=GIB,
        duplicate=237_144,
        normal=26_234,
        normal_bytes=26_234 * PAGE_SIZE,
        dirty_pages_rate=6170,
        mbps=360.0,
        dirty_sync_count=2,
        page_size=PAGE_SIZE,
        pages_per_second=11_000,
        multifd_bytes=0,
        precopy_bytes=100 * MIB,
        downtime_bytes=5 * MIB,
    ),
    x_passes=PASSES,
)
ACTIVE: Final = msgspec.structs.replace(
    INFO, status="active", downtime=None, x_downtime_us=None, expected_downtime=18, x_passes=PASSES[:1]
)


def render(what: RenderableType, width: int = 80) -> str:
    out = StringIO()
    Console(file=out, width=width).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_report_has_a_row_a_pass_and_the_totals() -> None:
    assert render(report(INFO)) == (
        "                                                        expected\n"
        " pass   pages     zero      time    bandwidth  dirtied  downtime\n"
        "    1  25,000  237,144  200.0 ms  500.0 MiB/s    1,234   18.0 ms\n"
        "final   1,234        0   10.0 ms  500.0 MiB/s\n"
        "\n"
        "total time     2.35 s\n"
        "downtime      12.6 ms\n"
        "pages sent     26,234\n"
        "zero pages    237,144\n"
        "bytes       105.0 MiB"
    )


def test_report_of_memory_that_was_handed_over_has_no_passes() -> None:
    first, empty, *rest = render(report(msgspec.structs.replace(INFO, x_passes=[]))).splitlines()
    assert (first, empty) == ("memory was handed over whole, and not copied", "")
    assert rest[0].split() == ["total", "time", "2.35", "s"]


def test_report_tells_what_the_downtime_went_by_as() -> None:
    parts = DowntimePartsInfo(stop=250, final_pass=9000, state=3000, handover=350)
    shown = render(report(msgspec.structs.replace(INFO, x_downtime_parts=parts)))
    assert shown.endswith(
        "\nthe downtime went by as\n"
        "  stopping vCPUs      250 us\n"
        "  final pass          9.0 ms\n"
        "  state               3.0 ms\n"
        "  handover and start  350 us"
    )


def test_report_tells_what_each_way_saved() -> None:
    ways = {"plain": WayInfo(1000, 4_096_000, 0), "fast": WayInfo(25_000, 30 * MIB, 70 * MIB), "new": WayInfo(1, 2, 3)}
    shown = render(report(msgspec.structs.replace(INFO, x_ways=ways)))
    assert shown.endswith(
        "\npages with contents were sent\n"
        "  as           pages     bytes     saved\n"
        "  they are     1,000   3.9 MiB       0 B\n"
        "  zstd, fast  25,000  30.0 MiB  70.0 MiB\n"
        "  new              1       2 B       3 B"
    )


def test_report_does_not_speak_of_ways_if_all_pages_went_as_they_are() -> None:
    info = msgspec.structs.replace(INFO, x_ways={"plain": WayInfo(1000, 4_096_000, 0)})
    assert render(report(info)) == render(report(INFO))


def test_report_of_a_verified_migration_shows_the_digests() -> None:
    shown = render(report(msgspec.structs.replace(INFO, x_verify_us=250_000, x_digests={"pc.ram": "ab" * 32})))
    assert "memory is equal on both sides; comparing it took 250.0 ms besides" in shown
    assert f"  pc.ram  {'ab' * 32}" in shown.splitlines()


def test_pass_without_a_known_link_shows_no_downtime() -> None:
    passes = [msgspec.structs.replace(PASSES[0], expected_downtime=None), PASSES[1]]
    assert "18.0 ms" not in render(report(msgspec.structs.replace(INFO, x_passes=passes)))


@pytest.mark.parametrize("seconds", [999.99, 2621.44])
def test_report_of_a_huge_guest_fits_into_80_columns(seconds: float) -> None:
    pages = 256 * GIB // PAGE_SIZE
    huge = PassInfo(
        number=9999,
        pages=pages,
        zero_pages=pages,
        bytes=int(1023.9 * MIB * seconds),
        seconds=seconds,
        starved=0.0,
        dirtied=pages,
        bandwidth=1e9,
        expected_downtime=seconds,
    )
    shown = render(report(msgspec.structs.replace(INFO, x_passes=[huge, msgspec.structs.replace(huge)])))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for text in ("67,108,864", "1023.9 MiB/s", f"{seconds:.2f} s", "9999", "final"):
        assert text in shown


def test_progress_says_how_it_stands() -> None:
    assert render(progress_table(ACTIVE)) == (
        "status                 active\n"
        "pass                        2\n"
        "pages left                  0\n"
        "dirty rate         24.1 MiB/s\n"
        "bandwidth          42.9 MiB/s\n"
        "expected downtime     18.0 ms\n"
        "sent                105.0 MiB\n"
        "elapsed                2.35 s\n"
        "\n"
        "it is too early to tell whether it converges"
    )


def test_progress_line_says_the_same_on_one_line() -> None:
    assert progress_line(ACTIVE) == (
        "status active  pass 2  pages left 0  dirty rate 24.1 MiB/s  bandwidth 42.9 MiB/s  "
        "expected downtime 18.0 ms  sent 105.0 MiB  elapsed 2.35 s  it is too early to tell whether it converges"
    )


def test_progress_tells_what_is_taken_from_the_guest_and_what_to_expect() -> None:
    verdict = VerdictInfo(
        converges=False, seconds=None, downtime=0.9, needed_limit=1.0, needed_bandwidth=2.0 * GIB, needed_throttle=74.6
    )
    slowed = msgspec.structs.replace(ACTIVE, cpu_throttle_percentage=30, x_verdict=verdict)
    assert progress_line(slowed).endswith(
        "elapsed 2.35 s  throttle 30 %  it does not converge at a throttle of 30 %: "
        "it takes a downtime limit of 1.00 s, a bandwidth of 2.0 GiB/s or a throttle of more than 74 %"
    )
    shown = render(progress_table(slowed))
    assert "\nthrottle                 30 %\n\nit does not converge" in shown
    assert "expect" not in progress_line(msgspec.structs.replace(slowed, status="completed")).rpartition("elapsed")[2]


def test_report_tells_the_highest_throttle() -> None:
    passes = [msgspec.structs.replace(PASSES[0], throttle=throttle) for throttle in (0, 20, 30, 0)]
    assert render(report(msgspec.structs.replace(INFO, x_passes=passes))).endswith("highest throttle       30 %")


def test_progress_before_anything_is_known() -> None:
    assert "expected downtime not known yet" in progress_line(msgspec.structs.replace(ACTIVE, expected_downtime=None))


_COUNTS: Final = st.integers(0, 1 << 60)
_FLOATS: Final = st.floats(0, 1e18)


@given(
    st.builds(
        MigrationInfo,
        status=st.text(max_size=5),
        total_time=_COUNTS,
        setup_time=_COUNTS,
        expected_downtime=st.none() | _COUNTS,
        x_downtime_us=st.none() | _COUNTS,
        ram=st.builds(RAMInfo, page_size=st.just(4 * KIB), mbps=_FLOATS),
        cpu_throttle_percentage=st.none() | st.integers(1, 99),
        x_verdict=st.none() | st.builds(VerdictInfo),
        x_ways=st.dictionaries(st.text(max_size=5), st.builds(WayInfo), max_size=4),
        x_downtime_parts=st.none() | st.builds(DowntimePartsInfo),
        x_passes=st.lists(st.builds(PassInfo, seconds=_FLOATS, bytes=_COUNTS), max_size=3),
    )
)
def test_everything_can_be_shown(info: MigrationInfo) -> None:
    render(progress_table(info))
    render(report(info))
    progress_line(info)

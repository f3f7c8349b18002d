import io
from typing import Final

import msgspec
import pytest
from rich.console import Console
from support.oracles import to_words

from dirtylog.cli.watch_report import WatchReport
from dirtylog.display import Sample
from dirtylog.memory import PageBitmap
from dirtylog.units import MIB, PAGE_SIZE

BLOCKS: Final = {"ram": 4 * MIB // PAGE_SIZE, "rom": 16}


def sample(end: float, seconds: float, pages: set[int]) -> Sample:
    written = {"ram": PageBitmap(BLOCKS["ram"], to_words(pages, BLOCKS["ram"])), "rom": PageBitmap(16)}
    return Sample(end, seconds, written)


@pytest.fixture
def report() -> WatchReport:
    report = WatchReport("guest.qmp", BLOCKS)
    report.add(sample(2.0, 2.0, set(range(256))), "running")
    report.add(sample(3.0, 1.0, set(range(128, 384))), "paused\n")
    return report


def test_line_has_rate_working_set_and_total(report: WatchReport) -> None:
    assert report.line() == (
        "    3.00 s  paused\\n  1.0 MiB/s  256 pages/s  working set: 1 s 1.0 MiB, 10 s (3.0 s) 1.5 MiB, "
        "60 s (3.0 s) 1.5 MiB  since the start 1.5 MiB of 4.1 MiB"
    )


def test_json_has_the_same_as_numbers(report: WatchReport) -> None:
    (line,) = report.json().splitlines()
    assert msgspec.json.decode(line) == {
        "time": 3.0,
        "seconds": 1.0,
        "status": "paused\\n",
        "pages": 256,
        "pages-per-second": 256.0,
        "bytes-per-second": 1.0 * MIB,
        "working-set": [
            {"window": 1.0, "seconds": 1.0, "pages": 256, "bytes": MIB},
            {"window": 10.0, "seconds": 3.0, "pages": 384, "bytes": 384 * PAGE_SIZE},
            {"window": 60.0, "seconds": 3.0, "pages": 384, "bytes": 384 * PAGE_SIZE},
        ],
        "written-ever": 384,
        "blocks": {"ram": 256, "rom": 0},
    }


def test_summary_is_the_average_and_the_total(report: WatchReport) -> None:
    assert report.summary() == ("guest.qmp: 1.5 MiB of 4.1 MiB written in 3.00 s, 682.7 KiB/s (171 pages/s) on average")


def test_summary_without_a_sample_says_so() -> None:
    assert WatchReport("guest.qmp", BLOCKS).summary() == "guest.qmp: no sample was taken"


def test_sample_that_took_no_time_has_no_rate() -> None:
    report = WatchReport("guest.qmp", BLOCKS)
    report.add(sample(0.0, 0.0, {1}), "running")
    assert "0 B/s  0 pages/s" in report.line()
    assert "0 B/s" in report.summary()
    assert msgspec.json.decode(report.json())["pages-per-second"] == 0


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 50)])
def test_screen_has_the_figures_and_the_map_and_fits(report: WatchReport, width: int, height: int) -> None:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, _environ={})
    lines = ["".join(part.text for part in line).rstrip() for line in console.render_lines(report)]
    assert lines[0] == "guest.qmp  paused\\n  watched for 3.00 s"
    assert lines[1] == "written  1.0 MiB/s  256 pages/s  since the start 1.5 MiB of 4.1 MiB"
    assert lines[2] == "working set  1 s 1.0 MiB  10 s (3.0 s) 1.5 MiB  60 s (3.0 s) 1.5 MiB"
    assert any(line.startswith("last written within") for line in lines)
    assert any("█" in line for line in lines[6:])
    assert len(lines) <= height

import json
from io import StringIO

import pytest
from rich.console import Console

from benchmarks.support.measure import Outcome, Run, Side
from benchmarks.support.report import ABSENT, METRICS, Host, Summary, encode, line, table
from benchmarks.support.usage import CPUTime, ResidentMemory
from dirtylog.units import MIB, format_duration

HOST = Host(kernel="6.1", cpu="A CPU", cpus=2, memory=1 << 34, python="3.11.2", peers={"QEMU": "7.2", "dirtylog": "1"})
SIDE = Side(CPUTime(0.25, 0.5), ResidentMemory(90 * MIB, 20 * MIB, 10 * MIB, 60 * MIB, 60 * MIB), 30 * MIB)


def run(peer: str, total: float, *, outcome: Outcome = Outcome.COMPLETED, last: int = 100 * MIB) -> Run:
    arrived = outcome is Outcome.COMPLETED
    return Run(
        peer=peer,
        first=MIB,
        last=last,
        outcome=outcome,
        load=0.5,
        wall=total,
        total=total,
        downtime=0.05 if arrived else None,
        stopped=0.06 if arrived else None,
        bytes=200 * MIB,
        pages=51_200,
        zero_pages=1000,
        passes=3,
        source=SIDE,
        destination=SIDE if arrived else None,
    )


def shown(runs: list[Run]) -> list[list[str]]:
    """The cells of each row of the table, as a person sees them."""
    text = StringIO()
    Console(width=140, file=text).print(table(runs, ("QEMU", "dirtylog")))
    return [
        [cell.strip() for cell in row_text.split("  ") if cell.strip()] for row_text in text.getvalue().splitlines()
    ]


def row(runs: list[Run], name: str) -> list[str]:
    return next(cells[1:] for cells in shown(runs) if cells and cells[0] == name)


def test_summary_has_median_and_extremes() -> None:
    assert Summary.of([5.0, 1.0, 2.0, 4.0]) == Summary(median=3.0, low=1.0, high=5.0)


def test_summary_of_nothing_is_nothing() -> None:
    assert Summary.of([]) is None


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (Summary(1.0, 0.5, 2.0), "1.00 s [500.0 ms .. 2.00 s]"),
        (Summary(1.0, 1.0, 1.0), "1.00 s"),
    ],
)
def test_summary_shows_extremes_that_differ(summary: Summary, text: str) -> None:
    assert summary.show(format_duration) == text


def test_table_sets_medians_side_by_side_with_their_ratio() -> None:
    runs = [run("QEMU", 2.0), run("dirtylog", 1.0), run("QEMU", 4.0), run("dirtylog", 1.5), run("QEMU", 2.5)]
    assert row(runs, "total time") == ["2.50 s [2.00 s .. 4.00 s]", "1.25 s [1.00 s .. 1.50 s]", "0.50"]
    assert row(runs, "CPU time, source") == ["750.0 ms", "750.0 ms", "1.00"]
    assert row(runs, "runs that converged") == ["3 of 3", "2 of 2"]


def test_table_has_a_section_for_each_range() -> None:
    runs = [run("QEMU", 1.0), run("dirtylog", 1.0, last=512 * MIB)]
    titles = [cells[0] for cells in shown(runs) if cells and "guest writes" in cells[0]]
    assert titles == ["guest writes 1..100 MiB", "guest writes 1..512 MiB"]


def test_run_that_did_not_converge_counts_but_is_in_no_median() -> None:
    runs = [run("QEMU", 60.0, outcome=Outcome.DID_NOT_CONVERGE), run("QEMU", 2.0), run("dirtylog", 1.0)]
    assert row(runs, "runs that converged") == ["1 of 2", "1 of 1"]
    assert row(runs, "total time") == ["2.00 s", "1.00 s", "0.50"]


def test_peer_that_never_converged_has_no_figures() -> None:
    runs = [run("QEMU", 60.0, outcome=Outcome.DID_NOT_CONVERGE), run("dirtylog", 1.0)]
    for metric in METRICS:
        assert row(runs, metric.name)[::2] == [ABSENT, ABSENT]


def test_line_says_how_a_run_went() -> None:
    assert line(run("QEMU", 2.0)) == "QEMU: completed, total 2.00 s, 3 passes, downtime 50.0 ms"
    unfinished = run("QEMU", 60.0, outcome=Outcome.DID_NOT_CONVERGE)
    assert line(unfinished) == "QEMU: did not converge, total 60.00 s, 3 passes"


def test_host_is_one_line_with_all_versions() -> None:
    assert str(HOST) == "Linux 6.1, 2 x A CPU, 16.0 GiB; QEMU 7.2, dirtylog 1, Python 3.11.2"


def test_this_host_is_described() -> None:
    host = Host.this([])
    assert host.kernel
    assert host.cpus >= 1
    assert host.memory > MIB


def test_json_holds_every_run() -> None:
    decoded = json.loads(encode(HOST, SIDE.cpu, [run("QEMU", 2.0), run("dirtylog", 1.0)]))
    assert decoded["host"]["peers"] == {"QEMU": "7.2", "dirtylog": "1"}
    assert decoded["setup"] == {"user": 0.25, "system": 0.5}
    assert [one["total"] for one in decoded["runs"]] == [2.0, 1.0]
    assert decoded["runs"][0]["outcome"] == "completed"
    assert decoded["runs"][0]["source"]["memory"]["guest"] == 60 * MIB

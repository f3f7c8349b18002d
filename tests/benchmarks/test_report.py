import json
from io import StringIO

import pytest
from msgspec.structs import replace
from rich.console import Console
from support.benchmark_runs import SIDE, a_run

from benchmarks.support.bare import BareCopies, Copy
from benchmarks.support.measure import Outcome, Run
from benchmarks.support.report import ABSENT, METRICS, Host, Summary, encode, line, tables
from dirtylog.cli.prediction_report import PredictionInfo
from dirtylog.units import MIB, format_duration

HOST = Host(kernel="6.1", cpu="A CPU", cpus=2, memory=1 << 34, python="3.11.2", peers={"QEMU": "7.2", "dirtylog": "1"})


def run(
    peer: str,
    total: float,
    *,
    outcome: Outcome = Outcome.COMPLETED,
    setup: str = "guest writes 1..100 MiB",
    expected: float | None = None,
    bare: tuple[float, ...] = (),
) -> Run:
    result = a_run(peer, total, outcome=outcome, setup=setup, expected=expected, passes=(3,) if bare else ())
    return replace(result, bare=BareCopies(MIB, [Copy(seconds, 0.0) for seconds in bare])) if bare else result


def shown(runs: list[Run]) -> list[list[str]]:
    """The cells of each row of the table, as a person sees them."""
    text = StringIO()
    Console(width=140, file=text).print(tables(runs, ("QEMU", "dirtylog")))
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


def test_bare_copies_of_all_runs_are_one_figure() -> None:
    runs = [run("QEMU", 1.0), run("dirtylog", 1.0, bare=(0.06, 0.05)), run("dirtylog", 1.0, bare=(0.07, 0.5, 0.06))]
    assert row(runs, "bare copy of the final pass") == [ABSENT, "60.0 ms [50.0 ms .. 500.0 ms]", ABSENT]


def test_speed_of_a_still_guest_is_compared_with_that_of_bare_copies() -> None:
    copies = BareCopies(MIB, [Copy(seconds, 0.0) for seconds in (0.4, 0.45, 0.9)])
    runs = [run("QEMU", 1.0), replace(run("dirtylog", 0.5), bare_whole=copies)]
    assert row(runs, "bare copy of everything") == [ABSENT, "450.0 ms [400.0 ms .. 900.0 ms]", ABSENT]
    assert row(runs, "speed, of the bare copy's") == [ABSENT, "0.90", ABSENT]


def test_silence_is_shown_with_what_it_has_beyond_each_downtime_and_no_quotient_of_that() -> None:
    runs = [replace(run(peer, 1.0), silence=value) for peer in ("QEMU", "dirtylog") for value in (0.0495, 0.0625, 0.08)]
    beyond = "12.5 ms [-500 us .. 30.0 ms]"
    assert row(runs, "silence of the guest") == [*["62.5 ms [49.5 ms .. 80.0 ms]"] * 2, "1.00"]
    assert row(runs, "silence - downtime, run by run") == [beyond, beyond, ABSENT]


def test_speed_of_the_limit_is_shown_to_a_ten_thousandth() -> None:
    runs = [replace(run("QEMU", 1.0), share_of_limit=0.98765), replace(run("dirtylog", 1.0), share_of_limit=0.9993)]
    assert row(runs, "speed, of the limit") == ["0.9877", "0.9993", "1.01"]


def test_forecast_is_set_beside_what_came() -> None:
    forecast = PredictionInfo(
        1e9, 1e9, 1e9, 1.0, 0.3, None, converges=True, total=0.9, downtime=0.2, bytes=MIB, passes=[]
    )
    runs = [run("QEMU", 2.0), replace(run("dirtylog", 1.0), predicted=forecast)]
    assert row(runs, "predicted total time") == [ABSENT, "900.0 ms", ABSENT]
    assert row(runs, "predicted / real, run by run") == [ABSENT, "0.90", ABSENT]


def test_what_nobody_has_is_no_row() -> None:
    names = [cells[0] for cells in shown([run("QEMU", 1.0), run("dirtylog", 1.0)]) if cells]
    assert "total time" in names
    assert not any(word in name for word in ("predicted", "bare", "silence", "limit") for name in names)


def test_expected_downtime_is_shown_of_the_peer_that_tells_it() -> None:
    runs = [run("QEMU", 1.0), run("dirtylog", 1.0, expected=0.25), run("dirtylog", 1.0, expected=0.15)]
    assert row(runs, "expected downtime") == [ABSENT, "200.0 ms [150.0 ms .. 250.0 ms]", ABSENT]


def test_each_setup_has_a_table() -> None:
    runs = [run("QEMU", 1.0), run("dirtylog", 1.0, setup="guest writes 1..512 MiB")]
    titles = [cells[0] for cells in shown(runs) if cells and "guest writes" in cells[0]]
    assert titles == ["guest writes 1..100 MiB", "guest writes 1..512 MiB"]


def test_run_that_did_not_converge_counts_but_is_in_no_median() -> None:
    runs = [run("QEMU", 60.0, outcome=Outcome.DID_NOT_CONVERGE), run("QEMU", 2.0), run("dirtylog", 1.0)]
    assert row(runs, "runs that converged") == ["1 of 2", "1 of 1"]
    assert row(runs, "total time") == ["2.00 s", "1.00 s", "0.50"]


def test_peer_that_never_converged_has_no_figures() -> None:
    runs = [run("QEMU", 60.0, outcome=Outcome.DID_NOT_CONVERGE), run("dirtylog", 1.0)]
    titles = {cells[0]: cells[1:] for cells in shown(runs) if cells}
    for metric in METRICS:
        if metric.name in titles:
            assert titles[metric.name][::2] == [ABSENT, ABSENT]


def test_line_says_how_a_run_went() -> None:
    assert line(run("QEMU", 2.0)) == "QEMU: completed, total 2.00 s, 3 passes, downtime 50.0 ms"
    heard = replace(run("QEMU", 2.0), silence=0.0525)
    assert line(heard) == "QEMU: completed, total 2.00 s, 3 passes, downtime 50.0 ms, silence 52.5 ms"
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
    runs = [run("QEMU", 2.0), run("dirtylog", 1.0, expected=0.2, bare=(0.05, 0.06))]
    decoded = json.loads(encode(HOST, SIDE.cpu, runs))
    assert decoded["host"]["peers"] == {"QEMU": "7.2", "dirtylog": "1"}
    assert decoded["setup"] == {"user": 0.25, "system": 0.5}
    assert [one["total"] for one in decoded["runs"]] == [2.0, 1.0]
    assert decoded["runs"][0]["outcome"] == "completed"
    assert decoded["runs"][0]["source"]["memory"]["guest"] == 60 * MIB
    assert [one["steal"] for one in decoded["runs"]] == [0.25, 0.25]
    assert [one["expected_downtime"] for one in decoded["runs"]] == [None, 0.2]
    assert [one["bare"] for one in decoded["runs"]] == [
        None,
        {"size": MIB, "copies": [{"seconds": 0.05, "steal": 0.0}, {"seconds": 0.06, "steal": 0.0}]},
    ]


def test_json_holds_the_passes_as_query_migrate_names_them() -> None:
    decoded = json.loads(encode(HOST, SIDE.cpu, [run("dirtylog", 1.0, bare=(0.05,))]))
    (one,) = decoded["runs"][0]["x_passes"]
    assert one == {
        "number": 3,
        "pages": 256,
        "zero-pages": 0,
        "bytes": MIB,
        "seconds": 0.01,
        "starved": 0.0,
        "dirtied": 0,
        "bandwidth": 1e8,
        "expected-downtime": None,
    }

"""The script as its users start it, on a guest so small that it takes seconds."""

import json
from io import StringIO
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console
from support.benchmark_runs import a_run

from benchmarks.split import AT_SYNC, main, table
from benchmarks.support.measure import Outcome, Run
from benchmarks.support.passes_plot import draw
from dirtylog.cli.prediction_report import PredictedPassInfo, PredictionInfo
from dirtylog.linux.kvm import KVM
from dirtylog.units import MIB

SMALL = ["--memory", "24M", "--hot", "8M", "--rate", "1M", "--bandwidth", "20M", "--chunk", "256K"]
QUICK = ["--runs", "1", "--watch", "200ms", "--limit", "300ms"]


def predicted(total: float) -> PredictionInfo:
    passes = [PredictedPassInfo(6000, 1.0, 500), PredictedPassInfo(500, 0.1, 0)]
    return PredictionInfo(
        1e7, 1e7, 1e7, 1.0, 0.3, None, converges=True, total=total, downtime=0.1, bytes=MIB, passes=passes
    )


def shown(runs: list[Run]) -> list[list[str]]:
    """The cells of each row."""
    text = StringIO()
    Console(width=200, file=text).print(table(runs))
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in text.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hot", "1331M"], "cannot be written; the first MiB is the guest's own"),
        (["--hot", "100"], "of which whole pages are written"),
        (["--memory", "1000001"], "whole MiB"),
        (["--bandwidth", "0"], "no experiment without a bandwidth"),
        (["--chunk", "0"], "empty chunks"),
        (["--place", "middle"], "'middle' is not one of"),
        (["--rate", "many"], "is not a rate"),
        (["--limit", "100"], "is not a duration"),
    ],
)
def test_bad_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["low", "high"])
def test_all_ways_are_measured(kvm: KVM, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    files = tmp_path / "a.json", tmp_path / "a.png"
    assert main([*SMALL, *QUICK, "--place", place, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    out = capsys.readouterr().out
    runs = json.loads(files[0].read_text())["runs"]
    assert [run["peer"] for run in runs] == [AT_SYNC, "in chunks of 256.0 KiB"]
    assert all(run["outcome"] == "completed" for run in runs)
    assert [run["predicted"]["clear-chunk"] for run in runs] == [None, 256 * 1024]
    assert f"{AT_SYNC} " in out
    assert "no order of sending takes less than" in out
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_table_has_a_row_for_each_way_with_its_share_of_the_first() -> None:
    runs = [a_run(AT_SYNC, 3.0), a_run("chunks", 2.0), a_run(AT_SYNC, 4.0), a_run("chunks", 2.2)]
    runs = [replace(one, predicted=predicted(one.total * 1.1)) for one in runs]
    rows = {row[0]: row[1:] for row in shown(runs) if row}
    assert rows[AT_SYNC][:3] == ["2 of 2", "3.50 s [3.00 s .. 4.00 s]", "1.000"]
    assert rows["chunks"][:3] == ["2 of 2", "2.10 s [2.00 s .. 2.20 s]", "0.600"]
    assert rows["chunks"][3:5] == ["2.31 s [2.20 s .. 2.42 s]", "1.10"]


def test_way_that_never_converged_has_no_figures() -> None:
    rows = {row[0]: row[1:] for row in shown([a_run(AT_SYNC, 9.0, outcome=Outcome.DID_NOT_CONVERGE)]) if row}
    assert rows[AT_SYNC] == ["0 of 1", *["-"] * 7]


def test_plot_has_what_is_known_of_a_migration_with_many_passes(tmp_path: Path) -> None:
    known = a_run("chunks", 3.0, passes=(1, 2, 3))
    late = a_run("many passes", 3.0, passes=(40, 41, 42))
    draw(tmp_path / "a.svg", [known, replace(late, predicted=predicted(2.0))])
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(ValueError, match="not supported"):
        draw(tmp_path / "a.xyz", [known])

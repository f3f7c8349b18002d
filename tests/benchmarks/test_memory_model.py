"""The script with small numbers; its program in C against dirtylog and a slow oracle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.oracles import SetBitmap, to_bits
from support.require import require

from benchmarks import memory_model
from benchmarks.memory_model import PARTS, main, row
from benchmarks.support import compiled
from benchmarks.support.bitmaps import filled
from benchmarks.support.compiled import RunLister
from benchmarks.support.model import commit_figures
from benchmarks.support.timing import Figure, Operation, compare
from dirtylog.errors import HostError
from dirtylog.memory import Words
from dirtylog.units import KIB

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed does not matter here."""
    monkeypatch.setattr("benchmarks.support.timing._RUN_SECONDS", 1e-5)
    monkeypatch.setattr("benchmarks.support.model._REGIONS", (10, 20))
    monkeypatch.setattr("benchmarks.support.model._RANGES", (1, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "0 is not in the range"),
        (["--part", "disk"], "'disk' is not one of"),
        (["--bitmap", "1001"], "a bitmap of 1001 bytes is not made of 64-bit words"),
        (["--bitmap", "0"], "a bitmap of 0 bytes"),
        (["--bitmap", "big"], "'big' is not a size"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_bad_argument_is_refused(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_interrupt_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_model, "_measure", interrupt)
    assert main([]) == 130


def test_all_parts_are_timed_and_written_down(tmp_path: Path, capsys: Capture) -> None:
    result = tmp_path / "result.json"
    assert main(["--runs", "2", "--bitmap", "64K", "--json", str(result)]) == 0
    out = capsys.readouterr().out
    decoded = json.loads(result.read_text())
    assert decoded["setup"] == {"runs": 2, "parts": list(PARTS), "bitmaps": [64 * KIB]}
    assert decoded["host"]["peers"].keys() == {"dirtylog", "numpy"}
    names = [figure["name"] for figure in decoded["figures"]]
    assert len(names) == len(set(names)) == 2 + 2 + 6 + 6
    for figure in decoded["figures"]:
        assert figure["name"] in out
        assert len(figure["samples"]) == 2
        assert all(seconds > 0 for seconds in (*figure["samples"], *figure["raw"]))
    assert "…" not in out


def test_json_to_standard_output_is_alone_there(capsys: Capture) -> None:
    assert main(["--runs", "1", "--part", "look-up", "--json", "-"]) == 0
    assert [figure["name"] for figure in json.loads(capsys.readouterr().out)["figures"]] == [
        "look-up, 1 ranges",
        "look-up, 10 ranges",
    ]


def test_only_the_smallest_number_of_regions_has_a_limit() -> None:
    assert [figure.limit is not None for figure in commit_figures(1)] == [True, False]


def test_operation_and_raw_operation_take_turns_after_warming_up() -> None:
    calls: list[str] = []
    ours = Operation("ours", lambda: calls.append("ours"), before=lambda: calls.append("before"))
    raw = Operation("raw", lambda: calls.append("raw"), before=lambda: calls.append("before"))
    figure = compare(ours, raw, 3, limit=1.0, size=8)
    assert calls == ["before", "ours", "before", "raw"] * 4
    assert (figure.name, figure.raw_name, figure.limit, figure.size) == ("ours", "raw", 1.0, 8)
    assert (len(figure.samples), len(figure.raw)) == (3, 3)


@pytest.mark.parametrize(
    ("figure", "cells"),
    [
        (Figure("a", [1e-6, 3e-6, 2e-6]), ("a", "2.00 [1.00..3.00] us", "-", "-", "-", "-")),
        (
            Figure("b", [0.02], "C", [0.01], limit=0.02),
            ("b", "20.0 ms", "20.0 ms, met", "10.0 ms", "C", "2.0"),
        ),
        (Figure("c", [2.0, 0.5, 4.0], limit=1.5), ("c", "2.00 [0.50..4.00] s", "1.50 s, missed", "-", "-", "-")),
        (
            Figure("d", [1e-4, 2e-4, 5e-4], "memcpy", [1e-4], 2e-4, 1_000_000),
            ("d", "5.00 [2.00..10.00] GB/s", "5.00 GB/s, met", "10.0 GB/s", "memcpy", "2.0"),
        ),
    ],
)
def test_row_has_medians_with_extremes_and_the_verdict(figure: Figure, cells: tuple[str, ...]) -> None:
    assert row(figure) == cells


def test_bitmaps_have_the_bits_that_they_say() -> None:
    assert not filled(8 * KIB, 0).any()
    assert (~filled(8 * KIB, 100) == 0).all()
    share = np.bitwise_count(filled(64 * KIB, 1)).sum() / (64 * KIB * 8)
    assert 0.0098 < share <= 0.01


@pytest.mark.parametrize(
    "words",
    [
        [],
        [0],
        [1, 1 << 63, 1],
        [(1 << 64) - 1] * 3,
        [0x5555_5555_5555_5555, 0, (1 << 64) - 1],
        filled(8 * KIB, 1).tolist(),
    ],
    ids=["nothing", "zero", "ends", "full", "dense", "random"],
)
def test_program_in_c_finds_as_many_runs_as_the_oracle(words: list[int], tmp_path: Path) -> None:
    lister = RunLister.compiled(tmp_path)
    require("cc", lister is not None, "there is no C compiler")
    assert lister is not None
    bitmap: Words = np.array(words, np.uint64)
    oracle = SetBitmap(bitmap.size * 64)
    oracle.bits = to_bits(bitmap)
    found, samples = lister.measure(bitmap, 2)
    assert found == len(oracle.runs())
    assert len(samples) == 2


def test_lack_of_a_compiler_leaves_out_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunLister.compiled(tmp_path) is None
    assert main(["--runs", "1", "--part", "bitmap", "--bitmap", "8K", "--json", "-"]) == 0
    listed = [one for one in json.loads(capsys.readouterr().out)["figures"] if one["name"].startswith("list")]
    assert [(one["raw_name"], one["raw"]) for one in listed] == [(None, [])] * 3


def test_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("cc", shutil.which("cc") or shutil.which("gcc"), "there is no C compiler")
    source = tmp_path / "wrong.c"
    source.write_text("this is not C")
    monkeypatch.setattr(compiled, "SOURCE", source)
    with pytest.raises(HostError, match=r"wrong\.c failed: .*error"):
        RunLister.compiled(tmp_path)

"""The soak test of trackers, which must be sure to fail when a tracker does."""

import json
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dirtylog.errors import HostError
from dirtylog.memory import Words
from dirtylog.testing import Case, Differences, ModelCase, ModelTracker, Writing
from dirtylog.testing.mechanisms import MECHANISMS, Mechanism
from tools import soak
from tools.soak import main, pages_of


class LosesTheLastPage(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        words[(self.pages - 1) // 64] &= ~np.uint64(1 << (self.pages - 1) % 64)


def make(tracker: type[ModelTracker], pages: int) -> Case:
    bus = threading.RLock()
    return ModelCase(tracker(pages, bus=bus), bus)


def make_nothing(pages: int) -> Case:
    raise HostError("there is no such thing here")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the table of trackers."""

    def replace(*rows: Mechanism) -> None:
        for name in list(MECHANISMS):
            monkeypatch.delitem(MECHANISMS, name)
        for row in rows:
            monkeypatch.setitem(MECHANISMS, row.name, row)
        monkeypatch.setattr(soak, "pages_of", lambda seed: 70)

    return replace


def row(name: str, maker: Callable[[int], Case], differences: Differences = Differences()) -> Mechanism:  # noqa: B008
    return Mechanism(name, maker, differences, (Writing.THREADS,))


def test_trackers_are_run_and_shown(rows: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    blind = Differences(blind_to={Writing.THREADS: "nobody writes it"})
    rows(row("good", partial(make, ModelTracker)), row("absent", make_nothing), row("blind", make_null, blind))

    assert main(["--rounds", "5"]) == 0

    shown = capsys.readouterr().out
    assert "good" in shown
    assert "% of pages reported" in shown
    assert "not here: there is no such thing here" in shown
    assert "not seen, as declared" in shown


def make_null(pages: int) -> Case:
    """Stores are not told to the tracker."""
    return Case(ModelTracker(pages), np.zeros(pages * 4096, np.uint8))


def test_first_violation_ends_it_and_says_how_to_repeat_it(
    rows: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    rows(row("broken", partial(make, LosesTheLastPage)), row("good", partial(make, ModelTracker)))

    assert main(["--rounds", "500", "--seed", "7"]) == 1

    output = capsys.readouterr()
    assert "broken: round" in output.out
    assert "pages 69 of 70 were written" in output.err
    assert "tools/soak.py --tracker broken --writer threads --seed 7" in output.err
    assert "good" not in output.out


def test_results_are_written_as_json(
    rows: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(row("good", partial(make, ModelTracker)))

    assert main(["--rounds", "4", "--seed", "3", "--json", str(tmp_path / "soak.json")]) == 0
    assert main(["--rounds", "4", "--seed", "3", "--json", "-"]) == 0

    output = capsys.readouterr().out
    written = json.loads((tmp_path / "soak.json").read_text())
    assert json.loads(output[output.index("{\n") :]).keys() == written.keys()
    assert (written["seed"], written["results"][0]["tracker"], written["results"][0]["rounds"]) == (3, "good", 4)


def test_time_is_limited(rows: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    rows(row("good", partial(make, ModelTracker)))
    assert main(["--seconds", "1ms"]) == 0
    assert "good" in capsys.readouterr().out


def test_rounds_are_shared_by_the_writers(
    rows: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_shared(pages: int) -> Case:
        return MECHANISMS_BEFORE["null"].make(pages)

    rows(
        Mechanism(
            "null",
            make_shared,
            MECHANISMS_BEFORE["null"].differences,
            (Writing.THREADS, Writing.PROCESSES, Writing.UNICORN),
        )
    )
    assert main(["--rounds", "30", "--json", str(tmp_path / "json")]) == 0
    results = json.loads((tmp_path / "json").read_text())["results"]
    assert [result["rounds"] for result in results] == [10, 10, 10]


MECHANISMS_BEFORE = dict(MECHANISMS)


def test_interrupt_ends_it_with_the_results_so_far(
    rows: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupts(ModelTracker):
        def _collect(self, words: Words) -> None:
            raise KeyboardInterrupt

    before = threading.active_count()
    rows(row("good", partial(make, ModelTracker)), row("last", partial(make, Interrupts)))

    assert main(["--rounds", "5"]) == 128 + signal.SIGINT

    assert "good" in capsys.readouterr().out
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--tracker", "nonsense"], ["--writer", "me"], ["--seconds", "5"], ["--seed", "-1"]],
)
def test_bad_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_sizes_are_of_all_kinds() -> None:
    sizes = {pages_of(seed) for seed in range(300)}
    assert {1, 63, 64, 65} <= sizes
    assert max(sizes) > 2000
    assert sum(size % 64 != 0 for size in sizes) > 0.9 * len(sizes)

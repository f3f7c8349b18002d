import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import machine
from support.waiting import Task, wait_until

from dirtylog.cli.main import main
from dirtylog.control.commands import Commands
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.display import Sample, TraceWriter
from dirtylog.memory import PageBitmap
from dirtylog.units import MIB, PAGE_SIZE

Capture = pytest.CaptureFixture[str]
Predict = Callable[..., int]

PAGES: Final = 4 * MIB // PAGE_SIZE
BLOCKS: Final = {"ram": PAGES, "rom": 64}
SPEED: Final = "1M"
"""A second: all contents take four."""


def written(name: str, pages: list[int]) -> PageBitmap:
    bitmap = PageBitmap(BLOCKS[name])
    for page in pages:
        bitmap.set(page, 1)
    return bitmap


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A second in which 128 pages of 4 MiB are written every tenth, and one of the ROM."""
    path = tmp_path / "trace"
    with TraceWriter(path, BLOCKS, stored={"ram": PAGES, "rom": 0}) as writer:
        for number in range(10):
            pages = {"ram": written("ram", list(range(128))), "rom": written("rom", [5])}
            writer.append(Sample(0.1 * (number + 1), 0.1, pages))
    return path


@pytest.fixture
def predict(trace: Path) -> Predict:
    return lambda *options: main(["predict", str(trace), *options])


def forecasts(capsys: Capture) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


class TestForecast:
    def test_trace_is_migrated_in_computed_time(self, predict: Predict, capsys: Capture) -> None:
        assert predict("--bandwidth", SPEED, "--max-downtime", "1s", "--clear-chunk", "128M", "--json") == 0
        (found,) = forecasts(capsys)
        assert found["converges"]
        assert [one["pages"] for one in found["passes"]] == [PAGES]
        assert found["passes"][0]["dirtied"] == 129  # the ROM's page is after those of RAM
        assert found["downtime"] == pytest.approx(0.01 + 129 * PAGE_SIZE / MIB)
        assert found["total"] == pytest.approx(found["downtime"] + 4)
        assert found["bytes"] == (PAGES + 129) * PAGE_SIZE

    def test_all_combinations_are_tried_in_order(self, predict: Predict, capsys: Capture) -> None:
        options = ("--bandwidth", "1M,2M", "--max-downtime", "1s,2s", "--clear-chunk", "at-sync, 256K,at-sync")
        assert predict(*options, "--json") == 0
        found = [(one["bandwidth"], one["downtime-limit"], one["clear-chunk"]) for one in forecasts(capsys)]
        expected = [
            (speed * MIB, limit, chunk) for speed in (1.0, 2.0) for limit in (1.0, 2.0) for chunk in (None, 256 * 1024)
        ]
        assert found == expected

    def test_table_has_a_row_for_each(self, predict: Predict, capsys: Capture) -> None:
        assert predict("--bandwidth", SPEED, "--max-downtime", "300ms,1s", "--give-up", "20s") == 0
        head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
        assert head == ["bandwidth", "limit", "clear", "total", "downtime", "passes", "sent"]
        assert [" ".join(row) for row in rows] == [
            "1.0 MiB/s 300.0 ms at-sync for ever",
            "1.0 MiB/s 300.0 ms 128.0 MiB for ever",
            "1.0 MiB/s 1.00 s at-sync 4.51 s 513.9 ms 2 4.5 MiB",
            "1.0 MiB/s 1.00 s 128.0 MiB 4.51 s 513.9 ms 2 4.5 MiB",
        ]

    def test_what_the_switchover_has_is_counted(self, predict: Predict, capsys: Capture) -> None:
        options = (
            "--bandwidth",
            SPEED,
            "--first-bandwidth",
            "2M",
            "--clear-chunk",
            "128M",
            "--guest-speed",
            "0.5",
            "--json",
        )
        assert predict(*options, "--switchover-bandwidth", "4M", "--fixed-downtime", "100ms") == 0
        (found,) = forecasts(capsys)
        assert (found["first-bandwidth"], found["switchover-bandwidth"], found["guest-speed"]) == (
            2 * MIB,
            4 * MIB,
            0.5,
        )
        assert found["passes"][0]["seconds"] == pytest.approx(2.0)
        assert found["downtime"] == pytest.approx(0.1 + 129 * PAGE_SIZE / (4 * MIB))

    @pytest.mark.parametrize(("contents", "pages"), [("1M", 256), ("1", 1), ("1G", PAGES + 64)])
    def test_contents_are_as_many_as_the_user_says(
        self, predict: Predict, capsys: Capture, contents: str, pages: int
    ) -> None:
        options = ("--bandwidth", SPEED, "--max-downtime", "5s", "--contents", contents, "--json")
        assert predict(*options) == 0
        assert [one["passes"][0]["pages"] for one in forecasts(capsys)] == [pages] * 2


class TestPlot:
    @pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
    def test_plot_is_drawn_beside_the_table(
        self, predict: Predict, capsys: Capture, tmp_path: Path, name: str, start: bytes
    ) -> None:
        assert predict("--bandwidth", SPEED, "--give-up", "20s", "--plot", str(tmp_path / name)) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
        assert "for ever" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "status", "cause"),
        [("missing/a.png", 3, "cannot write the plot"), ("a.xyz", 2, "cannot draw")],
    )
    def test_plot_that_cannot_be_drawn_is_told(
        self, predict: Predict, capsys: Capture, tmp_path: Path, name: str, status: int, cause: str
    ) -> None:
        assert predict("--give-up", "1s", "--plot", str(tmp_path / name)) == status
        assert cause in capsys.readouterr().err

    def test_lack_of_matplotlib_is_told(
        self, predict: Predict, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert predict("--give-up", "1s", "--plot", str(tmp_path / "a.png")) == 2
        assert "--plot needs matplotlib\n  remedy: pip install 'dirtylog[plot]'" in capsys.readouterr().err


class Served:
    """A fake machine that runs and answers QMP."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        guest = stack.enter_context(machine("fake", boot=True))
        assert isinstance(guest, FakeMachine)
        self.guest = guest
        controller = Controller(guest)
        stack.callback(controller.close)
        registry = CommandRegistry()
        Commands(controller).register(registry)
        self.server = QMPServer(path, registry)
        stack.callback(self.server.close)
        self.server.start()
        guest.resume()


class TestRunningMachine:
    def test_machine_is_watched_and_forgotten(self, tmp_path: Path, capsys: Capture) -> None:
        with ExitStack() as stack:
            served = Served(stack, tmp_path / "qmp")
            options = ["--measure", "100ms", "--interval", "10ms", "--max-downtime", "10s", "--json"]
            assert main(["predict", str(tmp_path / "qmp"), *options]) == 0
            found = forecasts(capsys)
            assert len(found) == 4
            assert all(0 < one["passes"][0]["pages"] <= RAM_PAGES + ROM_PAGES for one in found)
            wait_until(lambda: not served.guest.memory.tracking, "nothing was logged any more")

    def test_interrupt_ends_it(self, tmp_path: Path, capsys: Capture) -> None:
        with ExitStack() as stack:
            served = Served(stack, tmp_path / "qmp")

            def interrupt() -> None:
                wait_until(lambda: bool(served.guest.memory.tracking), "the watch has begun")
                os.kill(os.getpid(), signal.SIGINT)

            task = Task(interrupt)
            assert main(["predict", str(tmp_path / "qmp"), "--measure", "1h", "--interval", "1min"]) == 130
            task.join()
            assert capsys.readouterr().out == ""
            wait_until(lambda: not served.guest.memory.tracking, "nothing was logged any more")


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            (["--bandwidth", "1Gbit,fast"], "'fast' is not a rate"),
            (["--bandwidth", "0"], "nothing can be migrated without bandwidth"),
            (["--clear-chunk", "0"], "a clear chunk of 0 bytes"),
            (["--max-downtime", "300"], "'300' is not a duration"),
        ],
    )
    def test_bad_option_is_refused(self, predict: Predict, capsys: Capture, options: list[str], cause: str) -> None:
        assert predict(*options) == 2
        assert cause in capsys.readouterr().err

    @pytest.mark.parametrize("options", [("--interval", "1ms"), ("--measure", "1s", "--interval", "2s")])
    def test_samples_that_cannot_be_are_refused(
        self, tmp_path: Path, capsys: Capture, options: tuple[str, ...]
    ) -> None:
        assert main(["predict", str(tmp_path / "qmp"), *options]) == 2
        assert "are none\n  remedy: give an --interval of 10ms or more" in capsys.readouterr().err

    def test_trace_without_samples_is_refused(self, tmp_path: Path, capsys: Capture) -> None:
        TraceWriter(tmp_path / "trace", BLOCKS).close()
        assert main(["predict", str(tmp_path / "trace")]) == 2
        assert "a workload without samples says nothing\n  remedy: record for some seconds" in capsys.readouterr().err

    def test_file_that_is_no_trace_is_refused(self, tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "trace").write_bytes(np.arange(100).tobytes())
        assert main(["predict", str(tmp_path / "trace")]) == 2
        assert "is not a good trace" in capsys.readouterr().err

    def test_machine_that_is_not_there_is_told(self, tmp_path: Path, capsys: Capture) -> None:
        assert main(["predict", str(tmp_path / "qmp")]) == 5
        assert "there is no QMP socket" in capsys.readouterr().err

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import machine
from support.terminal import Terminal
from support.waiting import Task, wait_until

from dirtylog.cli import watch as watch_module
from dirtylog.cli.main import main
from dirtylog.control.commands import Commands
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.display import TraceReader, WriteSampler
from dirtylog.units import PAGE_SIZE

Capture = pytest.CaptureFixture[str]
Watch = Callable[..., int]

QUICK: Final = ("--interval", "10ms", "--duration", "100ms")


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

    def watched(self) -> bool:
        return bool(self.guest.memory.tracking)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def served(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(watch_module, "_POLL_SECONDS", 0.005)
    with ExitStack() as stack:
        yield Served(stack, path)


@pytest.fixture
def watch(path: Path) -> Watch:
    return lambda *options: main(["watch", str(path), *options])


def nothing_is_logged(served: Served) -> None:
    wait_until(lambda: not served.watched(), "nothing was logged any more")


class TestOutput:
    def test_without_a_terminal_each_sample_is_a_line(self, served: Served, watch: Watch, capsys: Capture) -> None:
        assert watch(*QUICK) == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert 1 < len(lines) <= 10
        assert all("  running  " in line and "pages/s  working set: 1 s" in line for line in lines)
        assert [float(line.split()[0]) for line in lines] == sorted(float(line.split()[0]) for line in lines)
        assert lines[-1].endswith(f"of {(RAM_PAGES + ROM_PAGES) * PAGE_SIZE / 1024:.1f} KiB")
        assert "\x1b" not in out
        assert err == ""
        nothing_is_logged(served)

    def test_as_json_each_sample_is_an_object_on_a_line(self, served: Served, watch: Watch, capsys: Capture) -> None:
        assert watch(*QUICK, "--json") == 0
        samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(samples) > 1
        assert samples[-1]["time"] == pytest.approx(sum(sample["seconds"] for sample in samples))
        assert samples[-1]["time"] >= 0.1
        for sample in samples:
            assert sample["pages"] == sum(sample["blocks"].values())
            assert sample["bytes-per-second"] == pytest.approx(sample["pages"] * PAGE_SIZE / sample["seconds"])
            assert [one["window"] for one in sample["working-set"]] == [1, 10, 60]
        assert samples[-1]["written-ever"] > 0

    def test_on_a_terminal_it_is_a_map_and_a_line_stays(
        self, served: Served, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = Terminal(monkeypatch)
        with terminal:
            assert watch(*QUICK) == 0
        screen, left, after = terminal.text.partition("\x1b[?1049l")
        assert "\x1b[?1049h" in screen  # the alternate screen, and back
        assert left
        assert "last written within" in screen
        assert "working set" in screen
        assert "█" in screen
        assert "written in" in after
        assert "on average" in after
        assert "█" not in after

    def test_terminal_that_cannot_move_its_cursor_gets_lines(
        self, served: Served, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = Terminal(monkeypatch, "dumb")
        with terminal:
            assert watch(*QUICK) == 0
        assert "pages/s  working set: 1 s" in terminal.text
        assert "\x1b" not in terminal.text

    def test_interval_longer_than_the_duration_gives_one_sample(
        self, served: Served, watch: Watch, capsys: Capture
    ) -> None:
        assert watch("--interval", "1h", "--duration", "20ms") == 0
        assert len(capsys.readouterr().out.splitlines()) == 1


class TestRecord:
    def test_trace_has_what_was_shown(self, served: Served, watch: Watch, capsys: Capture, tmp_path: Path) -> None:
        assert watch(*QUICK, "--json", "--record", str(tmp_path / "trace")) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        trace = TraceReader(tmp_path / "trace")
        assert trace.blocks == {"ram": RAM_PAGES, "rom": ROM_PAGES}
        assert trace.stored["rom"] == served.guest.memory.blocks["rom"].stored
        assert 0 < trace.stored["ram"] <= RAM_PAGES
        assert [(one.time, one.seconds, one.pages) for one in trace] == [
            (one["time"], one["seconds"], one["pages"]) for one in shown
        ]

    def test_place_that_cannot_be_written_is_told_and_nothing_is_logged(
        self, served: Served, watch: Watch, capsys: Capture, tmp_path: Path
    ) -> None:
        assert watch(*QUICK, "--record", str(tmp_path / "missing/trace")) == 3
        assert "cannot write the trace" in capsys.readouterr().err
        nothing_is_logged(served)

    def test_earlier_trace_is_kept_if_the_machine_is_not_there(
        self, watch: Watch, capsys: Capture, tmp_path: Path
    ) -> None:
        (tmp_path / "trace").write_text("precious")
        assert watch(*QUICK, "--record", str(tmp_path / "trace")) == 5
        assert "there is no QMP socket" in capsys.readouterr().err
        assert (tmp_path / "trace").read_text() == "precious"


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
    def test_signal_ends_it_and_leaves_a_whole_trace(
        self, served: Served, watch: Watch, capsys: Capture, tmp_path: Path, number: signal.Signals
    ) -> None:
        trace = tmp_path / "trace"

        def interrupt() -> None:
            wait_until(lambda: trace.exists() and trace.stat().st_size > 500, "some samples were recorded")
            os.kill(os.getpid(), number)

        task = Task(interrupt)
        assert watch("--interval", "10ms", "--record", str(trace)) == 130
        task.join()
        out, err = capsys.readouterr()
        assert len(list(TraceReader(trace))) == len(out.splitlines())
        assert err == ""
        nothing_is_logged(served)

    def test_signal_on_a_terminal_leaves_it_as_it_was(
        self, served: Served, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = Terminal(monkeypatch)

        def interrupt() -> None:
            terminal.wait_for("last written within")
            os.kill(os.getpid(), signal.SIGINT)

        task = Task(interrupt)
        with terminal:
            assert watch("--interval", "10ms") == 130
        task.join()
        assert terminal.text.count("\x1b[?1049h") == terminal.text.count("\x1b[?1049l") == 1
        assert "on average" in terminal.text.rpartition("\x1b[?1049l")[2]

    def test_signal_before_the_first_sample_ends_it_too(self, served: Served, watch: Watch, capsys: Capture) -> None:
        def interrupt() -> None:
            wait_until(served.watched, "the watch has begun")
            os.kill(os.getpid(), signal.SIGINT)

        task = Task(interrupt)
        assert watch("--interval", "1h") == 130
        task.join()
        assert capsys.readouterr() == ("", "")

    def test_machine_that_ends_is_told(self, served: Served, watch: Watch, path: Path, capsys: Capture) -> None:
        def end() -> None:
            wait_until(served.watched, "the watch has begun")
            served.server.close()

        task = Task(end)
        assert watch("--interval", "10ms") == 5
        task.join()
        assert capsys.readouterr().err == f"dirtylog: error: the machine of {path} has ended\n"

    def test_status_of_a_machine_that_stands_still_is_told(self, served: Served, watch: Watch, capsys: Capture) -> None:
        served.guest.pause()
        assert watch(*QUICK) == 0
        assert all("  paused  0 B/s  0 pages/s" in line for line in capsys.readouterr().out.splitlines())


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            (["--interval", "1"], "'1' is not a duration"),
            (["--interval", "1ms"], "--interval of 0.001 s is too short\n  remedy: 10ms is the shortest"),
            (["--duration", "0s"], "--duration of 0 s is too short"),
            (["--record", "."], "is a directory"),
        ],
    )
    def test_bad_options_are_refused_before_the_machine_hears_of_them(
        self, watch: Watch, capsys: Capture, options: list[str], cause: str
    ) -> None:
        assert watch(*options) == 2
        assert cause in capsys.readouterr().err

    def test_process_that_is_no_machine_is_refused(self, capsys: Capture) -> None:
        assert main(["watch", str(os.getpid())]) == 2
        assert f"process {os.getpid()} is not a machine" in capsys.readouterr().err

    def test_server_that_cannot_watch_is_refused(self, path: Path, watch: Watch, capsys: Capture) -> None:
        with QMPServer(path, CommandRegistry()) as server:
            server.start()
            assert watch(*QUICK) == 2
        assert "cannot tell which pages are written" in capsys.readouterr().err

    def test_machine_that_cannot_be_watched_says_why(self, served: Served, watch: Watch, capsys: Capture) -> None:
        with WriteSampler(served.guest.memory).watch():
            assert watch(*QUICK) == 5
        assert "the memory is watched by another sampler" in capsys.readouterr().err

"""The script with little memory; the program in C against dirtylog; the limits."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.require import require

from benchmarks import trackers
from benchmarks.support import compiler
from benchmarks.support.compiler import compile_program, need_header
from benchmarks.support.tracker_report import collect_and_clear, judge, judge_arming
from benchmarks.support.tracker_runs import CASES, CHUNK_PAGES, STEPS, SUBJECTS, Case, Measurement, _Pair, measure
from benchmarks.support.tracker_sides import Raw, Side, compile_raw
from benchmarks.trackers import main
from dirtylog.errors import HostError, PeerError, UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.memory.bitmap import Numbers
from dirtylog.units import GIB, MIB, PAGE_SIZE

Capture = pytest.CaptureFixture[str]

PAGES = MIB // PAGE_SIZE
OWN = [name for name in SUBJECTS if not name.startswith("kvm") and SUBJECTS[name].has_raw]
GUESTS = [name for name in SUBJECTS if name.startswith("kvm")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in C."""
    require("cc", shutil.which("cc") or shutil.which("gcc"), "there is no C compiler")
    return compile_raw(tmp_path_factory.mktemp("program"))


def has_xxhash() -> bool:
    return Path("/usr/include/xxhash.h").exists()


def measured(
    tracker: str, percent: int, ours: float, raw: float, arm: float = 1e-3, raw_arm: float = 1e-3
) -> Measurement:
    """A collect and a clear that take that long together."""

    def side(both: float, armed: float) -> dict[str, list[float]]:
        return {step: [0.0] for step in STEPS} | {"collect": [both / 4], "clear": [both * 3 / 4], "arm": [armed]}

    return Measurement(tracker, Case(percent), GIB, 0, side(ours, arm), side(raw, raw_arm))


class Recorder(Side):
    """Notes what is asked of it, and finds as many pages as it is told to."""

    def __init__(self, name: str, calls: list[str], found: int) -> None:
        self._name = name
        self._calls = calls
        self._found = found

    def choose(self, pages: Numbers) -> None:
        self._note(f"choose {pages.size}")

    def write(self) -> float:
        return self._note("write")

    def arm(self) -> float:
        return self._note("arm")

    def collect(self) -> tuple[float, int]:
        return self._note("collect"), self._found

    def clear(self, step: int) -> float:
        return self._note(f"clear {step}")

    def disarm(self) -> float:
        return self._note("disarm")

    def close(self) -> None:
        self._note("close")

    def _note(self, call: str) -> float:
        self._calls.append(f"{self._name} {call}")
        return float(len(self._calls))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "0 is not in the range"),
        (["--tracker", "guess"], "'guess' is not one of"),
        (["--size", "4K"], "4096 bytes are not whole MiB"),
        (["--size", "0"], "0 bytes are not whole MiB"),
        (["--size", "big"], "'big' is not a size"),
        (["--chart", __file__], "is a file"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_bad_argument_is_refused(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_more_than_a_guest_can_write_is_refused(program: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be measured on more than 3\.0 GiB"):
        next(measure("kvm-manual", 4 * GIB, CASES, 1, program))


def test_interrupt_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trackers, "_measure", interrupt)
    assert main([]) == 130


@pytest.mark.usefixtures("program")
def test_everything_is_written_down(tmp_path: Path, capsys: Capture) -> None:
    result = tmp_path / "result.json"
    chosen = ["comparison", "null"]
    options = [argument for name in chosen for argument in ("--tracker", name)]
    assert main(["--size", "1M", "--runs", "2", *options, "--json", str(result)]) == 0
    out = capsys.readouterr().out
    decoded = json.loads(result.read_text())
    assert decoded["setup"] == {"runs": 2, "size": MIB, "trackers": chosen}
    assert decoded["host"]["peers"].keys() == {"dirtylog", "numpy"}
    assert decoded["left_out"] == {}
    assert [one["tracker"] for one in decoded["measurements"]] == [name for name in chosen for _ in CASES]
    for one in decoded["measurements"]:
        writes = 2 if one["pages"] else 0
        lengths = {step: writes if step == "first write" else 2 for step in STEPS}
        assert {step: len(times) for step, times in one["ours"].items()} == lengths
        assert one["raw"] == {} if one["tracker"] == "null" else one["raw"].keys() == set(STEPS)
    for case in CASES:
        assert out.count(case.name) >= len(chosen)
    assert "…" not in out


@pytest.mark.usefixtures("program")
def test_json_to_standard_output_is_alone_there(capsys: Capture) -> None:
    assert main(["--size", "1M", "--runs", "1", "--tracker", "null", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == len(CASES)


@pytest.mark.usefixtures("program")
def test_tables_are_markdown_if_asked_for(capsys: Capture) -> None:
    assert main(["--size", "1M", "--runs", "1", "--tracker", "comparison", "--markdown"]) == 0
    *lines, host = capsys.readouterr().out.splitlines()
    assert host.startswith("Linux ")
    rows = [line.strip() for line in lines if line.strip()]
    assert all(line.startswith("|") and line.endswith("|") for line in rows)
    assert len(rows) == (2 + 1) + (2 + 2 * len(CASES))


@pytest.mark.usefixtures("program")
def test_each_tracker_gets_a_chart(tmp_path: Path) -> None:
    require("matplotlib", find_spec("matplotlib"), "matplotlib is not installed: pip install 'dirtylog[plot]'")
    folder = tmp_path / "new" / "charts"
    options = ["--tracker", "comparison", "--tracker", "null"]
    assert main(["--size", "1M", "--runs", "1", *options, "--chart", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.png", "null.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


@pytest.mark.usefixtures("program")
def test_tracker_that_the_host_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def lacking(name: str, *_: object) -> Iterator[Measurement]:
        raise HostError(f"there is no {name}", remedy="buy one")

    monkeypatch.setattr(trackers, "measure", lacking)
    assert main(["--tracker", "null"]) == 0
    assert "null is left out: there is no null; buy one" in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_both_sides_find_the_written_pages_and_no_others(name: str, program: Path) -> None:
    if name == "hashes":
        require("xxhash", has_xxhash(), "libxxhash-dev is not installed")
    check_both(name, program)


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.usefixtures("kvm")
def test_both_guests_write_the_chosen_pages_and_no_others(name: str, program: Path) -> None:
    check_both(name, program)


def check_both(name: str, program: Path) -> None:
    subject = SUBJECTS[name]
    try:
        ours = subject.open(MIB)
        with closing(ours):
            ours.arm()
    except HostError as error:
        require(name, False, str(error))
    with closing(subject.open(MIB)) as ours, closing(Raw(program, name, MIB)) as raw:
        for side in (ours, raw):
            side.choose(np.array([0, 1, 2, 7, 64, 130, PAGES - 1]))
            side.write()
            side.arm()
            if subject.all_first:
                assert side.collect()[1] == PAGES
                side.clear(PAGES)
            assert side.collect()[1] == 0
            for step in (PAGES, 64, CHUNK_PAGES):
                side.write()
                assert side.collect()[1] == 7
                side.clear(step)
                assert side.collect()[1] == 0
            side.disarm()


@pytest.mark.usefixtures("kvm")
def test_guest_is_measured(kvm: KVM, program: Path) -> None:
    cases = (Case(0), Case(100))
    found = list(measure("kvm-manual", MIB, cases, 1, program))
    assert [(one.case, one.pages) for one in found] == [(cases[0], 0), (cases[1], PAGES)]
    assert all(one.ours["collect"][0] > 0 and one.raw["collect"][0] > 0 for one in found)


def test_each_side_goes_through_all_steps_before_the_other_does() -> None:
    calls: list[str] = []
    pair = _Pair([Recorder("ours", calls, 9), Recorder("C", calls, 9)], 1 << 16, all_first=True)
    samples = pair.measure(np.arange(9), 2)
    before = ["write", "write", "arm", "collect", "clear 65536"]
    steps = [*before, "write", "collect", "clear 32768", "write", "collect", "clear 65536", "disarm"]
    warmed_up = [f"{side} {step}" for side in ("ours", "C") for step in ("choose 9", *steps)]
    measured = [f"{side} {step}" for side in ("ours", "C", "C", "ours") for step in steps]
    assert calls == warmed_up + measured
    assert all(len(times) == 2 for side in samples for times in side.values())
    assert samples[0]["first write"] == [(6 - 2) / 9] * 2


@pytest.mark.parametrize("found", [0, 8])
def test_missed_page_is_an_error(found: int) -> None:
    pair = _Pair([Recorder("ours", [], found)], 100, all_first=False)
    with pytest.raises(PeerError, match=f"Recorder found {found} pages where 9 were written"):
        pair.measure(np.arange(9), 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_has_the_pages_that_it_says(case: Case) -> None:
    total = GIB // PAGE_SIZE
    pages = case.pages(total)
    assert (np.diff(pages) > 0).all()
    assert not pages.size or (pages[0] >= 0 and pages[-1] < total)
    assert abs(pages.size - total * case.percent // 100) < 64
    assert (pages == case.pages(total)).all()
    runs = int((np.diff(pages) != 1).sum())
    if "runs" in case.layout:
        assert runs < pages.size // 64
    elif case.layout:
        assert runs > pages.size // 3


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_case_of_little_memory_is_not_empty(case: Case) -> None:
    assert case.pages(PAGES).size > 0


@pytest.mark.parametrize(
    ("percent", "ours", "raw", "met"),
    [
        (1, 1.5e-3, 1e-3, True),
        (1, 1.6e-3, 1e-3, False),
        (100, 1.5e-4, 1e-4, True),
        (0, 1.29e-3, 1e-3, True),
        (0, 1.31e-3, 1e-3, False),
        (0, 2.9e-4, 1e-6, True),
    ],
)
def test_limit_is_relative_to_the_system_calls(percent: int, ours: float, raw: float, met: bool) -> None:
    one = measured("write-watch", percent, ours, raw)
    verdict = judge(one)
    assert verdict is not None
    assert collect_and_clear(one.ours) == [pytest.approx(ours)]
    assert verdict.met is met
    assert str(verdict).endswith(", met" if met else ", missed")


@pytest.mark.parametrize("tracker", ["comparison", "hashes", "null"])
def test_what_makes_no_system_calls_has_no_limit(tracker: str) -> None:
    assert judge(measured(tracker, 10, 1.0, 1e-3)) is None


@pytest.mark.parametrize(
    ("ours", "raw", "text"),
    [(3.2e-3, 1e-3, "3.20, met"), (3.3e-3, 3.1e-3, "3.20, missed"), (9e-3, 8e-3, "3.20, missed by both")],
)
def test_limit_of_arming_tells_whether_the_system_calls_alone_exceed_it(ours: float, raw: float, text: str) -> None:
    verdict = judge_arming(
        [measured("write-watch", 0, 0.0, 0.0, ours, raw), measured("write-watch", 1, 0.0, 0.0, ours, raw)]
    )
    assert str(verdict) == text


def test_program_that_fails_is_told(program: Path) -> None:
    with closing(Raw(program, "guess", MIB)) as raw:
        with pytest.raises(PeerError, match=r"failed at 'arm' of guess: usage: trackers NAME"):
            raw.arm()
        raw.close()


def test_page_outside_is_refused_by_the_program(program: Path) -> None:
    with closing(Raw(program, "comparison", MIB)) as raw, pytest.raises(PeerError, match="failed at 'pages 1'"):
        raw.choose(np.array([PAGES]))


def test_compiler_that_fails_is_told(tmp_path: Path) -> None:
    require("cc", shutil.which("cc") or shutil.which("gcc"), "there is no C compiler")
    source = tmp_path / "wrong.c"
    source.write_text("this is not C")
    with pytest.raises(HostError, match=r"wrong\.c failed: .*error"):
        compile_program(tmp_path, [source])


def test_lack_of_a_compiler_that_cannot_be_installed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installer = tmp_path / "install"
    installer.write_text('#!/bin/sh\necho "no root for $*" >&2\nexit 1\n')
    installer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(compiler, "_INSTALL", installer)
    with pytest.raises(HostError, match="no root for gcc libc6-dev; install gcc libc6-dev by hand"):
        compile_raw(tmp_path)


def test_header_that_is_missing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cc", shutil.which("cc") or shutil.which("gcc"), "there is no C compiler")
    asked: list[str] = []
    monkeypatch.setattr(compiler, "_install", asked.append)
    need_header("stdio.h", "libc6-dev")
    assert asked == []
    need_header("no-such-header.h", "libnone-dev")
    assert asked == ["libnone-dev"]

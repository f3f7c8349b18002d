"""The script as its users start it; what it prints is what it found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.benchmark_runs import require_assembler
from support.require import require

from benchmarks.support.peers import QEMU_PROGRAM
from benchmarks.support.pulses import ARRIVAL_SECONDS
from benchmarks.versus_qemu import main
from dirtylog.linux.kvm import KVM

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "versus_qemu.py"
SMALL = ["--runs", "1", "--memory", "64M", "--range", "1M-8M"]


@pytest.fixture
def qemu(kvm: KVM) -> None:
    require("qemu", shutil.which(QEMU_PROGRAM), f"{QEMU_PROGRAM} is not installed")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the script makes its own; pytest's would be too long a path for sockets."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_about(folder: Path) -> list[str]:
    """The command lines that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in lines if str(folder) in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--range", "3M"], "'' is not a size"),
        (["--range", "5-9"], "not whole pages"),
        (["--range", "1M-2G"], "the guest cannot have memory up to 0x80000000 in 0x40000000 bytes"),
        (["--pulse", "5-9"], "not whole pages"),
        (["--pulse", "1M-2G"], "the guest cannot have memory up to 0x80000000 in 0x40000000 bytes"),
        (["--bandwidth", "fast"], "'fast' is not a rate"),
        (["--idle", "1G"], "the guest cannot have memory up to 0x40100000 in 0x40000000 bytes"),
        (["--idle", "1M", "--memory", "1G", "--memory", "1M"], "up to 0x200000 in 0x100000 bytes"),
        (["--channels", "0"], "0 is not in the range"),
        (["--peer", "xen"], "'xen' is not one of"),
        (["--memory", "1000001"], "not whole MiB"),
        (["--memory", "0"], "not whole MiB"),
        (["--limit", "300"], "is not a duration"),
        (["--runs", "0"], "0 is not in the range"),
        (["--uri-scheme", "rdma"], "'rdma' is not one of"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_bad_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_lack_of_qemu_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([]) == 3
    assert "there is no qemu-system-x86_64; install" in capsys.readouterr().err


def test_both_peers_are_measured_in_turn(qemu: None, folder: Path) -> None:
    result = folder / "result.json"
    output, errors = start(folder, *SMALL, "--json", str(result)).communicate(timeout=100)
    decoded = json.loads(result.read_text())
    assert [run["peer"] for run in decoded["runs"]] == ["QEMU", "dirtylog"], errors
    assert [run["outcome"] for run in decoded["runs"]] == ["completed", "completed"]
    assert all(0 < run["downtime"] < run["total"] for run in decoded["runs"])
    assert all(run[side]["beyond_guest"] > 0 for run in decoded["runs"] for side in ("source", "destination"))
    assert [bool(run["x_passes"]) for run in decoded["runs"]] == [False, True]
    assert decoded["runs"][1]["bare"]["size"] == decoded["runs"][1]["x_passes"][-1]["bytes"]
    assert "guest writes 1..8 MiB" in output
    assert "bare copy of the final pass" in output
    assert errors.count("run 1 of 1") == 2
    assert list(folder.iterdir()) == [result]


def test_idle_guests_are_compared_with_bare_copies_on_several_channels_too(qemu: None, folder: Path) -> None:
    result = folder / "result.json"
    options = ["--runs", "1", "--memory", "64M", "--idle", "8M", "--channels", "2", "--json", str(result)]
    output, errors = start(folder, *options).communicate(timeout=100)
    runs = json.loads(result.read_text())["runs"]
    assert [(run["peer"], run["outcome"]) for run in runs] == [("QEMU", "completed"), ("dirtylog", "completed")], errors
    assert all(run["bare_whole"]["size"] == run["bytes"] > 8 << 20 for run in runs)
    assert "guest is idle and has 8.0 MiB of random contents; 64.0 MiB, limit 300.0 ms, 2 channels" in output
    assert "speed, of the bare copy's" in output
    assert list(folder.iterdir()) == [result]


def test_guests_of_both_peers_are_heard_on_both_sides(qemu: None, folder: Path) -> None:
    require_assembler()
    result = folder / "result.json"
    options = ["--runs", "1", "--memory", "64M", "--pulse", "1M-8M", "--json", str(result)]
    output, errors = start(folder, *options).communicate(timeout=100)
    runs = json.loads(result.read_text())["runs"]
    assert [(run["peer"], run["outcome"]) for run in runs] == [("QEMU", "completed"), ("dirtylog", "completed")], errors
    assert all(abs(run["silence"]) < ARRIVAL_SECONDS for run in runs)
    assert "silence of the guest" in output
    assert "silence - downtime, run by run" in output
    assert list(folder.iterdir()) == [result]


def test_limited_speeds_are_compared_with_each_limit(qemu: None, folder: Path) -> None:
    result = folder / "result.json"
    options = ["--runs", "1", "--memory", "64M", "--idle", "8M", "--bandwidth", "20M", "--bandwidth", "320Mbit"]
    output, errors = start(folder, *options, "--json", str(result)).communicate(timeout=100)
    runs = json.loads(result.read_text())["runs"]
    assert [(run["peer"], run["outcome"]) for run in runs] == [("QEMU", "completed"), ("dirtylog", "completed")] * 2
    assert all(0 < run["share_of_limit"] < 1.25 and run["bare_whole"] is None for run in runs)
    assert errors.count("at most 20.0 MiB/s") == errors.count("at most 38.1 MiB/s") == 2
    assert output.count("speed, of the limit") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(qemu: None, folder: Path, number: signal.Signals) -> None:
    process = start(folder, *SMALL)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*/destination.qmp")):
        assert time.monotonic() < deadline
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)
    assert processes_about(folder)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert output == ""
    assert processes_about(folder) == []
    assert list(folder.iterdir()) == []

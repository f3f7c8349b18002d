import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.processes import ROOT, environment
from support.require import require
from support.watches import EXACT, supported

_EXAMPLE = ROOT / "examples/incremental_checkpoint.py"
_SMALL = ("--rows", "256", "--checkpoints", "5")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(_EXAMPLE), *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("tracker", EXACT)
def test_checkpoints_are_restored_and_smaller_than_whole_ones(tracker: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints"
    done = run(*_SMALL, "--tracker", supported(tracker), "--file", str(file))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"watched by {tracker}" in done.stdout
    assert "6 checkpoints were restored: all are equal" in done.stdout
    assert re.search(r"whole ones would take 6\.0 MiB, \d+\.\d times", done.stdout)
    assert 1 << 20 < file.stat().st_size < 6 << 20


def test_picture_is_drawn(tmp_path: Path) -> None:
    require("matplotlib", find_spec("matplotlib"), "matplotlib is not installed: pip install 'dirtylog[plot]'")
    picture = tmp_path / "picture.png"
    done = run(*_SMALL, "--plot", str(picture))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rows", "10"), "the plate has 192 rows at least"),
        (("--checkpoints", "0"), "one checkpoint at least"),
        (("--tracker", "magic"), "no tracker 'magic'"),
        (("--file", "/no/such/folder/file"), "No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], reason: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert reason in done.stderr


def test_picture_in_the_documentation_is_small() -> None:
    assert 0 < (ROOT / "docs/images/incremental-checkpoint.png").stat().st_size < 100_000

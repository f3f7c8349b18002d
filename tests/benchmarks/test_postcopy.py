import json
from pathlib import Path

import pytest

from benchmarks.postcopy import main
from dirtylog.linux.kvm import KVM


def test_guest_that_is_handed_over_early_notes_how_long_it_waits(
    kvm: KVM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--peer", "dirtylog", "--runs", "1", "--memory", "65M", "--hot", "64M", "--json", str(out)]) == 0
    (run,) = json.loads(out.read_bytes())["runs"]
    assert 0 < run["latency"] <= run["latency_99"] < run["total"]
    assert run["requests"] > 0
    assert "fault latency, median" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--memory", "513.5M"), ("--memory", "1M"), ("--hot", "1G"), ("--hot", "0")])
def test_guest_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]) -> None:
    assert main([*arguments]) == 2
    assert "has to fit" in capsys.readouterr().err

import json
from pathlib import Path

import pytest

from benchmarks.live_update import main
from dirtylog.linux.kvm import KVM


def test_guest_that_is_handed_over_and_copied_is_measured_both_ways(
    kvm: KVM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", "1", "--memory", "513M", "--json", str(tmp_path / "out")]) == 0
    runs = json.loads((tmp_path / "out").read_bytes())["runs"]
    assert [(run["peer"], run["outcome"]) for run in runs] == [("copied", "completed"), ("handed over", "completed")]
    assert [run["pages"] > 0 for run in runs] == [True, False]
    assert "handed over / copied" in capsys.readouterr().out


@pytest.mark.parametrize(("memory", "reason"), [("513.5M", "not whole MiB"), ("1M", "give more with --memory")])
def test_guest_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], memory: str, reason: str) -> None:
    assert main(["--memory", memory]) == 2
    assert reason in capsys.readouterr().err

"""The engine is a large package that only `make fuzz` installs."""

import importlib.util
from pathlib import Path

import pytest
from support.require import require

from tools.fuzz import __main__ as fuzz_main
from tools.fuzz.__main__ import main
from tools.fuzz.targets import TARGETS


@pytest.fixture
def engine() -> None:
    require("atheris", importlib.util.find_spec("atheris"), "atheris is not installed: 'make fuzz' does that")


@pytest.mark.usefixtures("engine")
def test_target_is_fuzzed_for_so_many_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "body", "--runs", "2000", "--folder", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert "2,000" in out
    assert "none" in out
    assert err == ""


@pytest.mark.usefixtures("engine")
def test_many_inputs_are_run_by_one_engine_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz_main, "ROUND", 1500)
    assert main(["--target", "body", "--runs", "2000", "--folder", str(tmp_path)]) == 0
    assert "2,000" in capfd.readouterr().out
    assert "Done 500 runs" in (tmp_path / "body.log").read_text()


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--seconds", "5"], ["--target", "nonsense"]])
def test_bad_option_is_refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert arguments[0] in capfd.readouterr().err


def test_targets_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    for name in TARGETS:
        assert f"`{name}`" in text

from pathlib import Path

import pytest

from dirtylog.cli.main import main
from dirtylog.guests import random_writer
from dirtylog.guests.dirtier import DEFAULT_RANGE, build
from dirtylog.units import MIB


def test_image_is_the_dirtiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", str(tmp_path / "a.img"), "--first", "2M", "--last", "3M"]) == 0
    assert (tmp_path / "a.img").read_bytes() == build(2 * MIB, 3 * MIB)
    assert capsys.readouterr() == ("", "")


def test_default_range_is_that_of_the_shipped_image(tmp_path: Path) -> None:
    assert main(["guest", str(tmp_path / "a.img")]) == 0
    assert (tmp_path / "a.img").read_bytes() == build(*DEFAULT_RANGE)


def test_random_pattern_is_the_random_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", str(tmp_path / "a.img"), "--pattern", "random", "--first", "2M", "--last", "3M"]) == 0
    assert (tmp_path / "a.img").read_bytes() == random_writer.build(2 * MIB, 3 * MIB)
    assert capsys.readouterr() == ("", "")


def test_rate_is_the_random_writers(tmp_path: Path) -> None:
    assert main(["guest", str(tmp_path / "a.img"), "--pattern", "random", "--rate", "720Mbit"]) == 0
    assert (tmp_path / "a.img").read_bytes() == random_writer.build(*DEFAULT_RANGE, rate=90_000_000)


def test_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"x" * 1000)
    assert main(["guest", str(tmp_path / "a.img")]) == 0
    assert len((tmp_path / "a.img").read_bytes()) == 512


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--first", "1000"], "the range 0x3e8 to 0x6400000 is not whole pages"),
        (["--first", "0"], "covers the guest's own code or counter"),
        (["--first", "2M", "--last", "2M"], "holds no page"),
        (["--last", "4G"], "reaches into the PCI hole"),
    ],
)
def test_impossible_range_is_refused_and_writes_nothing(
    arguments: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guest", str(tmp_path / "a.img"), *arguments]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("dirtylog: error: the range ")
    assert cause in first
    assert second.startswith("  remedy: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--rate", "90M"], "--rate is for --pattern random"),
        (["--pattern", "random", "--rate", "4K"], "cannot dirty 4096 bytes a second"),
    ],
)
def test_impossible_rate_is_refused_and_writes_nothing(
    arguments: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guest", str(tmp_path / "a.img"), *arguments]) == 2
    assert cause in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_size_without_sense_is_refused_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", str(tmp_path / "a.img"), "--last", "many"]) == 2
    assert "'--last': 'many' is not a size; write one like 4096, 512M or 1G" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing/a.img", "file/a.img"])
def test_file_that_cannot_be_written_is_reported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["guest", str(tmp_path / name)]) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"dirtylog: error: cannot write {tmp_path / name}: ")
    assert second == "  remedy: choose a place you may write to"


def test_folder_in_place_of_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err

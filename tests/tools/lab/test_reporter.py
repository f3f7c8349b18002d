"""The plugin in a pytest of its own, writing to a file instead of a serial port."""

import subprocess
import sys
from pathlib import Path
from typing import cast

import msgspec
import pytest
from support.processes import ROOT

from tools.lab.protocol import Event, Finished, Started
from tools.lab.reporter import ROUNDS, pytest_itemcollected

TESTS = """
import pytest

@pytest.fixture
def broken_end():
    yield
    raise ValueError("cannot clean up")

def test_good(): pass
def test_bad(): assert 1 == 2, "two lines\\nof text"
def test_skipped(): pytest.skip("no moon")
def test_bad_end(broken_end): pass
@pytest.mark.xfail(reason="known")
def test_expected(): assert False
"""

CONFTEST = """
import pathlib
from tools.lab.reporter import Reporter

def pytest_configure(config):
    config.pluginmanager.register(Reporter(str(pathlib.Path(__file__).with_name("events"))))
"""


def events(folder: Path, tests: str) -> list[Event]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", str(folder)]
    subprocess.run([*command, "-c", "/dev/null"], cwd=ROOT, capture_output=True)
    return [msgspec.json.decode(line, type=Event) for line in (folder / "events").read_bytes().splitlines()]


def test_suites_have_no_more_rounds_than_emulation_has_time_for() -> None:
    class Suite:
        rounds = 1000

        def test(self) -> None:
            pass

    class Item:
        cls = Suite

    pytest_itemcollected(cast(pytest.Item, Item()))
    assert Suite.rounds == ROUNDS
    pytest_itemcollected(cast(pytest.Item, object()))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return events(tmp_path_factory.mktemp("tests"), TESTS)


def test_each_start_is_followed_by_the_end(told: list[Event]) -> None:
    assert len(told) == 10
    for started, finished in zip(told[::2], told[1::2], strict=True):
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        assert started.test == finished.test


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("test_good", "passed", ""),
        ("test_bad", "failed", "AssertionError: two lines"),
        ("test_skipped", "skipped", "no moon"),
        ("test_bad_end", "failed", "ValueError: cannot clean up"),
        ("test_expected", "skipped", "xfail: known"),
    ],
)
def test_outcome_and_reason_are_pytests(told: list[Event], name: str, outcome: str, reason: str) -> None:
    (found,) = [event for event in told if isinstance(event, Finished) and event.test.endswith(f"::{name}")]
    assert (found.outcome, found.reason) == (outcome, reason)


def test_file_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    (event,) = events(tmp_path, "import nothing_of_this_name\n")
    assert isinstance(event, Finished)
    assert (event.test, event.outcome) == ("test_it.py", "failed")
    assert event.reason == "ModuleNotFoundError: No module named 'nothing_of_this_name'"


def test_file_that_skips_itself_is_told_of(tmp_path: Path) -> None:
    (event,) = events(tmp_path, "import pytest\npytest.skip('no sun', allow_module_level=True)\n")
    assert isinstance(event, Finished)
    assert (event.test, event.outcome, event.reason) == ("test_it.py", "skipped", "no sun")

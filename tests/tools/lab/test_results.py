from io import StringIO

import pytest
from rich.console import Console

from tools.lab.protocol import Ended, Event, Finished, Started
from tools.lab.results import Results


def ran(name: str, outcome: str = "passed", reason: str = "") -> list[Event]:
    return [Started(name), Finished(name, outcome, 0.5, reason)]


def shown(results: Results) -> list[list[str]]:
    console = Console(file=StringIO(), width=100)
    console.print(results.table())
    assert isinstance(console.file, StringIO)
    return [words for line in console.file.getvalue().splitlines() if len(words := line.split()) > 1]


def test_all_passed_is_no_problem() -> None:
    results = Results.of([*ran("a.py::one"), *ran("a.py::two", "skipped", "no such thing"), Ended(0)])
    assert results.problem(in_time=True) is None


def test_files_have_rows_in_the_order_they_ran() -> None:
    results = Results.of(
        [*ran("b.py::one"), *ran("a.py::one", "failed"), *ran("b.py::two"), *ran("a.py::two", "skipped"), Ended(1)]
    )
    assert shown(results) == [
        ["file", "passed", "failed", "skipped", "time"],
        ["b.py", "2", "-", "-", "1.00", "s"],
        ["a.py", "-", "1", "1", "1.00", "s"],
        ["all", "2", "1", "1", "2.00", "s"],
    ]


def test_skips_are_listed_by_reason_with_the_commonest_first() -> None:
    results = Results.of(
        [
            *ran("a.py::one", "skipped", "no moon"),
            *ran("a.py::two", "skipped", "no sun"),
            *ran("b.py::one", "skipped", "no sun"),
            *ran("b.py::two", "failed", "no sun"),
        ]
    )
    assert results.skips() == ["2 x no sun (a.py, b.py)", "1 x no moon (a.py)"]
    assert results.failures() == ["b.py::two: no sun"]


@pytest.mark.parametrize(
    ("events", "in_time", "problem"),
    [
        ([], True, "the guest died before the first test"),
        ([], False, "the time was over before the first test"),
        ([Started("a.py::one")], True, "the guest died in a.py::one"),
        ([Started("a.py::one")], False, "the time was over in a.py::one"),
        (ran("a.py::one"), True, "the guest died after a.py::one"),
        ([Started("a.py::one"), Ended(-11)], True, "signal 11 ended pytest in a.py::one"),
        ([*ran("a.py::one", "failed"), Ended(1)], True, "1 failed"),
        ([Ended(4)], True, "pytest ended with status 4"),
        ([Ended(5)], True, "pytest ended with status 5"),
    ],
)
def test_problem_says_what_happened_and_where(events: list[Event], in_time: bool, problem: str) -> None:
    assert Results.of(events).problem(in_time=in_time) == problem

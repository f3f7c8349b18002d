"""A plugin of pytest that writes events to the guest's second serial port."""

from collections.abc import Sequence
from typing import Final

import msgspec
import pytest

from tools.lab.init import EVENTS
from tools.lab.protocol import Event, Finished, Started

Report = pytest.TestReport | pytest.CollectReport

ROUNDS: Final = 30
"""Of stamps, for each tracker and kind of writers: the trackers' suite asks for more, which would take too long."""

_LONGEST_REASON: Final = 300
_SEVERITY: Final = ("passed", "skipped", "failed")


class Reporter:
    """Tells of each test when it starts and when it has ended.

    Args:
        path: where events go.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in pytest_unconfigure
        self._reports: list[pytest.TestReport] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test starts."""
        self._reports.clear()
        self._tell(Started(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Its setup, its call or its teardown ended."""
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """All three did."""
        self._tell(summary(nodeid, self._reports))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read, or that is skipped as a whole, has no tests to tell of."""
        if not report.passed:
            self._tell(summary(report.nodeid, [report]))

    def pytest_unconfigure(self) -> None:
        """There are no more."""
        self._file.close()

    def _tell(self, event: Event) -> None:
        self._file.write(msgspec.json.encode(event) + b"\n")


def summary(test: str, reports: Sequence[Report]) -> Finished:
    """The worst of a test's reports stands for it."""
    worst = max(reports, key=lambda report: _SEVERITY.index(report.outcome))
    seconds = sum(report.duration for report in reports if isinstance(report, pytest.TestReport))
    return Finished(test, worst.outcome, seconds, _reason(worst))


def _reason(report: Report) -> str:
    if report.passed:
        return ""
    if expected := getattr(report, "wasxfail", None):
        return f"xfail: {expected}"
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = report.longreprtext.splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])[:_LONGEST_REASON]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have the trackers' suite take less time."""
    suite = getattr(item, "cls", None)
    if suite is not None and hasattr(suite, "rounds"):
        suite.rounds = min(suite.rounds, ROUNDS)


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest as it takes this module for a plugin."""
    config.pluginmanager.register(Reporter(EVENTS))

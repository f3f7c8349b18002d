"""What ran on the second kernel, and what did not."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from rich import box
from rich.table import Table

from dirtylog.units import format_duration
from tools.lab.protocol import Ended, Event, Finished, Started

OUTCOMES: Final = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Results:
    """The events of a run.

    Attributes:
        tests: those that came to an end.
        running: the one that had not, or None.
        status: how the command ended, or None if it did not.
    """

    tests: tuple[Finished, ...]
    running: str | None
    status: int | None

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        """What these events amount to."""
        tests: list[Finished] = []
        running: str | None = None
        status: int | None = None
        for event in events:
            match event:
                case Started():
                    running = event.test
                case Finished():
                    tests.append(event)
                    running = None
                case Ended():
                    status = event.status
        return cls(tuple(tests), running, status)

    def problem(self, *, in_time: bool) -> str | None:
        """What went wrong, one sentence, or None."""
        if self.running is not None:
            where = f"in {self.running}"
        else:
            where = f"after {self.tests[-1].test}" if self.tests else "before the first test"
        if self.status is None:
            return f"the guest died {where}" if in_time else f"the time was over {where}"
        if self.status < 0:
            return f"signal {-self.status} ended pytest {where}"
        if failed := self.count("failed"):
            return f"{failed} failed"
        if self.status:
            return f"pytest ended with status {self.status}"
        return None

    def count(self, outcome: str) -> int:
        """How many tests had it."""
        return sum(test.outcome == outcome for test in self.tests)

    def table(self) -> Table:
        """A row for each file."""
        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        table.add_column("file", "all", overflow="fold")
        for outcome in OUTCOMES:
            table.add_column(outcome, str(self.count(outcome)), justify="right")
        table.add_column("time", format_duration(sum(test.seconds for test in self.tests)), justify="right")
        for name in dict.fromkeys(_file(test) for test in self.tests):
            mine = [test for test in self.tests if _file(test) == name]
            counts = Counter(test.outcome for test in mine)
            numbers = [str(counts[outcome] or "-") for outcome in OUTCOMES]
            table.add_row(name, *numbers, format_duration(sum(test.seconds for test in mine)))
        return table

    def skips(self) -> list[str]:
        """Why tests were skipped, the commonest reason first, with their number and files."""
        reasons = Counter(test.reason for test in self.tests if test.outcome == "skipped")
        return [f"{number} x {reason} ({', '.join(self._files(reason))})" for reason, number in reasons.most_common()]

    def failures(self) -> list[str]:
        """Which tests failed, and why."""
        return [f"{test.test}: {test.reason}" for test in self.tests if test.outcome == "failed"]

    def _files(self, reason: str) -> list[str]:
        return sorted({_file(test) for test in self.tests if (test.outcome, test.reason) == ("skipped", reason)})


def _file(test: Finished) -> str:
    return test.test.partition("::")[0]

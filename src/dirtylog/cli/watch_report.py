"""How a watch is shown: on a screen, as lines, as JSON."""

from collections.abc import Mapping
from typing import Final

import msgspec
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dirtylog.cli.heat_map import WINDOWS, HeatMap
from dirtylog.cli.text import printable
from dirtylog.display import Sample, WorkingSet, WriteHistory
from dirtylog.units import PAGE_SIZE, format_duration, format_rate, format_size

_FIGURES: Final = 4
"""Lines above the map."""
_NEAR: Final = 0.2
"""How far the time that a working set covers may be from the one asked for, in parts of it, without a word on it."""


class WorkingSetInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """A working set as JSON: see `display.WorkingSet`."""

    window: float
    seconds: float
    pages: int
    bytes: int


class SampleReport(msgspec.Struct, frozen=True, rename="kebab"):
    """A sample as JSON: times in seconds, rates a second; pages written, by block."""

    time: float
    seconds: float
    status: str
    pages: int
    pages_per_second: float
    bytes_per_second: float
    working_set: list[WorkingSetInfo]
    written_ever: int
    blocks: dict[str, int]


class WatchReport:
    """What is known of a machine's writes, to be shown after each sample. On a screen, all of it.

    Args:
        target: what the user called the machine.
        blocks: how many pages each block has, by name.
    """

    def __init__(self, target: str, blocks: Mapping[str, int]) -> None:
        self._target = target
        self._history = WriteHistory(blocks)
        self._sample = Sample(0.0, 0.0, {})
        self._status = ""
        self._rewritten = 0
        self._map = HeatMap(self._history, _FIGURES)

    def add(self, sample: Sample, status: str) -> None:
        """Take a sample in, and what the machine was doing then."""
        self._history.add(sample)
        self._sample = sample
        self._status = printable(status)
        self._rewritten += sample.pages

    def json(self) -> str:
        """The last sample, as one line of JSON."""
        sample = self._sample
        report = SampleReport(
            time=sample.time,
            seconds=sample.seconds,
            status=self._status,
            pages=sample.pages,
            pages_per_second=sample.rate,
            bytes_per_second=sample.rate * PAGE_SIZE,
            working_set=[
                WorkingSetInfo(one.window, one.seconds, one.pages, one.pages * PAGE_SIZE)
                for one in self._working_sets()
            ],
            written_ever=self._history.ever,
            blocks={name: bitmap.count() for name, bitmap in sample.written.items()},
        )
        return msgspec.json.encode(report).decode()

    def line(self) -> str:
        """The last sample, as one line of text."""
        working_sets = ", ".join(
            f"{_covered(one)} {format_size(one.pages * PAGE_SIZE)}" for one in self._working_sets()
        )
        return (
            f"{self._sample.time:8.2f} s  {self._status}  {self._rate()}  "
            f"working set: {working_sets}  since the start {self._ever()}"
        )

    def summary(self) -> str:
        """What remains to be said at the end."""
        if not self._history.samples:
            return f"{self._target}: no sample was taken"
        time = self._history.time
        rate = self._rewritten / time if time else 0.0
        return (
            f"{self._target}: {self._ever()} written in {format_duration(time)}, "
            f"{format_rate(rate * PAGE_SIZE)} ({rate:,.0f} pages/s) on average"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble(
            (printable(self._target), "bold"), f"  {self._status}  watched for {format_duration(self._history.time)}"
        )
        figures = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        figures.add_row(Text("written", "bold"), self._rate(), f"since the start {self._ever()}")
        yield figures
        working_sets = Text.assemble(("working set", "bold"), no_wrap=True, overflow="crop")
        for one in self._working_sets():
            working_sets.append(f"  {_covered(one)} ", "dim").append(format_size(one.pages * PAGE_SIZE))
        yield working_sets
        yield Text()
        yield self._map

    def _rate(self) -> str:
        rate = self._sample.rate
        return f"{format_rate(rate * PAGE_SIZE)}  {rate:,.0f} pages/s"

    def _ever(self) -> str:
        total = sum(self._history.blocks.values())
        return f"{format_size(self._history.ever * PAGE_SIZE)} of {format_size(total * PAGE_SIZE)}"

    def _working_sets(self) -> list[WorkingSet]:
        return [self._history.working_set(window) for window in WINDOWS]


def _covered(one: WorkingSet) -> str:
    """The time of a working set, where that is not what was asked for."""
    near = abs(one.seconds - one.window) <= _NEAR * one.window
    return f"{one.window:.0f} s" if near else f"{one.window:.0f} s ({one.seconds:.1f} s)"

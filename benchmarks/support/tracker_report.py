"""What was measured of trackers, beside the limits: tables for people, JSON for programs."""

import statistics
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct
from rich import box
from rich.table import Table

from benchmarks.support.report import ABSENT, Host, Summary
from benchmarks.support.timing import Samples
from benchmarks.support.tracker_runs import (
    ARM,
    CLEAR,
    CLEAR_CHUNKS,
    COLLECT,
    DISARM,
    FIRST_WRITE,
    SUBJECTS,
    Measurement,
)
from dirtylog.units import GIB

ARM_SECONDS_PER_GIB: Final = 3.2e-3
MOST_TIMES: Final = 1.5
"""As long as the program in C, collecting and clearing may take where something was written."""
MOST_OVER: Final = 0.3e-3
"""So many seconds longer, where nothing was."""

_COLUMNS: Final = (FIRST_WRITE, COLLECT, CLEAR, CLEAR_CHUNKS)
_MILLI: Final = 1e3
_MICRO: Final = 1e6


class Verdict(Struct, frozen=True):
    """A limit, and how it was kept. Times in seconds.

    Attributes:
        limit: the most that the median may be.
        median: dirtylog's.
        raw: the median of the program in C, or None.
    """

    limit: float
    median: float
    raw: float | None

    @property
    def met(self) -> bool:
        """Whether dirtylog kept it."""
        return self.median <= self.limit

    def __str__(self) -> str:
        text = f"{_digits(self.limit * _MILLI)}, {'met' if self.met else 'missed'}"
        return f"{text} by both" if not self.met and self.raw is not None and self.raw > self.limit else text


def collect_and_clear(steps: dict[str, Samples]) -> Samples:
    """Both together, run by run."""
    return [sum(pair) for pair in zip(steps.get(COLLECT, []), steps.get(CLEAR, []), strict=True)]


def judge(measured: Measurement) -> Verdict | None:
    """The limit of collecting and clearing; None where there are no system calls to compare with."""
    if not SUBJECTS[measured.tracker].has_calls:
        return None
    ours, raw = (statistics.median(collect_and_clear(steps)) for steps in (measured.ours, measured.raw))
    return Verdict(raw * MOST_TIMES if measured.case.percent else raw + MOST_OVER, ours, raw)


def judge_arming(of_tracker: Sequence[Measurement]) -> Verdict:
    """The limit of arming, for one tracker in all cases."""
    ours, raw = _pooled(of_tracker, ARM)
    limit = ARM_SECONDS_PER_GIB * of_tracker[0].size / GIB
    return Verdict(limit, statistics.median(ours), statistics.median(raw) if raw else None)


def tables(measurements: Sequence[Measurement], *, markdown: bool = False) -> list[Table]:
    """One of arming and disarming, then one a tracker; all in milliseconds, but for the first writes."""
    trackers = list(dict.fromkeys(one.tracker for one in measurements))
    by_tracker = [[one for one in measurements if one.tracker == tracker] for tracker in trackers]
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    return [_arming(by_tracker, style), *(_collecting(of_tracker, style) for of_tracker in by_tracker)]


def encode(host: Host, setup: Struct, measurements: Sequence[Measurement], left_out: dict[str, str]) -> bytes:
    """All of it as JSON: times in seconds, sizes in bytes."""
    content = {"host": host, "setup": setup, "measurements": measurements, "left_out": left_out}
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def line(measured: Measurement) -> str:
    """One measurement in short."""
    times = (f"{step} {_show(measured.ours[step], _MILLI)} ms" for step in (COLLECT, CLEAR))
    return f"{measured.tracker}, {measured.case.name}: {', '.join(times)}"


def _arming(by_tracker: Sequence[Sequence[Measurement]], style: box.Box) -> Table:
    table = _table("ms", ("arm: dirtylog", "C", "limit", "disarm: dirtylog", "C"), style)
    for of_tracker in by_tracker:
        armed, disarmed = ([_show(side, _MILLI) for side in _pooled(of_tracker, step)] for step in (ARM, DISARM))
        table.add_row(of_tracker[0].tracker, *armed, str(judge_arming(of_tracker)), *disarmed)
    return table


def _collecting(of_tracker: Sequence[Measurement], style: box.Box) -> Table:
    columns = (f"{FIRST_WRITE} (us)", COLLECT, CLEAR, CLEAR_CHUNKS, f"{COLLECT} + {CLEAR}", "limit", "times")
    table = _table(f"{of_tracker[0].tracker} (ms)", ("", *columns), style)
    for measured in of_tracker:
        verdict = judge(measured)
        ours, raw = (collect_and_clear(steps) for steps in (measured.ours, measured.raw))
        times = f"{statistics.median(ours) / statistics.median(raw):.2f}" if raw else ABSENT
        table.add_row(
            measured.case.name, "dirtylog", *_cells(measured.ours), ABSENT if verdict is None else str(verdict), times
        )
        if raw:
            table.add_row("", "C", *_cells(measured.raw), "", "")
    return table


def _table(first: str, columns: Sequence[str], style: box.Box) -> Table:
    table = Table(box=style, header_style="bold", show_edge=style is box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _cells(steps: dict[str, Samples]) -> list[str]:
    first, *others = (_show(steps[step], _MICRO if step == FIRST_WRITE else _MILLI) for step in _COLUMNS)
    return [first, *others, _show(collect_and_clear(steps), _MILLI)]


def _pooled(of_tracker: Sequence[Measurement], step: str) -> tuple[Samples, Samples]:
    """The times of a step that does not depend on the case."""
    ours = [seconds for measured in of_tracker for seconds in measured.ours[step]]
    return ours, [seconds for measured in of_tracker for seconds in measured.raw.get(step, [])]


def _show(samples: Samples, factor: float) -> str:
    """The median, and the extremes where they differ from it."""
    summary = Summary.of([seconds * factor for seconds in samples])
    return ABSENT if summary is None else summary.show(_digits).replace(" .. ", "..")


def _digits(value: float) -> str:
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"

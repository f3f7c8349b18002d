"""What was measured, for people and for programs."""

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Self, TypeVar

import msgspec
from msgspec import Struct
from rich import box
from rich.console import Group
from rich.table import Table

from benchmarks.support.measure import Outcome, Run, Side
from benchmarks.support.peers import Peer
from dirtylog.units import format_duration, format_size

ABSENT: Final = "-"

R = TypeVar("R")
"""A run of some kind."""


class Summary(Struct, frozen=True):
    """Some measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None of nothing."""
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def show(self, unit: Callable[[float], str]) -> str:
        """The median, and the extremes where they differ from it."""
        if self.low == self.high:
            return unit(self.median)
        return f"{unit(self.median)} [{unit(self.low)} .. {unit(self.high)}]"


@dataclass(frozen=True, slots=True)
class Metric(Generic[R]):
    """A row of the table.

    Attributes:
        name: what it is.
        values: it, of one run; several if it was measured several times, None where a run has none.
        unit: a number of it for people.
        compared: whether the quotient of two of it says something.
    """

    name: str
    values: Callable[[R], Sequence[float | None]]
    unit: Callable[[float], str]
    compared: bool = True

    def summary(self, runs: Sequence[R]) -> Summary | None:
        """Of those runs that have it."""
        return Summary.of([value for run in runs for value in self.values(run) if value is not None])


def _beyond_guest(side: Side | None) -> int | None:
    return None if side is None else side.beyond_guest


def _cpu(side: Side | None) -> float | None:
    return None if side is None else side.cpu.total


def count_text(value: float) -> str:
    """A number of things, for people."""
    return f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _fine_ratio(value: float) -> str:
    return f"{value:.4f}"


def _silence_beyond_downtime(run: Run) -> float | None:
    return None if run.silence is None or run.downtime is None else run.silence - run.downtime


def _share_of_bare_speed(run: Run) -> float | None:
    if run.bare_whole is None:
        return None
    return statistics.median(run.bare_whole.seconds) / run.total


def _predicted(run: Run) -> float | None:
    return run.predicted.total if run.predicted is not None and run.predicted.converges else None


def _predicted_share(run: Run) -> float | None:
    predicted = _predicted(run)
    return None if predicted is None else predicted / run.total


METRICS: Final[tuple[Metric[Run], ...]] = (
    Metric("total time", lambda run: [run.total], format_duration),
    Metric("predicted total time", lambda run: [_predicted(run)], format_duration),
    Metric("predicted / real, run by run", lambda run: [_predicted_share(run)], _ratio),
    Metric("wall time, both sides", lambda run: [run.wall], format_duration),
    Metric("downtime, as reported", lambda run: [run.downtime], format_duration),
    Metric("STOP to RESUME", lambda run: [run.stopped], format_duration),
    Metric("silence of the guest", lambda run: [run.silence], format_duration),
    Metric(
        "silence - downtime, run by run", lambda run: [_silence_beyond_downtime(run)], format_duration, compared=False
    ),
    Metric("expected downtime", lambda run: [run.expected_downtime], format_duration),
    Metric("bare copy of the final pass", lambda run: run.bare.seconds if run.bare else [], format_duration),
    Metric("bare copy of everything", lambda run: run.bare_whole.seconds if run.bare_whole else [], format_duration),
    Metric("speed, of the bare copy's", lambda run: [_share_of_bare_speed(run)], _ratio),
    Metric("speed, of the limit", lambda run: [run.share_of_limit], _fine_ratio),
    Metric("bytes sent", lambda run: [run.bytes], format_size),
    Metric("pages sent", lambda run: [run.pages], count_text),
    Metric("zero pages", lambda run: [run.zero_pages], count_text),
    Metric("passes", lambda run: [run.passes], count_text),
    Metric("CPU time, source", lambda run: [_cpu(run.source)], format_duration),
    Metric("CPU time, dest.", lambda run: [_cpu(run.destination)], format_duration),
    Metric("memory beyond guest RAM, source", lambda run: [_beyond_guest(run.source)], format_size),
    Metric("memory beyond guest RAM, dest.", lambda run: [_beyond_guest(run.destination)], format_size),
)


class Host(Struct, frozen=True):
    """What it all ran on.

    Attributes:
        kernel: its release.
        cpu: the model's name.
        cpus: how many may be used.
        memory: bytes of RAM.
        python: its version.
        peers: their versions by name.
    """

    kernel: str
    cpu: str
    cpus: int
    memory: int
    python: str
    peers: dict[str, str]

    @classmethod
    def this(cls, peers: Sequence[Peer]) -> "Host":
        """This one."""
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return cls(
            kernel=platform.release(),
            cpu=next(models, "CPU of unknown model"),
            cpus=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            python=platform.python_version(),
            peers={peer.name: peer.version for peer in peers},
        )

    def __str__(self) -> str:
        peers = ", ".join(f"{name} {version}" for name, version in self.peers.items())
        host = f"Linux {self.kernel}, {self.cpus} x {self.cpu}, {format_size(self.memory)}"
        return f"{host}; {peers}, Python {self.python}"


def tables(runs: Sequence[Run], peers: tuple[str, str]) -> Group:
    """Two peers side by side: medians with extremes, and the second's median as a multiple of the first's."""
    return Group(*(_table(setup, runs, peers) for setup in dict.fromkeys(run.setup for run in runs)))


def _table(setup: str, runs: Sequence[Run], peers: tuple[str, str]) -> Table:
    left, right = ([run for run in runs if (run.setup, run.peer) == (setup, peer)] for peer in peers)
    result = empty_table(setup, peers)
    result.add_row("runs that converged", _converged(left), _converged(right), "")
    add_rows(result, METRICS, completed(left), completed(right))
    return result


def empty_table(title: str, peers: tuple[str, str]) -> Table:
    """A table for `add_rows`."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, title=title, title_justify="left")
    result.add_column("median [min .. max]", no_wrap=True)
    for name in (*peers, f"{peers[1]} / {peers[0]}"):
        result.add_column(name, justify="right", no_wrap=True)
    return result


def add_rows(table: Table, metrics: Sequence[Metric[R]], left: Sequence[R], right: Sequence[R]) -> None:
    """A row for each metric that either side has."""
    for metric in metrics:
        cells = _compare(metric, left, right)
        if any(cell != ABSENT for cell in cells):
            table.add_row(metric.name, *cells)
    table.add_section()


def line(run: Run) -> str:
    """One run in short."""
    text = f"{run.peer}: {run.outcome.value}, total {format_duration(run.total)}, {run.passes} passes"
    if run.downtime is not None:
        text += f", downtime {format_duration(run.downtime)}"
    if run.silence is not None:
        text += f", silence {format_duration(run.silence)}"
    return text


def encode(host: Host, setup: Struct, runs: Sequence[Struct]) -> bytes:
    """All of it as JSON: times in seconds, sizes in bytes."""
    return msgspec.json.format(msgspec.json.encode({"host": host, "setup": setup, "runs": runs})) + b"\n"


def completed(runs: Sequence[Run]) -> list[Run]:
    """Those in which the guest moved."""
    return [run for run in runs if run.outcome is Outcome.COMPLETED]


def _converged(runs: Sequence[Run]) -> str:
    return f"{len(completed(runs))} of {len(runs)}"


def _compare(metric: Metric[R], left: Sequence[R], right: Sequence[R]) -> tuple[str, str, str]:
    one, other = metric.summary(left), metric.summary(right)
    ratio = f"{other.median / one.median:.2f}" if one is not None and other is not None and one.median else ABSENT
    return _show(metric, one), _show(metric, other), ratio if metric.compared else ABSENT


def _show(metric: Metric[R], summary: Summary | None) -> str:
    return ABSENT if summary is None else summary.show(metric.unit)

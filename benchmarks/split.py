"""What is it worth to collect the dirty log and to clear it in two steps?

Repeats, at one tenth, the experiment with which QEMU came to clear KVM's log in chunks, right before pages are read:
a guest that writes most of its memory at random, nearly as fast as the link carries it. See docs/benchmarks.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.forecast import shortest_total
from benchmarks.support.measure import Run, Setup, measure, watch_alone
from benchmarks.support.passes_plot import draw
from benchmarks.support.peers import Dirtylog, Terms
from benchmarks.support.report import ABSENT, Host, Summary, completed, encode, line
from benchmarks.support.script import run_script
from benchmarks.support.workloads import CONTENTS_ADDRESS, RandomWrites
from dirtylog.cli.options import DURATION, RATE, SIZE
from dirtylog.errors import UsageError
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE, format_duration, format_rate, format_size

AT_SYNC: Final = "at sync"
_PLACES: Final = ("low", "high")
_HEADINGS: Final = ("cleared", "converged", "total", "of at sync", "predicted", "/ real", "downtime", "sent", "written")
_FILE_WIDTH: Final = 230


class Options(Struct, frozen=True):
    """What was asked for. Sizes in bytes, times in seconds, rates a second."""

    runs: int
    memory: int
    hot: int
    place: str
    rate: int
    bandwidth: int
    limit: float
    chunks: tuple[int, ...]
    watch: float
    timeout: float

    def setup(self) -> Setup:
        """The guest and how it is migrated."""
        first = CONTENTS_ADDRESS if self.place == "low" else self.memory - self.hot
        contents = self.memory - CONTENTS_ADDRESS
        workload = RandomWrites(first, first + self.hot, self.rate, contents)
        terms = Terms(self.limit, bandwidth=self.bandwidth)
        return Setup(self.memory, workload, terms, timeout=self.timeout, watch=self.watch)

    def shortest(self) -> float:
        """See `shortest_total`."""
        contents = self.memory - CONTENTS_ADDRESS
        return shortest_total(contents, self.hot, self.rate, Terms(self.limit, bandwidth=self.bandwidth))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each way.")
@click.option("--memory", type=SIZE, default="1331M", show_default=True, help="RAM of the guest, whole MiB.")
@click.option("--hot", type=SIZE, default="1G", show_default=True, help="How much of it is written.")
@click.option("--place", type=click.Choice(_PLACES), default="high", show_default=True, help="Where that lies in it.")
@click.option("--rate", type=RATE, default="90M", show_default=True, help="How fast; each write counts as its page.")
@click.option("--bandwidth", type=RATE, default="941Mbit", show_default=True, help="What the link carries.")
@click.option("--limit", type=DURATION, default="100ms", show_default=True, help="How long the guest may stand still.")
@click.option(
    "--chunk",
    "chunks",
    type=SIZE,
    multiple=True,
    default=["1G", "128M", "16M", "1M"],
    show_default=True,
    help="Memory whose log is cleared at once; may be given several times.",
)
@click.option("--watch", type=DURATION, default="60s", show_default=True, help="How long to watch the guest before.")
@click.option(
    "--timeout", type=DURATION, default="5min", show_default=True, help="After that a migration does not converge."
)
@click.option("--json", "json_path", metavar="FILE", help="Also write every run as JSON.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw what passes leave: PNG or SVG.")
def command(
    runs: int,
    memory: int,
    hot: int,
    place: str,
    rate: int,
    bandwidth: int,
    limit: float,
    chunks: tuple[int, ...],
    watch: float,
    timeout: float,
    json_path: str | None,
    plot: Path | None,
) -> None:
    """Migrate a guest that writes at random, with its log cleared in one step and chunk by chunk.

    All its memory has random contents. It paces itself; the link is limited as by max-bandwidth. Forecasts are from
    watching one such guest before.
    """
    options = Options(runs, memory, hot, place, rate, bandwidth, limit, chunks, watch, timeout)
    _check(options)
    host = Host.this([Dirtylog()])
    results = _run_all(options)
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, results))
    if plot is not None:
        draw(plot, results)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(table(results))
    shortest = format_duration(options.shortest())
    console.print(
        f"While the guest writes {format_rate(options.rate)}, no order of sending takes less than {shortest}."
    )
    console.print(str(host), soft_wrap=True)


def _check(options: Options) -> None:
    if options.memory % MIB or options.hot % PAGE_SIZE or not options.hot:
        raise UsageError("the guest's memory is whole MiB, of which whole pages are written")
    if options.hot + CONTENTS_ADDRESS > options.memory:
        raise UsageError(
            f"{options.hot} of {options.memory} bytes cannot be written", remedy="the first MiB is the guest's own"
        )
    if not options.bandwidth or not options.chunks or min(options.chunks) < 1:
        raise UsageError("there is no experiment without a bandwidth, or with empty chunks")


def _run_all(options: Options) -> list[Run]:
    """In turn, so that whatever else the host does strikes all."""
    progress = Console(stderr=True, highlight=False)
    setup = options.setup()
    progress.print(f"watching for {format_duration(options.watch)}: {setup}", soft_wrap=True)
    observed = watch_alone(Dirtylog(), setup)
    ways = [Dirtylog(AT_SYNC, ("--dirty-log", KVMLogMode.LEGACY.value), 0)]
    ways += [Dirtylog(f"in chunks of {format_size(chunk)}", clear_chunk=chunk) for chunk in options.chunks]
    results = []
    for number in range(1, options.runs + 1):
        for way in ways:
            results.append(measure(way, setup, observed))
            progress.print(f"run {number} of {options.runs}: {line(results[-1])}", soft_wrap=True)
    return results


def table(runs: Sequence[Run]) -> Table:
    """A row for each way to clear the log: medians with extremes. Written: by the guest, a second, meanwhile."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    for name in _HEADINGS:
        result.add_column(name, justify="left" if name == _HEADINGS[0] else "right", no_wrap=True)
    first = Summary.of([run.total for run in completed(runs) if run.peer == AT_SYNC])
    for way in dict.fromkeys(run.peer for run in runs):
        of_way = [run for run in runs if run.peer == way]
        result.add_row(way, f"{len(completed(of_way))} of {len(of_way)}", *_figures(completed(of_way), first))
    return result


def _figures(runs: Sequence[Run], first: Summary | None) -> list[str]:
    total = Summary.of([run.total for run in runs])
    if total is None:
        return [ABSENT] * (len(_HEADINGS) - 2)
    predictions = [(run.predicted.total, run.total) for run in runs if run.predicted and run.predicted.converges]
    predicted = Summary.of([one for one, _ in predictions])
    accuracy = Summary.of([one / real for one, real in predictions])
    downtime = Summary.of([run.downtime for run in runs if run.downtime is not None])
    sent = Summary.of([float(run.bytes) for run in runs])
    written = Summary.of([run.pace * PAGE_SIZE for run in runs if run.pace is not None])
    return [
        total.show(format_duration),
        ABSENT if first is None else f"{total.median / first.median:.3f}",
        ABSENT if predicted is None else predicted.show(format_duration),
        ABSENT if accuracy is None else accuracy.show("{:.2f}".format),
        ABSENT if downtime is None else downtime.show(format_duration),
        ABSENT if sent is None else sent.show(format_size),
        ABSENT if written is None else written.show(format_rate),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "split.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

"""``dirtylog predict``: how a migration of a recorded workload would go."""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any, Final

import click
import msgspec
import numpy as np
from rich.console import Console

from dirtylog.cli.interrupts import interrupts
from dirtylog.cli.options import DURATION, RATE, SIZE, UnitType
from dirtylog.cli.prediction_report import AT_SYNC, draw, info, table
from dirtylog.cli.watch_target import find_qmp
from dirtylog.control.qmp import QMPClient
from dirtylog.control.watch import RemoteWatch
from dirtylog.display import Sample as Watched
from dirtylog.display import TraceReader
from dirtylog.errors import UsageError
from dirtylog.migration.prediction import Sample, Scenario, Workload, predict
from dirtylog.units import PAGE_SIZE

_SHORTEST: Final = 0.01


class ListType(click.ParamType):  # type: ignore[type-arg]  # generic only in recent releases of click
    """Several values with commas between.

    Args:
        each: the type of one.
        words: what may stand in place of one.
    """

    def __init__(self, each: UnitType, words: Sequence[str] = ()) -> None:
        self._each = each
        self._words = words
        self.name = f"{each.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values, in the order they were given, each once."""
        words = dict.fromkeys(part.strip() for part in str(value).split(","))
        return [word if word in self._words else self._each.convert(word, param, ctx) for word in words]


@click.command("predict")
@click.argument("source")
@click.option(
    "--bandwidth",
    type=ListType(RATE),
    default="1Gbit,10Gbit",
    show_default=True,
    help="How fast memory is sent while the guest runs.",
)
@click.option("--max-downtime", type=ListType(DURATION), default="300ms", show_default=True, help="The downtime limit.")
@click.option(
    "--clear-chunk",
    type=ListType(SIZE, (AT_SYNC,)),
    default=f"{AT_SYNC},128M",
    show_default=True,
    help=f"Memory whose log is cleared at once; {AT_SYNC}: all of it, when it is collected.",
)
@click.option(
    "--first-bandwidth", type=RATE, help="How fast in the first pass, to fresh memory; the same unless given."
)
@click.option("--switchover-bandwidth", type=RATE, help="How fast when it stands still; the same unless given.")
@click.option(
    "--fixed-downtime",
    type=DURATION,
    default="10ms",
    show_default=True,
    help="How long a switchover takes besides its pages.",
)
@click.option(
    "--guest-speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How fast the guest writes meanwhile, as a multiple of its speed in SOURCE.",
)
@click.option("--contents", type=SIZE, help="How much memory has contents, if SOURCE is not to be believed.")
@click.option("--measure", type=DURATION, default="60s", show_default=True, help="How long to watch a running machine.")
@click.option("--interval", type=DURATION, default="100ms", show_default=True, help="Between samples of that.")
@click.option("--give-up", type=DURATION, default="10min", show_default=True, help="What takes longer is for ever.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw what passes leave: PNG or SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of the forecasts instead of a table.")
def command(
    source: str,
    bandwidth: list[int],
    max_downtime: list[float],
    clear_chunk: list[int | str],
    first_bandwidth: int | None,
    switchover_bandwidth: int | None,
    fixed_downtime: float,
    guest_speed: float,
    contents: int | None,
    measure: float,
    interval: float,
    give_up: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict how long a migration would take, how long the guest would stand still, and how much would be sent.

    SOURCE is a trace that 'dirtylog watch --record' wrote, or a running machine as 'dirtylog watch' takes it, which is
    watched first. The options with commas are tried in all combinations. 'dirtylog migrate --json' tells the bandwidths
    of a real link, as 'bandwidth' of each of its passes.

    Samples should be shorter than the time in which the guest writes its working set once: a page that was written
    several times in one sample counts as written once.
    """
    scenarios = [
        Scenario(
            bandwidth=float(speed),
            downtime_limit=limit,
            clear_chunk=PAGE_SIZE if chunk == AT_SYNC else int(chunk),
            split=chunk != AT_SYNC,
            first_bandwidth=first_bandwidth,
            switchover_bandwidth=switchover_bandwidth,
            fixed_downtime=fixed_downtime,
            guest_speed=guest_speed,
        )
        for speed, limit, chunk in itertools.product(bandwidth, max_downtime, clear_chunk)
    ]
    workload = _recorded(source, contents) if Path(source).is_file() else _watch(source, measure, interval, contents)
    predictions = [predict(workload, scenario, give_up=give_up) for scenario in scenarios]
    if plot is not None:
        draw(plot, scenarios, predictions, workload.stored)
    if as_json:
        infos = [info(*pair) for pair in zip(scenarios, predictions, strict=True)]
        click.echo(msgspec.json.format(msgspec.json.encode(infos)).decode())
    else:
        Console(highlight=False).print(table(scenarios, predictions))


def _recorded(path: str, contents: int | None) -> Workload:
    trace = TraceReader(path)
    return build_workload(trace.blocks, trace.stored, trace, contents)


def _watch(target: str, seconds: float, interval: float, contents: int | None) -> Workload:
    if not _SHORTEST <= interval <= seconds:
        raise UsageError(
            f"samples every {interval:g} s for {seconds:g} s are none",
            remedy="give an --interval of 10ms or more, and --measure several of them",
        )
    with ExitStack() as stack:
        qmp = stack.enter_context(QMPClient(find_qmp(target)))
        interrupted = stack.enter_context(interrupts())
        watch = stack.enter_context(RemoteWatch(qmp))
        return build_workload(watch.blocks, watch.stored, _samples(watch, seconds, interval, interrupted), contents)


def _samples(watch: RemoteWatch, seconds: float, interval: float, interrupted: Event) -> Iterator[Watched]:
    """Watch for some time, and show how far that is; an interrupt ends it all."""
    began = time.monotonic()
    with click.progressbar(length=round(seconds * 1000), label="watching", file=sys.stderr) as bar:
        while (passed := time.monotonic() - began) < seconds:
            if interrupted.wait(min(interval, seconds - passed)):
                raise click.Abort
            yield watch.sample()
            bar.update(round((time.monotonic() - began) * 1000) - bar.pos)


def build_workload(
    blocks: Mapping[str, int], stored: Mapping[str, int], samples: Iterable[Watched], contents: int | None = None
) -> Workload:
    """What was watched, for a forecast: the blocks one after the other.

    Args:
        blocks: how many pages each has, by name.
        stored: how many of them have contents.
        samples: of them, in order.
        contents: bytes that have contents instead.
    """
    pages = sum(blocks.values())
    offsets = dict(zip(blocks, itertools.accumulate(blocks.values(), initial=0), strict=False))
    found = tuple(_sample(one, offsets) for one in samples if one.seconds > 0)
    filled = sum(stored.values()) if contents is None else min(-(-contents // PAGE_SIZE), pages)
    return Workload(pages, filled, found)


def _sample(watched: Watched, offsets: Mapping[str, int]) -> Sample:
    numbers = [bitmap.indices() + offsets[name] for name, bitmap in watched.written.items()]
    return Sample(watched.seconds, np.concatenate([np.empty(0, np.int64), *numbers]))

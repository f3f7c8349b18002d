"""``dirtylog watch``: which parts of a running machine's memory are written, and how fast."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Final

import click
from rich.console import Console
from rich.live import Live

from dirtylog.cli.interrupts import interrupts
from dirtylog.cli.options import DURATION
from dirtylog.cli.watch_report import WatchReport
from dirtylog.cli.watch_target import find_qmp
from dirtylog.control.qmp import QMPClient
from dirtylog.control.watch import RemoteWatch
from dirtylog.display import TraceWriter
from dirtylog.errors import DisconnectedError, UsageError

_SHORTEST: Final = 0.01
_POLL_SECONDS: Final = 0.1


@click.command("watch")
@click.argument("target")
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="Time from one sample to the next.")
@click.option("--duration", type=DURATION, help="Stop after that time. Goes on until Ctrl-C unless given.")
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), help="Write a trace there: the pages of each sample."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each sample, one a line, and no map.")
def command(target: str, interval: float, duration: float | None, record: Path | None, as_json: bool) -> None:
    """Show which parts of a running machine's memory are written, how fast, and the working set.

    TARGET is the PID of a 'dirtylog run' that was started with --qmp, or the path of its QMP socket (./123 if that is a
    number). The machine runs on meanwhile, and may be migrated; several may watch it.

    On a terminal this is a map of memory; elsewhere, a line for each sample. A page that is written again and again
    counts once a sample, so the rate depends on the interval: it is what a migration whose passes take that long would
    have to send again. The working set is the pages written in the last 1, 10 and 60 seconds.
    """
    _check_times(interval, duration)
    path = find_qmp(target)
    console = Console(quiet=as_json, highlight=False, markup=False, emoji=False)
    with ExitStack() as stack:
        qmp = stack.enter_context(QMPClient(path))
        interrupted = stack.enter_context(interrupts())
        watch = stack.enter_context(RemoteWatch(qmp))
        trace = None if record is None else stack.enter_context(TraceWriter(record, watch.blocks, stored=watch.stored))
        report = WatchReport(target, watch.blocks)
        with _ending_told(target), _screen(console) as screen:
            for _ in _ticks(qmp, interval, duration, interrupted):
                sample = watch.sample()
                if trace is not None:
                    trace.append(sample)
                report.add(sample, watch.status)
                _show(report, console, screen, as_json=as_json)
        if screen is not None:
            console.print(report.summary(), soft_wrap=True)
    if interrupted.is_set():
        raise click.Abort


def _check_times(interval: float, duration: float | None) -> None:
    for name, value in (("--interval", interval), ("--duration", duration)):
        if value is not None and value < _SHORTEST:
            raise UsageError(f"{name} of {value:g} s is too short", remedy="10ms is the shortest")


@contextmanager
def _screen(console: Console) -> Iterator[Live | None]:
    """The whole terminal, for the map; None if there is no terminal that can show it."""
    if not console.is_terminal or console.is_dumb_terminal or console.quiet:
        yield None
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield live


def _show(report: WatchReport, console: Console, screen: Live | None, *, as_json: bool) -> None:
    """Show the last sample."""
    if as_json:
        click.echo(report.json())
    elif screen is None:
        console.print(report.line(), soft_wrap=True)
    else:
        screen.update(report, refresh=True)


@contextmanager
def _ending_told(target: str) -> Iterator[None]:
    try:
        yield
    except DisconnectedError as error:
        raise DisconnectedError(f"the machine of {target} has ended") from error


def _ticks(qmp: QMPClient, interval: float, duration: float | None, interrupted: Event) -> Iterator[None]:
    """Yield when a sample is due: each interval, and when all is over, unless that is an interrupt.

    Raises:
        DisconnectedError: the machine has ended.
    """
    tick = time.monotonic()
    end = None if duration is None else tick + duration
    while end is None or tick < end - _SHORTEST / 2:
        tick = max(tick + interval, time.monotonic())
        if end is not None:
            tick = min(tick, end)
        while (left := tick - time.monotonic()) > 0 and not interrupted.is_set():
            qmp.next_event(min(left, _POLL_SECONDS))
        if interrupted.is_set():
            return
        yield

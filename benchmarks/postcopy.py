"""How long does a guest wait for each page that it lacks, when it is handed over before its memory?

Boots a guest that writes pages at random and notes how long its writes take, hands it over as soon as memory is being
sent, and does the same with QEMU. See docs/benchmarks.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from msgspec import Struct
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.postcopy_runs import (
    PostcopyDirtylog,
    Postcopying,
    PostcopyQEMU,
    PostcopyRun,
    PostcopySetup,
    measure_postcopy,
)
from benchmarks.support.report import Host, Metric, add_rows, count_text, empty_table, encode
from benchmarks.support.script import run_script
from benchmarks.support.workloads import CONTENTS_ADDRESS
from dirtylog.cli.options import SIZE
from dirtylog.errors import UsageError
from dirtylog.units import MIB, PAGE_SIZE, format_duration, format_rate, format_size

_FILE_WIDTH: Final = 140
_PEERS: Final = ("QEMU", "dirtylog")
METRICS: Final[tuple[Metric[PostcopyRun], ...]] = (
    Metric("fault latency, median", lambda run: [run.latency], format_duration),
    Metric("fault latency, 99 %", lambda run: [run.latency_99], format_duration),
    Metric("pages waited for", lambda run: [run.requests], count_text),
    Metric("blocktime", lambda run: [run.blocktime], format_duration),
    Metric("total time", lambda run: [run.total], format_duration),
    Metric("STOP to RESUME", lambda run: [run.stopped], format_duration),
    Metric("served after the handover", lambda run: [run.rate * PAGE_SIZE], format_rate),
    Metric("pages a second", lambda run: [run.rate], count_text),
    Metric("bytes sent", lambda run: [run.bytes], format_size),
)


class Options(Struct, frozen=True):
    """What was asked for; sizes in bytes."""

    runs: int
    memory: int
    hot: int


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each.")
@click.option("--memory", type=SIZE, default="1G", show_default=True, help="RAM of the guest, whole MiB.")
@click.option("--hot", type=SIZE, default="512M", show_default=True, help="How much of it is written, from 1 MiB on.")
@click.option("--peer", type=click.Choice(_PEERS), help="Measure one of the two only.")
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
def command(runs: int, memory: int, hot: int, peer: str | None, json_path: str | None) -> None:
    """Hand a running guest over before its memory, and compare how long it waits with QEMU's."""
    if memory % MIB or hot % PAGE_SIZE or not 0 < hot <= memory - CONTENTS_ADDRESS:
        raise UsageError("the guest's memory is whole MiB, and what it writes, whole pages, has to fit in above 1 MiB")
    peers: list[Postcopying] = [
        make() for name, make in zip(_PEERS, (PostcopyQEMU, PostcopyDirtylog), strict=True) if peer in (None, name)
    ]
    host = Host.this(peers)
    setup = PostcopySetup(memory, CONTENTS_ADDRESS, CONTENTS_ADDRESS + hot)
    results = _run_all(peers, setup, runs)
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, Options(runs, memory, hot), results))
    if json_path != "-":
        table = empty_table(str(setup), _PEERS)
        add_rows(table, METRICS, *([run for run in results if run.peer == name] for name in _PEERS))
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(table)
        console.print(str(host), soft_wrap=True)


def _run_all(peers: Sequence[Postcopying], setup: PostcopySetup, runs: int) -> list[PostcopyRun]:
    """In turn, so that whatever else the host does strikes both."""
    progress = Console(stderr=True, highlight=False)
    results = []
    for number in range(1, runs + 1):
        for peer in peers:
            run = measure_postcopy(peer, setup)
            results.append(run)
            times = f"median {format_duration(run.latency)}, total {format_duration(run.total)}"
            progress.print(f"run {number} of {runs}: {run.peer}: {times}", soft_wrap=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "postcopy.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

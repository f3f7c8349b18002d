"""How long do trackers take to tell which pages were written, and what do they cost who writes?

Beside each figure stands that of a program in C that makes the same system calls. See docs/benchmarks.md.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
import numpy as np
from msgspec import Struct
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

import dirtylog
from benchmarks.support.compiler import need_header
from benchmarks.support.report import Host
from benchmarks.support.script import run_script
from benchmarks.support.tracker_charts import draw
from benchmarks.support.tracker_report import encode, line, tables
from benchmarks.support.tracker_runs import CASES, SUBJECTS, Measurement, measure
from benchmarks.support.tracker_sides import compile_raw
from dirtylog.cli.options import SIZE
from dirtylog.errors import HostError, UsageError
from dirtylog.units import GIB, MIB

_FILE_WIDTH: Final = 200


class Options(Struct, frozen=True):
    """What was asked for. Sizes in bytes."""

    runs: int
    size: int
    trackers: tuple[str, ...]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each, per case.")
@click.option("--size", type=SIZE, default=GIB, show_default="1G", help="How much memory is tracked, whole MiB.")
@click.option(
    "--tracker",
    "trackers",
    type=click.Choice(list(SUBJECTS)),
    multiple=True,
    default=tuple(SUBJECTS),
    show_default="all",
    help="What is measured; may be given several times.",
)
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
@click.option(
    "--chart",
    "charts",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also draw a chart of each tracker, TRACKER.png.",
)
def command(
    runs: int, size: int, trackers: tuple[str, ...], markdown: bool, json_path: str | None, charts: Path | None
) -> None:
    """Time trackers, each beside a program in C that makes the same system calls.

    Takes twice the memory that is tracked, and four times as much for comparison.
    """
    if size % MIB or size <= 0:
        raise UsageError(f"{size} bytes are not whole MiB", remedy="give --size like 1G or 64M")
    options = Options(runs, size, trackers)
    measurements, left_out = _measure(options)
    host = msgspec.structs.replace(Host.this(()), peers={"dirtylog": dirtylog.__version__, "numpy": np.__version__})
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, measurements, left_out))
    if charts is not None:
        for tracker in dict.fromkeys(one.tracker for one in measurements):
            draw([one for one in measurements if one.tracker == tracker], charts)
    if json_path != "-":
        _print(host, measurements, left_out, markdown=markdown)


def _measure(options: Options) -> tuple[list[Measurement], dict[str, str]]:
    """What was measured; and the trackers that are not to be had here, with the reason."""
    progress = Console(stderr=True, highlight=False)
    measurements: list[Measurement] = []
    left_out = {}
    with tempfile.TemporaryDirectory(prefix="dirtylog-benchmark-") as folder:
        if "hashes" in options.trackers:
            need_header("xxhash.h", "libxxhash-dev")
        program = compile_raw(Path(folder))
        for tracker in options.trackers:
            try:
                for measured in measure(tracker, options.size, CASES, options.runs, program):
                    measurements.append(measured)
                    progress.print(line(measured), soft_wrap=True, markup=False)
            except HostError as error:
                left_out[tracker] = str(error)
    return measurements, left_out


def _print(host: Host, measurements: Sequence[Measurement], left_out: dict[str, str], *, markdown: bool) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if measurements:
        for table in tables(measurements, markdown=markdown):
            console.print(table)
            console.print()
    for tracker, reason in left_out.items():
        console.print(f"{tracker} is left out: {reason}", soft_wrap=True, markup=False)
    console.print(str(host), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "trackers.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

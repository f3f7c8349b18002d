"""How fast is the memory model: commits, look-ups, accesses, and bitmaps of terabytes of memory?

Beside each figure stands that of the raw operation that it cannot do without. See docs/benchmarks.md.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
import numpy as np
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

import dirtylog
from benchmarks.support.bitmaps import bitmap_figures
from benchmarks.support.model import access_figures, commit_figures, look_up_figures
from benchmarks.support.report import ABSENT, Host, Summary
from benchmarks.support.script import run_script
from benchmarks.support.timing import Figure
from dirtylog.cli.options import SIZE
from dirtylog.errors import UsageError
from dirtylog.units import MIB

PARTS: Final = ("commit", "look-up", "access", "bitmap")
DEFAULT_BITMAPS: Final = (32 * MIB, 384 * MIB)
_FILE_WIDTH: Final = 160
_UNITS: Final = (("us", 1e6), ("ms", 1e3), ("s", 1.0))


class Options(Struct, frozen=True):
    """What was asked for. Sizes in bytes."""

    runs: int
    parts: tuple[str, ...]
    bitmaps: tuple[int, ...]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each operation.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    default=PARTS,
    show_default="all",
    help="What is timed; may be given several times.",
)
@click.option(
    "--bitmap",
    "bitmaps",
    type=SIZE,
    multiple=True,
    default=DEFAULT_BITMAPS,
    show_default="32M, 384M",
    help="Size of a bitmap, for 32,768 times as much memory; may be given several times.",
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
def command(runs: int, parts: tuple[str, ...], bitmaps: tuple[int, ...], json_path: str | None) -> None:
    """Time the memory model, each operation beside the raw one that it cannot do without.

    The bitmaps of 384 MiB take 3 GiB of memory.
    """
    options = Options(runs, parts, bitmaps)
    wrong = next((size for size in bitmaps if size <= 0 or size % 8), None)
    if wrong is not None:
        raise UsageError(f"a bitmap of {wrong} bytes is not made of 64-bit words", remedy="give sizes like 32M")
    progress = Console(stderr=True, highlight=False)
    figures = []
    for figure in _measure(options):
        figures.append(figure)
        progress.print(f"{figure.name}: {', '.join(row(figure)[1:])}", soft_wrap=True, markup=False)
    host = msgspec.structs.replace(Host.this(()), peers={"dirtylog": dirtylog.__version__, "numpy": np.__version__})
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, figures))
    if json_path != "-":
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(table(figures))
        console.print(str(host), soft_wrap=True)


def _measure(options: Options) -> Iterator[Figure]:
    if "commit" in options.parts:
        yield from commit_figures(options.runs)
    if "look-up" in options.parts:
        yield from look_up_figures(options.runs)
    if "access" in options.parts:
        yield from access_figures(options.runs)
    if "bitmap" in options.parts:
        yield from bitmap_figures(options.bitmaps, options.runs)


def table(figures: Sequence[Figure]) -> Table:
    """A row a figure: medians with extremes, and dirtylog's time as a multiple of the raw operation's."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    result.add_column("median [min..max]", no_wrap=True)
    for name in ("dirtylog", "limit", "raw operation", "", "times"):
        result.add_column(name, justify="right" if name else "left", no_wrap=True)
    for figure in figures:
        result.add_row(*row(figure))
    return result


def row(figure: Figure) -> tuple[str, str, str, str, str, str]:
    """The cells of one."""
    ours, raw = Summary.of(figure.samples), Summary.of(figure.raw)
    limit = ABSENT
    if figure.limit is not None and ours is not None:
        verdict = "met" if ours.median <= figure.limit else "missed"
        limit = f"{_show(Summary(figure.limit, figure.limit, figure.limit), figure.size)}, {verdict}"
    multiple = f"{ours.median / raw.median:.1f}" if ours is not None and raw is not None else ABSENT
    shown, raw_shown = (ABSENT if one is None else _show(one, figure.size) for one in (ours, raw))
    return figure.name, shown, limit, raw_shown, figure.raw_name or ABSENT, multiple


def _show(summary: Summary, size: int | None) -> str:
    """Times or, where a number of bytes is moved, speeds; all in the unit that suits the median."""
    values = [summary.median, summary.low, summary.high]
    if size is None:
        unit, factor = next((unit for unit in _UNITS if summary.median * unit[1] < 1000), _UNITS[-1])
        values = [value * factor for value in values]
    else:
        unit, values = "GB/s", [size / value / 1e9 for value in values]
        values[1:] = sorted(values[1:])
    digits = 2 if values[0] < 10 else 1 if values[0] < 100 else 0
    median, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{median} {unit}" if low == high else f"{median} [{low}..{high}] {unit}"


def encode(host: Host, options: Options, figures: Sequence[Figure]) -> bytes:
    """All of it as JSON: times in seconds, sizes in bytes."""
    content = {"host": host, "setup": options, "figures": figures}
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "memory_model.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How long does a guest stand still that is handed over on one host, and how long does all of it take?

Boots a guest that writes memory for ever, hands it to another process with its memory, and beside it migrates the same
guest by copying. See docs/benchmarks.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from msgspec import Struct
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.measure import Setup, measure
from benchmarks.support.peers import Dirtylog, Peer, Terms
from benchmarks.support.report import Host, encode, line, tables
from benchmarks.support.script import run_script
from benchmarks.support.workloads import Rounds
from dirtylog.cli.options import SIZE
from dirtylog.errors import UsageError
from dirtylog.units import MIB

FIRST: Final = MIB
LAST: Final = 512 * MIB
_LIMIT: Final = 0.3
_FILE_WIDTH: Final = 140


class Options(Struct, frozen=True):
    """What was asked for; sizes in bytes."""

    runs: int
    memory: tuple[int, ...]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each size.")
@click.option(
    "--memory",
    type=SIZE,
    multiple=True,
    default=["1G", "16G", "256G"],
    show_default=True,
    help="RAM of the guest, whole MiB; it writes 512 MiB of it.",
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
def command(runs: int, memory: tuple[int, ...], json_path: str | None) -> None:
    """Hand a running guest over to another process, and compare with copying it."""
    for size in memory:
        if size % MIB or size < LAST:
            raise UsageError(
                f"{size} bytes of RAM are not whole MiB, or fewer than 512", remedy="give --memory like 1G"
            )
    options = Options(runs, memory)
    peers: list[Peer] = [Dirtylog("copied"), Dirtylog("handed over", shares=True)]
    host = Host.this(peers)
    progress = Console(stderr=True, highlight=False)
    results = []
    for size in memory:
        setup = Setup(size, Rounds(FIRST, LAST), Terms(_LIMIT))
        for number in range(1, runs + 1):
            for peer in peers:
                results.append(measure(peer, setup))
                progress.print(f"{setup}, run {number} of {runs}: {line(results[-1])}", soft_wrap=True)
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, results))
    if json_path != "-":
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(tables(results, ("copied", "handed over")))
        console.print(str(host), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "live_update.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

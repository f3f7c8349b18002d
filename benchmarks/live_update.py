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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.compare import compare
from benchmarks.support.measure import Setup
from benchmarks.support.peers import Dirtylog, Peer, Terms
from benchmarks.support.script import run_script
from benchmarks.support.workloads import Rounds
from dirtylog.cli.options import SIZE
from dirtylog.units import MIB

FIRST: Final = MIB
LAST: Final = 512 * MIB
_LIMIT: Final = 0.3


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
    setups = [Setup(size, Rounds(FIRST, LAST), Terms(_LIMIT)) for size in memory]
    peers: list[Peer] = [Dirtylog("copied"), Dirtylog("handed over", shares=True)]
    compare(Options(runs, memory), setups, runs, peers, ("copied", "handed over"), json_path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "live_update.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

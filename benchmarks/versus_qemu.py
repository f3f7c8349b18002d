"""Which migrates a guest faster, QEMU or dirtylog?

Boots the same image in both in turn, several times, migrates it between two processes while it writes memory, and
shows what that took. See docs/benchmarks.md.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.bare import SCHEMES
from benchmarks.support.compare import compare
from benchmarks.support.measure import Setup
from benchmarks.support.peers import QEMU, Dirtylog, Peer, Terms
from benchmarks.support.script import run_script
from benchmarks.support.workloads import Idle, Pulses, Rounds, Workload
from dirtylog.cli.options import DURATION, RATE, SIZE
from dirtylog.errors import UsageError
from dirtylog.units import parse_size

DEFAULT_RANGES: Final = ("1M-100M", "1M-512M")
_PEERS: Final[dict[str, type[QEMU] | type[Dirtylog]]] = {"QEMU": QEMU, "dirtylog": Dirtylog}


class Options(Struct, frozen=True):
    """What was asked for. Sizes in bytes, times in seconds."""

    ranges: tuple[tuple[int, int], ...]
    pulses: tuple[tuple[int, int], ...]
    idle: tuple[int, ...]
    runs: int
    memory: tuple[int, ...]
    limit: tuple[float, ...]
    channels: tuple[int, ...]
    bandwidth: tuple[int, ...]
    uri_scheme: str
    watch: float
    timeout: float

    def setups(self) -> list[Setup]:
        """All combinations."""
        workloads: list[Workload] = [
            *(Rounds(*each) for each in self.ranges),
            *(Pulses(*each) for each in self.pulses),
            *(Idle(size) for size in self.idle),
        ]
        terms = [Terms(*each) for each in itertools.product(self.limit, self.channels, self.bandwidth)]
        return [
            Setup(*each, self.uri_scheme, self.timeout, self.watch)
            for each in itertools.product(self.memory, workloads, terms)
        ]


class RangeType(click.ParamType):  # type: ignore[type-arg]  # generic only in recent releases of click
    """Two sizes with a dash between."""

    name = "first-last"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers, which the guest accepts."""
        first, _, last = str(value).partition("-")
        try:
            result = parse_size(first), parse_size(last)
            Rounds(*result).image()
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return result


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each combination.")
@click.option(
    "--range",
    "ranges",
    type=RangeType(),
    multiple=True,
    help=f"A guest that writes that, over and over. Without any guest: {', '.join(DEFAULT_RANGES)}.",
)
@click.option(
    "--pulse",
    "pulses",
    type=RangeType(),
    multiple=True,
    help="One that also sends characters all the time, which show how long it stood still.",
)
@click.option("--idle", type=SIZE, multiple=True, help="A guest that writes nothing and has that much random content.")
@click.option("--memory", type=SIZE, multiple=True, default=["1G"], show_default=True, help="Its RAM, whole MiB.")
@click.option(
    "--limit", type=DURATION, multiple=True, default=["300ms"], show_default=True, help="How long it may stand still."
)
@click.option(
    "--channels",
    type=click.IntRange(min=1),
    multiple=True,
    default=[1],
    show_default=True,
    help="Parallel connections; for QEMU, multifd's.",
)
@click.option(
    "--bandwidth",
    type=RATE,
    multiple=True,
    default=[0],
    help="Send no faster while the guest runs. No limit unless given.",
)
@click.option("--peer", "peers", type=click.Choice(list(_PEERS)), multiple=True, help="Who; both by default.")
@click.option("--uri-scheme", type=click.Choice(SCHEMES), default="unix", show_default=True, help="The connection.")
@click.option(
    "--watch",
    type=DURATION,
    default=0.0,
    help="Watch dirtylog's guest for that time before each migration, and set a forecast beside it.",
)
@click.option(
    "--timeout", type=DURATION, default=60.0, show_default="60s", help="After that a migration does not converge."
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
def command(
    runs: int,
    ranges: tuple[tuple[int, int], ...],
    pulses: tuple[tuple[int, int], ...],
    idle: tuple[int, ...],
    memory: tuple[int, ...],
    limit: tuple[float, ...],
    channels: tuple[int, ...],
    bandwidth: tuple[int, ...],
    peers: tuple[str, ...],
    uri_scheme: str,
    watch: float,
    timeout: float,
    json_path: str | None,
) -> None:
    """Migrate the same guest with QEMU and with dirtylog, and compare.

    Options that may be given several times are tried in all combinations. A guest either adds 1 to a byte in each page
    of a range for ever, or is idle. It is checked after each migration.
    """
    if not ranges and not pulses and not idle:
        ranges = tuple(RangeType().convert(text, None, None) for text in DEFAULT_RANGES)
    options = Options(ranges, pulses, idle, runs, memory, limit, channels, bandwidth, uri_scheme, watch, timeout)
    programs: list[Peer] = [program() for name, program in _PEERS.items() if name in (peers or _PEERS)]
    compare(options, options.setups(), runs, programs, ("QEMU", "dirtylog"), json_path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    return run_script(command, "versus_qemu.py", arguments)


if __name__ == "__main__":
    sys.exit(main())

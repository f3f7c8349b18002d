"""Which migrates a guest faster, QEMU or dirtylog?

Boots the same image in both in turn, several times, migrates it between two processes while it writes memory, and
shows what that took. See docs/benchmarks.md.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from msgspec import Struct
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.support.bare import SCHEMES
from benchmarks.support.measure import Run, Setup, measure
from benchmarks.support.peers import QEMU, Dirtylog, Peer
from benchmarks.support.report import Host, encode, line, range_text, table
from dirtylog.cli.main import exit_status
from dirtylog.cli.options import DURATION, SIZE
from dirtylog.errors import DirtylogError, UsageError
from dirtylog.guests.dirtier import build
from dirtylog.units import GIB, MIB, parse_size

DEFAULT_RANGES: Final = ("1M-100M", "1M-512M")
_FILE_WIDTH: Final = 140


class Options(Struct, frozen=True):
    """What was asked for. Sizes in bytes, times in seconds."""

    ranges: tuple[tuple[int, int], ...]
    runs: int
    memory: int
    limit: float
    uri_scheme: str
    timeout: float


class RangeType(click.ParamType):  # type: ignore[type-arg]  # generic only in recent releases of click
    """Two sizes with a dash between."""

    name = "first-last"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers, which the guest accepts."""
        first, _, last = str(value).partition("-")
        try:
            result = parse_size(first), parse_size(last)
            build(*result)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return result


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each, per range.")
@click.option("--memory", type=SIZE, default=GIB, show_default="1G", help="RAM of the guest, whole MiB.")
@click.option(
    "--range",
    "ranges",
    type=RangeType(),
    multiple=True,
    default=DEFAULT_RANGES,
    show_default=True,
    help="What the guest writes, over and over; may be given several times.",
)
@click.option("--limit", type=DURATION, default=0.3, show_default="300ms", help="How long it may stand still.")
@click.option("--uri-scheme", type=click.Choice(SCHEMES), default="unix", show_default=True, help="The connection.")
@click.option(
    "--timeout", type=DURATION, default=60.0, show_default="60s", help="After that a migration does not converge."
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write every run as JSON; to standard output, alone, if it is '-'."
)
def command(
    runs: int,
    memory: int,
    ranges: tuple[tuple[int, int], ...],
    limit: float,
    uri_scheme: str,
    timeout: float,
    json_path: str | None,
) -> None:
    """Migrate the same guest with QEMU and with dirtylog, and compare.

    The guest adds 1 to a byte in each page of a range for ever, and is checked after each migration.
    """
    options = Options(ranges, runs, memory, limit, uri_scheme, timeout)
    _check(options)
    peers = QEMU(), Dirtylog()
    host = Host.this(peers)
    results = _run_all(options, peers)
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, results))
    if json_path != "-":
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(table(results, (peers[0].name, peers[1].name)))
        console.print(str(host), soft_wrap=True)


def _check(options: Options) -> None:
    if options.memory % MIB or not options.memory:
        raise UsageError(f"{options.memory} bytes of RAM are not whole MiB", remedy="give --memory like 1G or 512M")
    beyond = next((last for _, last in options.ranges if last > options.memory), None)
    if beyond is not None:
        raise UsageError(f"the guest cannot write up to {beyond:#x} in {options.memory:#x} bytes of RAM")


def _run_all(options: Options, peers: Sequence[Peer]) -> list[Run]:
    """In turn, so that whatever else the host does strikes both."""
    progress = Console(stderr=True, highlight=False)
    results = []
    for first, last in options.ranges:
        setup = Setup(options.memory, first, last, options.limit, options.uri_scheme, options.timeout)
        for number in range(1, options.runs + 1):
            for peer in peers:
                run = measure(peer, setup)
                results.append(run)
                where = f"{range_text(first, last)}, run {number} of {options.runs}"
                progress.print(f"{where}: {line(run)}", soft_wrap=True)
    return results


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, and so ends what was started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, or the process's own; the exit status."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        result = command.main(arguments, prog_name="versus_qemu.py", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return 128 + signal.SIGINT
    except DirtylogError as error:
        print(f"versus_qemu.py: error: {error}", file=sys.stderr)
        return exit_status(error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

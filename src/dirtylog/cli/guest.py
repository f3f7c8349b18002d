"""``dirtylog guest``: write the boot image of a guest that dirties memory."""

from pathlib import Path
from typing import Final

import click

from dirtylog.cli.options import RATE, SIZE
from dirtylog.errors import HostError, UsageError
from dirtylog.guests import dirtier, random_writer

_ROUNDS: Final = "rounds"
_RANDOM: Final = "random"


@click.command("guest")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--first", type=SIZE, default="1M", show_default=True, help="Start of the range it writes.")
@click.option("--last", type=SIZE, default="100M", show_default=True, help="End of the range it writes.")
@click.option(
    "--pattern",
    type=click.Choice([_ROUNDS, _RANDOM]),
    default=_ROUNDS,
    show_default=True,
    help="Every page in order, round after round; or one page after the other at random.",
)
@click.option("--rate", type=RATE, help="Pages to write a second, as bytes; as many as it can unless given.")
def command(output: Path, first: int, last: int, pattern: str, rate: int | None) -> None:
    """Write the boot image of a guest that dirties memory to OUTPUT.

    It adds 1 to a byte in each page of a range, in order, for ever, counts its rounds, and sends a character on the
    serial port each round; or, with --pattern random, does so to pages at random, and counts its writes; with --rate at
    that rate, which it holds under KVM only. The same file boots under 'dirtylog run' and in QEMU.
    """
    image = _build(first, last, pattern, rate)
    try:
        output.write_bytes(image)
    except OSError as error:
        raise HostError(f"cannot write {output}: {error.strerror}", remedy="choose a place you may write to") from error


def _build(first: int, last: int, pattern: str, rate: int | None) -> bytes:
    if pattern == _RANDOM:
        return random_writer.build(first, last, rate=rate or 0)
    if rate is not None:
        raise UsageError("--rate is for --pattern random", remedy="give both, or none")
    return dirtier.build(first, last)

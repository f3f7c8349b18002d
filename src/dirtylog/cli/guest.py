"""``dirtylog guest``: write the boot image of the guest that dirties memory."""

from pathlib import Path

import click

from dirtylog.cli.options import SIZE
from dirtylog.errors import HostError
from dirtylog.guests.dirtier import build


@click.command("guest")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--first", type=SIZE, default="1M", show_default=True, help="Start of the range it writes.")
@click.option("--last", type=SIZE, default="100M", show_default=True, help="End of the range it writes.")
def command(output: Path, first: int, last: int) -> None:
    """Write the dirtier guest's boot image to OUTPUT.

    It adds 1 to a byte in each page of a range, in order, for ever, counts its rounds, and sends a character on the
    serial port each round. The same file boots under 'dirtylog run' and in QEMU.
    """
    image = build(first, last)
    try:
        output.write_bytes(image)
    except OSError as error:
        raise HostError(f"cannot write {output}: {error.strerror}", remedy="choose a place you may write to") from error

"""The command ``dirtylog``: finds the subcommand, and turns errors into a message and an exit status."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

import dirtylog
from dirtylog.cli.text import printable
from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    GuestError,
    HostError,
    KernelError,
    PeerError,
    UsageError,
)

COMMANDS: Final = {
    "run": "Run a boot image as a guest, or wait for one to arrive.",
    "migrate": "Move a running guest to another process.",
    "recover": "Have a guest that lacks memory wait for its source.",
    "watch": "Show which memory of a running guest is written, and how fast.",
    "predict": "Predict how a migration of a running guest would go.",
    "guest": "Write the boot image of the guest that dirties memory.",
    "inspect": "Show a running machine's memory: regions, views, dirty pages.",
    "doctor": "Show what this host offers, what is missing, and how to get it.",
}
"""Every subcommand with its line in the list; ``dirtylog.cli.NAME`` holds it as ``command`` and is loaded when used."""

EXIT_STATUS: Final[dict[type[DirtylogError], int]] = {
    UsageError: 2,
    HostError: 3,
    KernelError: 4,
    PeerError: 5,
    GuestError: 6,
    CancelledError: 130,
    DirtylogError: 1,
}
"""The exit status of an error is that of its nearest class here."""

_INTERRUPTED: Final = 130  # as a shell reports a program that SIGINT ended
_BROKEN_PIPE: Final = 1

_EPILOG: Final = """\b
Exit status:
  0    all went well
  1    none of those below
  2    asked for something that cannot be
  3    this host lacks something
  4    the kernel refused
  5    the other side of a connection is to blame
  6    the guest did something impossible
  130  cancelled"""


class CommandTable(click.Group):
    """A group whose subcommands are those of `COMMANDS`, loaded one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """All names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """Load a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"dirtylog.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"dirtylog.cli.{cmd_name}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """List the subcommands without loading any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=CommandTable, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(dirtylog.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Know which pages of memory were written, and put that to work: live migration of running guests.

    Sizes, rates and durations take units: 512M, 10Gbit, 300ms.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run ``dirtylog`` with the given arguments, or the process's own; returns the exit status."""
    try:
        status = _run(args)
        click.echo(nl=False)  # flushes; a pipe that broke shows here at the latest
    except BrokenPipeError:
        # Nobody reads our output any more. What is still buffered must not raise again at the interpreter's end.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return _BROKEN_PIPE
    return status


def _run(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args, prog_name="dirtylog", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return _INTERRUPTED
    except DirtylogError as error:
        _show(error)
        return exit_status(error)
    return result if isinstance(result, int) else 0


def exit_status(error: DirtylogError) -> int:
    """The exit status that tells what kind of error ended a command."""
    return next(EXIT_STATUS[kind] for kind in type(error).__mro__ if kind in EXIT_STATUS)


def _show(error: DirtylogError) -> None:
    click.echo(f"dirtylog: error: {printable(error.cause)}", err=True)
    if error.remedy is not None:
        click.echo(f"  remedy: {printable(error.remedy)}", err=True)


if __name__ == "__main__":
    sys.exit(main())

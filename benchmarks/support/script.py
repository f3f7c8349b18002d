"""What all scripts do around their work: exit statuses, and an end that leaves nothing."""

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from dirtylog.cli.main import exit_status
from dirtylog.errors import DirtylogError


def run_script(command: click.Command, name: str, arguments: Sequence[str] | None) -> int:
    """Run a command with the given arguments, or the process's own; the exit status."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        result = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return 128 + signal.SIGINT
    except DirtylogError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return exit_status(error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result if isinstance(result, int) else 0


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, and so ends what was started

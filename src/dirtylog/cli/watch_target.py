"""Finding the QMP socket of a machine by its process."""

import os
import re
from pathlib import Path
from typing import Final

import click

from dirtylog.cli.run import command as run_command
from dirtylog.errors import HostError, UsageError

_PROGRAM: Final = re.compile(r"(.*/)?dirtylog|dirtylog\.cli\.main|(.*/)?dirtylog/cli/main\.py")
_REMEDY: Final = "name a process of 'dirtylog run' that was started with --qmp, or its QMP socket"


def find_qmp(target: str) -> str:
    """The path of the QMP socket that is meant: the target itself, or that of the process whose number it is.

    Raises:
        UsageError: there is no such process, it is no machine, or it serves no QMP.
        HostError: another user's process.
    """
    if re.fullmatch("[0-9]+", target) is None:
        return target
    process = Path("/proc") / target
    try:
        arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")[:-1]
        path = _qmp_option(target, arguments)
        return path if os.path.isabs(path) else os.path.join(os.readlink(process / "cwd"), path)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise UsageError(f"there is no process {target}", remedy=_REMEDY) from error
    except PermissionError as error:
        raise HostError(
            f"no permission to look at process {target}",
            remedy="run as the user who owns the machine, or as root",
        ) from error


def _qmp_option(target: str, arguments: list[str]) -> str:
    """What a process was given with --qmp, as its own command line is parsed."""
    programs = (n for n, word in enumerate(arguments[:-1]) if _PROGRAM.fullmatch(word) and arguments[n + 1] == "run")
    place = next(programs, None)
    if place is None:
        raise UsageError(f"process {target} is not a machine that 'dirtylog run' runs", remedy=_REMEDY)
    context = click.Context(run_command, ignore_unknown_options=True, allow_extra_args=True, resilient_parsing=True)
    options, _, _ = run_command.make_parser(context).parse_args(arguments[place + 2 :])
    path = options.get("qmp")
    if not isinstance(path, str):
        raise UsageError(f"the machine of process {target} serves no QMP", remedy="start it with --qmp PATH")
    return path

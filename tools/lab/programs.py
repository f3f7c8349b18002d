"""Programs of the host, and Debian's packages that have them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dirtylog.errors import HostError

_INSTALL: Final = Path(__file__).resolve().parents[1] / "apt-install"


def find(name: str, package: str) -> str:
    """The path of a program, which is installed if it is missing.

    Raises:
        HostError: it is not here, and cannot be installed.
    """
    if (path := shutil.which(name)) is not None:
        return path
    installed = subprocess.run([_INSTALL, package], capture_output=True, text=True)
    path = shutil.which(name)
    if path is None:
        raise HostError(f"there is no {name} here: {installed.stderr.strip()}", remedy=f"install {package}")
    return path


def output(command: Sequence[str], package: str, *, directory: Path | None = None) -> str:
    """What a program writes.

    Raises:
        HostError: it is not here, or failed.
    """
    program, *arguments = command
    done = subprocess.run(
        [find(program, package), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    if done.returncode:
        raise HostError(f"{program} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout

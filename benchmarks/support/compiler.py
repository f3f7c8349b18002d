"""Programs in C, compiled when they are needed."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dirtylog.errors import HostError

_COMPILERS: Final = ("cc", "gcc", "clang")
_INSTALL: Final = Path(__file__).parents[2] / "tools" / "apt-install"
_SECONDS: Final = 60
_INSTALL_SECONDS: Final = 600


def compile_program(folder: Path, sources: Sequence[Path]) -> Path:
    """Compile C files into a program in a folder, which has the name of the first; install a compiler if there is none.

    Raises:
        HostError: there is no compiler and none can be installed, or it does not do its work.
    """
    path = folder / sources[0].stem
    command = [_compiler(), "-O2", "-Wall", "-Wextra", "-o", str(path), *map(str, sources)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if result.returncode:
        raise HostError(f"{' '.join(command)} failed: {result.stderr.strip()}", remedy="is libc6-dev installed?")
    return path


def need_header(name: str, package: str) -> None:
    """See that C files can include a header; install Debian's package if they cannot.

    Raises:
        HostError: it cannot be installed.
    """
    command = [_compiler(), "-x", "c", "-fsyntax-only", "-include", name, "/dev/null"]
    if subprocess.run(command, capture_output=True, timeout=_SECONDS).returncode:
        _install(package)


def find_compiler() -> str | None:
    """The path of a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def _compiler() -> str:
    found = find_compiler()
    if found is None:
        _install("gcc", "libc6-dev")
        found = find_compiler()
    if found is None:
        raise HostError("there is no C compiler", remedy=f"install one of {', '.join(_COMPILERS)}")
    return found


def _install(*packages: str) -> None:
    result = subprocess.run([_INSTALL, *packages], capture_output=True, text=True, timeout=_INSTALL_SECONDS)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise HostError(said[-1] if said else f"{_INSTALL.name} failed", remedy=f"install {' '.join(packages)} by hand")

"""What a guest needs to run the tests: Python, installed packages, the libraries of both, and the project."""

import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from dirtylog.errors import HostError
from tools.lab.archive import Archive
from tools.lab.programs import output

PROJECT: Final = Path(__file__).resolve().parents[2]
FOLDERS: Final = ("src", "tests", "guests", "benchmarks", "examples", "docs", "tools")
"""What of the project tests may use, beside the files at its top."""

DISTRIBUTIONS: Final = ("dirtylog", "pytest", "pytest-timeout", "hypothesis", "qemu.qmp")
OPTIONAL: Final = ("unicorn",)
"""Taken along where they are installed."""

INIT: Final = f"""#!{sys.executable} -B
import sys
sys.path.insert(0, {str(PROJECT)!r})
from tools.lab.init import main
main()
""".encode()
"""The first program: the kernel finds it by its name, ``/init``."""

HOSTS: Final = b"127.0.0.1 localhost\n::1 localhost\n"
USERS: Final = b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"

_UNUSED_STANDARD: Final = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
}
_UNUSED: Final = {"tests", "include"}
_LIBRARY: Final = re.compile(r"(?:=> )?(/\S+) \(0x[0-9a-f]+\)")  # of ldd(1)
_ELF: Final = b"\x7fELF"


def add_all(archive: Archive) -> None:
    """Put it all into an archive."""
    files = [*python_files(), *distribution_files(closure(DISTRIBUTIONS, OPTIONAL))]
    for path in (*files, *libraries(filter(_is_elf, files)), *project_files(PROJECT)):
        archive.add(path)


def python_files() -> Iterator[Path]:
    """The interpreter of this virtual environment, and the standard library without its tests."""
    yield from (Path(sys.executable), Path(sys.prefix, "pyvenv.cfg"))
    for name in sorted({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}):
        root = Path(name)
        yield from (
            path for path in _walk(root, _UNUSED_STANDARD) if not path.relative_to(root).parts[0].startswith("config-")
        )


def closure(names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions with all that they require, by name.

    Raises:
        HostError: one of ``names``, or something required, is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [*names, *(name for name in optional if _installed(name))]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise HostError(f"the package {name} is not installed", remedy="run: make setup") from error
        requirements = map(Requirement, found[name].requires or ())
        wanted += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def distribution_files(distributions: dict[str, importlib.metadata.Distribution]) -> Iterator[Path]:
    """What was installed of them, without their tests and headers."""
    for distribution in distributions.values():
        for file in distribution.files or ():
            if not _UNUSED.intersection(file.parts) and file.suffix != ".a":
                path = Path(str(file.locate()))
                if path.exists():  # compiled modules come and go
                    yield path


def project_files(project: Path) -> Iterator[Path]:
    """All of the project that tests may use."""
    yield from (path for path in sorted(project.iterdir()) if path.is_file())
    for folder in FOLDERS:
        yield from _walk(project / folder, {"__pycache__"})


def libraries(files: Iterable[Path]) -> list[Path]:
    """The shared libraries that programs and libraries load, as ldd(1) finds them."""
    listing = output(["ldd", *map(str, sorted(set(files)))], package="libc-bin")
    return sorted({Path(name) for name in _LIBRARY.findall(listing)})


def _walk(root: Path, unused: set[str]) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not unused.intersection(path.relative_to(root).parts):
            yield path


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ELF)) == _ELF


def _installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))

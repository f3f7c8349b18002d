"""Debian's newest cloud kernel, fetched with apt-get(8) but not installed."""

import lzma
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dirtylog.errors import HostError
from tools.lab.programs import output

METAPACKAGE: Final = "linux-image-cloud-amd64"
_DEPENDENCY: Final = re.compile(r"^\s*Depends: (linux-image-\S+-cloud-amd64)$", re.MULTILINE)
_MODULE_DEPENDENCIES: Final = re.compile(rb"\0depends=([^\0]*)\0")  # in the section .modinfo
_REMEDY: Final = f"run as root: apt-get update; if there is no package {METAPACKAGE} then, this is not Debian"


@dataclass(frozen=True)
class Kernel:
    """A kernel package, unpacked.

    Attributes:
        release: as uname(1) shows it.
        directory: where it is.
    """

    release: str
    directory: Path

    @property
    def image(self) -> Path:
        """What boots."""
        return self.directory / "boot" / f"vmlinuz-{self.release}"

    def modules(self, name: str) -> dict[str, bytes]:
        """A module's content by its name, after that of each module that it needs: the order to load them in."""
        content = self._module(name)
        stated = _MODULE_DEPENDENCIES.search(content)
        result: dict[str, bytes] = {}
        for needed in stated[1].decode().split(",") if stated else ():
            if needed:
                result |= self.modules(needed)
        return result | {name: content}

    def _module(self, name: str) -> bytes:
        file_name = re.sub("[-_]", "[-_]", name)
        found = sorted(self.directory.glob(f"lib/modules/{self.release}/**/{file_name}.ko*"))
        if not found:
            raise HostError(f"the kernel {self.release} has no module {name}")
        content = found[0].read_bytes()
        return lzma.decompress(content) if found[0].suffix == ".xz" else content


def fetch(cache: Path, say: Callable[[str], None]) -> Kernel:
    """The kernel that apt knows as the newest, from the cache if it is there.

    Raises:
        HostError: there is none to be had.
    """
    package = _newest(say)
    directory = cache / package
    if not directory.exists():
        say(f"fetching {package}, which is not installed but unpacked into {directory}")
        _download(package, directory)
    return unpacked(directory)


def unpacked(directory: Path) -> Kernel:
    """The kernel in an unpacked package.

    Raises:
        HostError: there is none.
    """
    images = sorted(directory.glob("boot/vmlinuz-*"))
    if not images:
        raise HostError(f"there is no kernel in {directory}", remedy="remove it, so that it is fetched again")
    return Kernel(images[-1].name.removeprefix("vmlinuz-"), directory)


def _newest(say: Callable[[str], None]) -> str:
    if (package := _dependency()) is None:
        say("renewing the lists of packages, which do not have a kernel")
        output([*_as_root(), "apt-get", "update"], package="apt")
        package = _dependency()
    if package is None:
        raise HostError(f"no kernel is to be had through {METAPACKAGE}", remedy=_REMEDY)
    return package


def _dependency() -> str | None:
    try:
        found = _DEPENDENCY.search(output(["apt-cache", "depends", METAPACKAGE], package="apt"))
    except HostError:
        return None
    return found[1] if found else None


def _as_root() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def _download(package: str, directory: Path) -> None:
    """Make the directory; whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        scratch = Path(name)
        output(["apt-get", "download", package], package="apt", directory=scratch)
        unpack = scratch / "unpacked"
        for file in scratch.glob("*.deb"):
            output(["dpkg-deb", "--extract", str(file), str(unpack)], package="dpkg")
        unpacked(unpack)
        unpack.rename(directory)

"""An initramfs in which files have the paths that they have here.

A virtual environment, an interpreter and their libraries know where they are; kept there, they need no adjusting.
"""

import stat
from pathlib import Path
from typing import BinaryIO, Final

from dirtylog.errors import HostError

_MAGIC: Final = "070701"  # "newc", Documentation/driver-api/early-userspace/buffer-format.rst
_TRAILER: Final = "TRAILER!!!"
_ALIGNMENT: Final = 4
_MOST_LINKS: Final = 40  # MAXSYMLINKS


class Archive:
    """Writes a cpio archive of the kind that Linux unpacks as its first root.

    Args:
        file: where it goes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entries = 0
        self._present: set[Path] = {Path("/")}

    def add(self, path: Path) -> None:
        """A file or a directory, without what is in it, and all directories and symbolic links that lead there."""
        here, ahead, links = Path("/"), _parts(path.absolute()), 0
        while ahead:
            step = ahead.pop()
            here = here.parent if step == ".." else here / step
            if here.is_symlink():
                links += 1
                if links > _MOST_LINKS:
                    raise HostError(f"{path} leads nowhere: too many symbolic links")
                target = here.readlink()
                self._entry(here, stat.S_IFLNK | 0o777, bytes(target))
                here = Path("/") if target.is_absolute() else here.parent
                ahead += _parts(target)
            elif here not in self._present:
                self._add_real(here)

    def add_bytes(self, path: Path, content: bytes, *, mode: int = 0o644) -> None:
        """A file that is not here."""
        self.add_directory(path.parent)
        self._entry(path, stat.S_IFREG | mode, content)

    def add_directory(self, path: Path) -> None:
        """An empty directory, to mount something on."""
        for directory in [*reversed(path.parents), path]:
            self._entry(directory, stat.S_IFDIR | 0o755, b"")

    def finish(self) -> None:
        """Write what ends an archive."""
        self._write(_TRAILER, 0, 0, b"")

    def _add_real(self, path: Path) -> None:
        status = path.stat()
        content = b"" if stat.S_ISDIR(status.st_mode) else path.read_bytes()
        self._entry(path, status.st_mode, content, int(status.st_mtime))

    def _entry(self, path: Path, mode: int, content: bytes, mtime: int = 0) -> None:
        if path in self._present:
            return
        self._present.add(path)
        self._write(str(path.relative_to("/")), mode, mtime, content)

    def _write(self, name: str, mode: int, mtime: int, content: bytes) -> None:
        self._entries += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, user, group, links, time, size, device (2), device it is (2), bytes of the name, checksum
        fields = (self._entries, mode, 0, 0, links, mtime, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = _MAGIC + "".join(f"{field & 0xFFFF_FFFF:08X}" for field in fields)
        self._file.write(_padded(header.encode() + encoded))
        self._file.write(_padded(content))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _parts(path: Path) -> list[str]:
    """The last comes first."""
    return [part for part in reversed(path.parts) if part != path.root]

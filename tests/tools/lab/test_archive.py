import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from dirtylog.errors import HostError
from tools.lab.archive import Archive


@dataclass(frozen=True)
class Entry:
    mode: int
    mtime: int
    content: bytes


def unpack(data: bytes) -> dict[str, Entry]:
    """What a kernel would find: a slow reading of buffer-format.rst, where names and contents end at multiples of 4."""
    entries: dict[str, Entry] = {}
    offset = 0
    while True:
        assert data[offset : offset + 6] == b"070701"
        fields = [int(data[at : at + 8], 16) for at in range(offset + 6, offset + 110, 8)]
        mode, mtime, size, name_size = fields[1], fields[5], fields[6], fields[11]
        name = data[offset + 110 : offset + 110 + name_size]
        assert name.endswith(b"\0")
        start = (offset + 110 + name_size + 3) // 4 * 4
        offset = (start + size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert offset == len(data)
            return entries
        path = "/" + name[:-1].decode()
        assert path not in entries, "an entry stands twice"
        parent = os.path.dirname(path)
        assert parent == "/" or stat.S_ISDIR(entries[parent].mode), "a directory comes after what is in it"
        entries[path] = Entry(mode, mtime, data[start : start + size])


class Packed:
    """An archive and what is in it at the end."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self.archive = Archive(self._file)

    def entries(self) -> dict[str, Entry]:
        self.archive.finish()
        return unpack(self._file.getvalue())


@pytest.fixture
def packed() -> Packed:
    return Packed()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


@pytest.mark.parametrize("size", range(6))
def test_file_keeps_path_content_mode_and_time(packed: Packed, folder: Path, size: int) -> None:
    path = folder / "file"
    path.write_bytes(b"12345"[:size])
    path.chmod(0o751)
    os.utime(path, (0, 1_234_567_890))  # what compiled modules are checked against
    packed.archive.add(path)
    assert packed.entries()[str(path)] == Entry(stat.S_IFREG | 0o751, 1_234_567_890, b"12345"[:size])


def test_directories_come_once_and_first(packed: Packed, folder: Path) -> None:
    (folder / "one").write_text("1")
    (folder / "two").write_text("2")
    packed.archive.add(folder / "one")
    packed.archive.add(folder / "two")
    packed.archive.add(folder / "one")
    entries = packed.entries()
    assert [path for path in entries if path.startswith(str(folder))] == [
        str(folder),
        str(folder / "one"),
        str(folder / "two"),
    ]
    assert stat.S_ISDIR(entries[str(folder)].mode)


def test_link_comes_with_what_it_leads_to(packed: Packed, folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "file").write_text("content")
    (folder / "name").symlink_to("real")
    (folder / "absolute").symlink_to(folder / "name" / "file")
    packed.archive.add(folder / "absolute")
    entries = packed.entries()
    assert entries[str(folder / "absolute")].content.decode() == str(folder / "name" / "file")
    assert entries[str(folder / "name")] == Entry(stat.S_IFLNK | 0o777, 0, b"real")
    assert entries[str(folder / "real" / "file")].content == b"content"


def test_parent_of_a_link_is_that_of_its_target(packed: Packed, folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("the right one")
    (folder / "file").write_text("the wrong one")
    (folder / "link").symlink_to("a/b")
    packed.archive.add(folder / "link" / ".." / "file")
    entries = packed.entries()
    assert str(folder / "file") not in entries
    assert entries[str(folder / "a" / "file")].content == b"the right one"


def test_links_in_a_circle_are_refused(packed: Packed, folder: Path) -> None:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    with pytest.raises(HostError, match="leads nowhere"):
        packed.archive.add(folder / "one")


def test_content_that_is_nowhere_else_gets_its_directories(packed: Packed) -> None:
    packed.archive.add_bytes(Path("/lab/deep/file"), b"x", mode=0o755)
    packed.archive.add_directory(Path("/lab/deep"))
    assert packed.entries() == {
        "/lab": Entry(stat.S_IFDIR | 0o755, 0, b""),
        "/lab/deep": Entry(stat.S_IFDIR | 0o755, 0, b""),
        "/lab/deep/file": Entry(stat.S_IFREG | 0o755, 0, b"x"),
    }

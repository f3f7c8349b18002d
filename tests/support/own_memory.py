"""Memory of this process, of every kind that can be watched, and what can happen to it behind a watch's back."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from support.mappings import address_of
from support.require import require

from dirtylog.errors import HostError
from dirtylog.linux.pagemap import has_soft_dirty
from dirtylog.linux.write_watch import WriteWatch
from dirtylog.units import HUGE_PAGE_SIZE, PAGE_SIZE

Bytes = npt.NDArray[np.uint8]

PRIVATE: Final = mmap.MAP_PRIVATE
SHARED: Final = mmap.MAP_SHARED
_MAP_HUGETLB: Final = 0x40000
_MREMAP_MAYMOVE: Final = 1
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED: Final = 0x10
_PR_SET_DUMPABLE: Final = 4
_NOBODY: Final = 65534
_NR_HUGEPAGES: Final = Path("/proc/sys/vm/nr_hugepages")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.mremap.restype = ctypes.c_void_p


def anonymous(pages: int, flags: int = PRIVATE) -> mmap.mmap:
    """Pages that nobody has touched."""
    return mmap.mmap(-1, pages * PAGE_SIZE, flags=flags | mmap.MAP_ANONYMOUS)


def as_array(buffer: mmap.mmap | memoryview) -> Bytes:
    return np.frombuffer(buffer, np.uint8)


def mapped_file(folder: Path, pages: int, flags: int = SHARED) -> mmap.mmap:
    """A new file of so many pages, called ``mapped``, mapped."""
    path = folder / "mapped"
    path.write_bytes(bytes(pages * PAGE_SIZE))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), pages * PAGE_SIZE, flags=flags)


@contextmanager
def huge_pages(count: int, flags: int = PRIVATE) -> Iterator[mmap.mmap]:
    """Pages of hugetlbfs. The host is asked for them meanwhile if it has none to spare; else the test is skipped.

    They go back to the host at the end, and who holds the mapping still has ordinary memory there: an error that was
    caught keeps all that its test had, and what is in use would be lacking in the next.
    """
    with ExitStack() as stack:
        memory = _map_huge_pages(count, flags)
        if memory is None:
            may_ask = os.access(_NR_HUGEPAGES, os.W_OK)
            require("hugetlb", may_ask, "no huge pages are free, and this user cannot set vm.nr_hugepages")
            before = _NR_HUGEPAGES.read_text()
            stack.callback(_NR_HUGEPAGES.write_text, before)
            _NR_HUGEPAGES.write_text(str(int(before) + count))
            memory = _map_huge_pages(count, flags)
            require("hugetlb", memory is not None, "the kernel finds no memory for huge pages, or others took them")
            assert memory is not None
        stack.callback(_map_ordinary, address_of(memory), len(memory))
        yield memory


def _map_huge_pages(count: int, flags: int) -> mmap.mmap | None:
    """None if the host does not have them to spare."""
    try:
        return mmap.mmap(-1, count * HUGE_PAGE_SIZE, flags=flags | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
    except OSError:
        return None


def _map_ordinary(address: int, size: int) -> None:
    """Map memory in the place of other memory, in one step."""
    flags = PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    assert _libc.mmap(address, size, _READ_WRITE, flags, -1, 0) == address


def _array_at(address: int, size: int) -> Bytes:
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B"), np.uint8)


class Unowned:
    """Pages that no Python object owns, so that they can be unmapped under a watch."""

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE_SIZE
        # One more page follows, so that what is moved to a larger place cannot grow where it is.
        self.address = _libc.mmap(None, self.size + PAGE_SIZE, _READ_WRITE, PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.array = _array_at(self.address, self.size)

    def unmap(self, first: int = 0, count: int | None = None) -> None:
        size = self.size if count is None else count * PAGE_SIZE
        assert _libc.munmap(self.address + first * PAGE_SIZE, size) == 0

    def move(self) -> Bytes:
        """To a larger place; returns what is there then."""
        moved = _libc.mremap(self.address, self.size, self.size + PAGE_SIZE, _MREMAP_MAYMOVE)
        assert moved not in (self.address, ctypes.c_void_p(-1).value)
        return _array_at(moved, self.size)

    def replace(self, first: int = 0, count: int | None = None) -> None:
        """Map other memory in its place, in one step."""
        _map_ordinary(self.address + first * PAGE_SIZE, self.size if count is None else count * PAGE_SIZE)


def require_write_watch() -> None:
    """Skip where the kernel does not note writes."""
    memory = anonymous(1)
    try:
        WriteWatch(address_of(memory), PAGE_SIZE).close()
    except HostError as error:
        require("write-watch", False, str(error))


def require_soft_dirty() -> None:
    """Skip where the kernel keeps no soft-dirty bits."""
    require("soft-dirty", has_soft_dirty(), "this kernel keeps no soft-dirty bits")


def become_nobody(*, dumpable: bool) -> None:
    """Give up root for ever: in a child only. A process that changed its user cannot look at itself until it can be
    dumped again, as one that was started by that user can."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    assert _libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0) == 0


@contextmanager
def nothing_left() -> Iterator[None]:
    """The block leaves no descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before

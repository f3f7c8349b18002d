"""Anonymous shared memory: a sealed memfd, mapped once."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ClosedError, HostError, UsageError
from dirtylog.linux import files
from dirtylog.linux.ioctl import kernel_error
from dirtylog.units import HUGE_PAGE_SIZE, PAGE_SIZE, align_down, align_up, format_size

_MADV_POPULATE_READ = 22  # both since Linux 5.14, include/uapi/asm-generic/mman-common.h
_MADV_POPULATE_WRITE = 23
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 2
_F_SEAL_GROW = 4

_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10
_MS_ASYNC = 1
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.msync.restype = ctypes.c_int


def _map_aligned(fd: int, size: int) -> memoryview:
    """Map a file at an address that is a multiple of `HUGE_PAGE_SIZE`.

    Python's mmap takes no address. It reserves room that is surely large enough; the file is mapped over the aligned
    part, and goes with the reservation, which the memoryview keeps.
    """
    room = mmap.mmap(-1, size + HUGE_PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    start = np.frombuffer(room, np.uint8).ctypes.data
    skip = -start % HUGE_PAGE_SIZE
    _map_at(start + skip, size, fd)
    return memoryview(room)[skip : skip + size]


def _map_at(address: int, size: int, fd: int) -> None:
    """Map a file in place of whatever is there."""
    mapped = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if mapped != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sealed_memfd(name: str, size: int) -> int:
    """A memfd that nobody can make shorter or longer."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise kernel_error("memfd_create", error) from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except (OSError, OverflowError, ValueError) as error:
        os.close(fd)
        raise _cannot_map(size, error) from error
    return fd


def _cannot_map(size: int, error: Exception) -> HostError:
    return HostError(
        f"the host cannot map {format_size(size)} of memory ({error})",
        remedy="ask for less, or raise the limits shown by 'ulimit -v' and /proc/sys/vm/overcommit_memory",
    )


def _check(call: str, result: int) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise kernel_error(call, OSError(code, os.strerror(code)))


def is_mapped(address: int, size: int) -> bool:
    """Whether every page of a range of this process is mapped to something.

    msync(2) with MS_ASYNC does nothing on Linux since 2.6.19, but to look for gaps.
    """
    return bool(_libc.msync(address, size, _MS_ASYNC) == 0)


def is_readable(address: int, size: int) -> bool:
    """Whether reading a range of this process, all of one mapping, is safe: it is mapped, and so is what is behind it.

    A file that was cut short is short at its end, so the last page is asked for: reading it would raise SIGBUS. Where
    nobody knows the question (EINVAL: an older kernel, memory of a device) the answer is yes.
    """
    start, end = align_down(address, PAGE_SIZE), align_up(address + size, PAGE_SIZE)
    if not is_mapped(start, end - start):
        return False
    answer = _libc.madvise(end - PAGE_SIZE, PAGE_SIZE, _MADV_POPULATE_READ)
    return answer == 0 or ctypes.get_errno() == errno.EINVAL


@dataclass(frozen=True, slots=True)
class FilePart:
    """A part of a file that is mapped, too.

    Attributes:
        memory: it, as mapped.
        fd: the file; -1 or another once the mapping was closed.
        offset: where in the file.
    """

    memory: memoryview
    fd: int
    offset: int


Contents = memoryview | FilePart
"""Bytes to send."""


def memory_of(contents: Contents) -> memoryview:
    """They, as memory."""
    return contents.memory if isinstance(contents, FilePart) else contents


class _Mapped:
    """What all memory here is: bytes at an address, until they are let go."""

    size: int
    address: int
    _memory: memoryview | None

    @property
    def memory(self) -> memoryview:
        """The memory as bytes."""
        if self._memory is None:
            raise ClosedError("this memory was closed")
        return self._memory

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The memory as uint8, shape (size,)."""
        return np.frombuffer(self.memory, np.uint8)

    def populate(self, start: int, size: int) -> None:
        """Allocate and map [start, start + size) now, so that later writes take no page fault."""
        _check("madvise MADV_POPULATE_WRITE", _libc.madvise(self.address + start, size, _MADV_POPULATE_WRITE))


class MemfdMapping(_Mapped):
    """A memfd of fixed size and its one shared mapping, both owned here.

    The file is sealed against growing and shrinking, so that nobody who is handed the descriptor can turn a later
    access into a SIGBUS. ``close`` gives up the descriptor and the reference to the mapping; the pages go when the
    last array or memoryview over them does, so an address in use never dangles.

    The mapping starts on a huge page's boundary, which the kernel asks for before it puts huge pages there.

    Attributes:
        fd: the memfd.
        size: bytes, a whole number of pages.
        array: the memory as uint8, shape (size,).
        memory: the same as a memoryview, for those who hand pieces of it to sockets and files.
        address: where it is mapped in this process.
    """

    def __init__(self, name: str, size: int) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise UsageError(
                f"memory of {size} bytes is not a positive whole number of {PAGE_SIZE}-byte pages",
                remedy="give a multiple of 4K, such as 512M",
            )
        self.size = size
        self._has_huge_pages = True
        self.fd = _sealed_memfd(name, size)
        try:
            self._memory = _map_aligned(self.fd, size)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise _cannot_map(size, error) from error
        self.address = int(self.array.ctypes.data)

    def close(self) -> None:
        """Give up the descriptor and the mapping; idempotent."""
        self._memory = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that hold data, as (start, end); the rest are holes, which read as zeros.

        Reading a hole through the mapping would allocate it, so those who look for data ask here first. Where data end
        takes as long to find as they are long, past ``end`` too: some 6 ms a GiB.
        """
        return files.extents(self.fd, start, end)

    def next_data(self, start: int, end: int) -> int:
        """Where the first data in [start, end) begin; ``end`` if it is a hole. Takes no time where there are data."""
        return files.next_data(self.fd, start, end)

    def adopt(self, fd: int) -> int:
        """Take over another memfd in place of the own, at the same address; its descriptor is owned here from now on.

        Arrays and memoryviews of the memory show the other's contents from then on, and so do guests that have it
        mapped.

        Returns:
            The memfd that was here, which is the caller's; -1 if there was none. What it holds takes memory until it is
            closed, and that takes time.

        Raises:
            UsageError: it is no memfd of the same size, or somebody could make it shorter, or it cannot be written. It
                stays the caller's.
            HostError: the host cannot map it. It stays the caller's.
            ClosedError: this was closed. It stays the caller's.
        """
        if self._memory is None:
            raise ClosedError("this memory was closed")
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError as error:
            raise UsageError(f"the file to be mapped is no memfd: {error.strerror}") from error
        if size != self.size or not seals & _F_SEAL_SHRINK:
            raise UsageError(f"the memfd of {size} bytes cannot stand in for {self.size} that cannot shrink")
        try:
            _map_at(self.address, self.size, fd)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):  # opened for reading only, or sealed against writes
                raise UsageError("the memfd cannot be written") from error
            raise _cannot_map(self.size, error) from error
        self.fd, own = fd, self.fd
        return own

    def renew(self) -> None:
        """Have empty memory in place of what is here. Others who have that mapped keep it to themselves.

        Works with no descriptor left, too.

        Raises:
            HostError: the host cannot map it. What is here stays, but is no file's any more.
            ClosedError: this was closed.
        """
        if self._memory is None:
            raise ClosedError("this memory was closed")
        own, self.fd = self.fd, -1
        if own >= 0:
            os.close(own)
        fd = _sealed_memfd("dirtylog-renewed", self.size)
        try:
            self.adopt(fd)
        except HostError:
            os.close(fd)
            raise

    def part(self, start: int, end: int) -> Contents:
        """[start, end), as memory and as a part of the memfd, for whoever can send the one or the other."""
        return FilePart(self.memory[start:end], self.fd, start)

    def make_huge(self, start: int) -> bool:
        """Back the hole of `HUGE_PAGE_SIZE` bytes at ``start`` with a huge page, if the kernel has one.

        For memory that is about to be filled: one fault and one clearing instead of 512, an order of magnitude faster.
        The policy for shared memory (shmem_enabled) does not matter to MADV_COLLAPSE, but it does not look at a range
        of which nothing is present: so one page is populated first. Contents stay, whoever writes them meanwhile.

        Returns:
            Whether there is a huge page now. If not, nothing is lost.
        """
        if not self._has_huge_pages or start + HUGE_PAGE_SIZE > self.size:
            return False
        for size, advice in ((PAGE_SIZE, _MADV_POPULATE_WRITE), (HUGE_PAGE_SIZE, _MADV_COLLAPSE)):
            if _libc.madvise(self.address + start, size, advice) == -1:
                # EAGAIN and ENOMEM pass: no huge page is free now. Anything else will not get better: an old kernel, or
                # one built without huge pages for shared memory.
                self._has_huge_pages = ctypes.get_errno() in (errno.EAGAIN, errno.ENOMEM)
                return False
        return True

    def punch(self, start: int, size: int) -> None:
        """Turn [start, start + size) into a hole: it reads as zeros and takes no memory."""
        files.punch_hole(self.fd, start, size)  # memfds always can


class BufferMapping(_Mapped):
    """A caller's memory, with what `MemfdMapping` offers. Its owner keeps it; this only holds on to it.

    Attributes:
        size: bytes, a whole number of pages.
        array: the memory as uint8, shape (size,).
        memory: the same as a memoryview.
        address: where it is in this process, on a page boundary.
    """

    def __init__(self, buffer: memoryview) -> None:
        if buffer.readonly or not buffer.c_contiguous:
            raise UsageError("the buffer is read-only or not contiguous", remedy="give writable, contiguous memory")
        self._memory = buffer.cast("B") if buffer.nbytes else buffer
        self.size = buffer.nbytes
        self.address = int(self.array.ctypes.data)
        if not self.size or self.size % PAGE_SIZE or self.address % PAGE_SIZE:
            raise UsageError(
                f"a buffer of {self.size} bytes at {self.address:#x} is not whole {PAGE_SIZE}-byte pages",
                remedy="allocate it with mmap, which aligns to pages",
            )

    def close(self) -> None:
        """Let go of the buffer; idempotent."""
        self._memory = None

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """All of it counts as data: nobody knows."""
        if start < end:
            yield start, end

    def next_data(self, start: int, end: int) -> int:
        """Right there, for the same reason."""
        return min(start, end)

    def part(self, start: int, end: int) -> Contents:
        """[start, end)."""
        return self.memory[start:end]

    def punch(self, start: int, size: int) -> None:
        """Zero [start, start + size)."""
        self.array[start : start + size] = 0

    def make_huge(self, start: int) -> bool:
        """Leave the caller's memory as it is."""
        del start
        return False

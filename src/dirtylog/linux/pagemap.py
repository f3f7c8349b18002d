"""What the kernel tells of each page of this process: ``/proc/self/pagemap``, from ``include/uapi/linux/fs.h``.

Two interfaces share the file. Reading it gives 64 bits a page (Documentation/admin-guide/mm/pagemap.rst), among them
the soft-dirty bit. PAGEMAP_SCAN (Linux 6.7) finds the ranges whose pages are in given categories, and can protect them
again in the same step, so that no write between the two goes unseen.
"""

import ctypes
import errno
import os
from contextlib import closing
from enum import IntFlag
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ClosedError, HostError, KernelError, LostMappingError, UsageError
from dirtylog.linux.ioctl import ioctl, iowr, kernel_error
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.process import MadeBy
from dirtylog.units import PAGE_SIZE

PAGEMAP: Final = "/proc/self/pagemap"
CLEAR_REFS: Final = "/proc/self/clear_refs"

ENTRY_SOFT_DIRTY: Final = 1 << 55
"""In an entry: the page was written since the soft-dirty bits were last cleared, or is new since then."""

REGION: Final = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])
"""struct page_region: a range of addresses whose pages have the same categories."""

_REMEDIES: Final = {
    errno.ENOENT: "use a kernel with CONFIG_PROC_PAGE_MONITOR, and mount /proc",
    # A process that changed its user belongs to root in /proc until it can be dumped again (proc(5)).
    errno.EACCES: "if this process changed its user, start it as that user, or have it call prctl(PR_SET_DUMPABLE, 1)",
    errno.EMFILE: "raise the limit shown by 'ulimit -n'",
}
_REGIONS_PER_CALL: Final = 1 << 17
"""As many as a GiB can have. Room that is not needed takes no memory."""
_ENTRIES_PER_READ: Final = 1 << 16


class Category(IntFlag):
    """What a page can be: PAGE_IS_*."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


class ScanFlag(IntFlag):
    """Options of a scan: PM_SCAN_*."""

    WP_MATCHING = 1
    CHECK_WPASYNC = 2


class ScanArgument(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


PAGEMAP_SCAN: Final = iowr("PAGEMAP_SCAN", "f", 16, ScanArgument)
_SCAN_FLAGS: Final = {
    (False, False): 0,
    (False, True): int(ScanFlag.CHECK_WPASYNC),
    (True, False): int(ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC),
    (True, True): int(ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC),
}
"""By the arguments ``protect`` and ``watched`` of a scan; computing them costs as much as a short scan."""


class _Room:
    """Where a scan puts what it finds. That a numpy array tells its address takes as long as a short scan."""

    def __init__(self) -> None:
        self.regions = np.empty(_REGIONS_PER_CALL, REGION)
        self.address = self.regions.ctypes.data


class Pagemap:
    """An open pagemap of this process.

    Attributes:
        fd: the descriptor, owned here.

    Raises:
        HostError: it cannot be opened.
    """

    def __init__(self, path: str = PAGEMAP) -> None:
        self._made_by = MadeBy()
        self._room, self._other = _Room(), _Room()
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0)
            raise HostError(f"{path} cannot be opened: {error.strerror}", remedy=remedy) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def entries(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """The 64 bits of each of ``pages`` pages from ``address`` on; unprivileged readers see no frame numbers."""
        try:
            content = os.pread(self._open_fd(), 8 * pages, address // PAGE_SIZE * 8)
        except OSError as error:
            raise kernel_error("pread of pagemap", error) from error
        if len(content) != 8 * pages:
            raise UsageError(f"{pages} pages from {address:#x} on are not all user addresses")
        return np.frombuffer(content, np.uint64)

    def scan(
        self, start: int, end: int, wanted: Category, *, protect: bool = False, watched: bool = False
    ) -> npt.NDArray[np.void]:
        """The ranges in [start, end) whose pages are in every ``wanted`` category, as a sorted array of `REGION`.

        It may be overwritten by the next scan but one. Not to be called by two threads at once.

        Args:
            start: a page's address.
            end: a page's address.
            wanted: the categories asked for; those that a page has among them are in its region's ``categories``.
            protect: also write-protect the pages found, in the same step.
            watched: expect the range to be registered with a userfaultfd that has WP_ASYNC, as ``protect`` does.

        Raises:
            HostError: the kernel has no PAGEMAP_SCAN.
            LostMappingError: some mapping in the range is not registered.
        """
        found: list[npt.NDArray[np.void]] = []
        flags, category = _SCAN_FLAGS[protect, watched], int(wanted)
        self._room, self._other = self._other, self._room
        regions = self._room.regions
        while start < end:
            argument = ScanArgument(
                size=ctypes.sizeof(ScanArgument),
                flags=flags,
                start=start,
                end=end,
                vec=self._room.address,
                vec_len=_REGIONS_PER_CALL,
                category_mask=category,
                return_mask=category,
            )
            count = self._scan(argument)
            if not found and count < _REGIONS_PER_CALL:
                return regions[:count]
            found.append(regions[:count].copy())
            # The kernel says where it stopped for want of room last, also if it went on from there to the end: asking
            # anew from that place would find the rest a second time.
            start = end if count < _REGIONS_PER_CALL else max(argument.walk_end, int(found[-1]["end"][-1]))
        return np.concatenate(found) if found else np.empty(0, REGION)

    def _scan(self, argument: ScanArgument) -> int:
        try:
            return ioctl(self._open_fd(), PAGEMAP_SCAN, argument)
        except KernelError as error:
            if error.errno == errno.ENOTTY:
                raise HostError("this kernel has no PAGEMAP_SCAN", remedy="use Linux 6.7 or newer") from error
            if error.errno == errno.EPERM:
                raise LostMappingError(
                    f"some of the memory at {argument.start:#x} to {argument.end:#x} is not watched",
                    remedy="what replaces watched memory needs a watch of its own",
                ) from error
            raise

    def soft_dirty(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """Which of ``pages`` pages have the soft-dirty bit: a bit a page, in little-endian 64-bit words."""
        words = np.zeros((pages + 63) // 64, np.uint64)
        for first in range(0, pages, _ENTRIES_PER_READ):
            count = min(_ENTRIES_PER_READ, pages - first)
            entries = self.entries(address + first * PAGE_SIZE, count)
            bits = np.packbits((entries & np.uint64(ENTRY_SOFT_DIRTY)).astype(np.bool_), bitorder="little")
            words.view(np.uint8)[first // 8 :][: bits.size] = bits
        return words

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise ClosedError("this pagemap was closed")
        self._made_by.check("a pagemap")
        return self.fd


def clear_soft_dirty() -> None:
    """Clear the soft-dirty bits of the whole process, so that the next write to each page sets its bit.

    Writes of other threads that come between a reading of the bits and this are forgotten: hold them meanwhile.
    (Documentation/admin-guide/mm/soft-dirty.rst.)
    """
    try:
        with open(CLEAR_REFS, "wb", buffering=0) as file:
            file.write(b"4")
    except OSError as error:
        raise kernel_error(f"write to {CLEAR_REFS}", error) from error


def has_soft_dirty() -> bool:
    """Whether the kernel keeps soft-dirty bits.

    A page that is new since the last clearing counts as written, so one that this process just made has the bit if and
    only if the kernel keeps it. Clearing would tell no more, and would forget what others in this process wait for:
    ``clear_refs`` knows no ranges.
    """
    with closing(MemfdMapping("dirtylog-probe", PAGE_SIZE)) as page, Pagemap() as pagemap:
        page.array[0] = 1
        entry = int(pagemap.entries(page.address, 1)[0])
    return bool(entry & ENTRY_SOFT_DIRTY) and os.access(CLEAR_REFS, os.W_OK)

"""Writes noted by the kernel: asynchronous write protection of userfaultfd, read back by PAGEMAP_SCAN (Linux 6.7).

A page that is protected and then written becomes writable again by itself, in the fault, and nobody is told; a scan
finds it as written, and can protect it anew in the same step.

What counts as written, measured on Linux 6.18 and held by tests:

- The log is of page tables, not of pages: it has what this process writes, through this mapping, by any of its threads
  and by the kernel on its behalf (read(2) into the memory). Writes by other processes that share the memory, through
  another mapping of it, or with write(2) to the file behind it, are not noted. Nor is what the kernel writes into pages
  that it was given before they were protected: buffers registered with io_uring, say.
- Mapped files, shared and private, are watched as anonymous memory is. Memory of devices (VM_PFNMAP) cannot be.
- Memory that was never touched is watched as any other; it takes no memory for that.
- MADV_DONTNEED of private memory makes its pages zeros, and counts as written. Of shared memory it changes no contents,
  and does not count. MADV_FREE does not count, though its pages may read as zeros some time; nor does a hole punched
  into the file behind shared memory (MADV_REMOVE, fallocate), though it reads as zeros from then on.
- A child of fork does not inherit the watch: its own copy of private memory is not watched, and what it writes to
  shared memory is not noted. The parent's goes on.
- Memory that is unmapped, moved by mremap or replaced is lost, and said to be, unless the place is watched anew.
- Huge pages: transparent ones are split as they are written. A page of hugetlbfs counts whole: protecting it protects
  all of it, and the next write anywhere in it is a write to all of it. One that was never touched counts as written
  when it is first read; MADV_DONTNEED does not count, though it makes private ones zeros.
"""

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import LostMappingError, UntrackableError
from dirtylog.linux.mapping import is_mapped
from dirtylog.linux.pagemap import Category, Pagemap
from dirtylog.linux.process import MadeBy
from dirtylog.linux.userfaultfd import USERFAULTFD_DEVICE, Feature, RegisterMode, Userfaultfd
from dirtylog.units import KIB, PAGE_SIZE, align_down, align_up

FEATURES: Final = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
_SMAPS: Final = Path("/proc/self/smaps")

Regions = npt.NDArray[np.void]


class WriteWatch:
    """Whole pages of this process's memory, whose writes are noted from here on.

    All pages count as written at first, but for those of hugetlbfs that were never touched here.

    Args:
        address: where, on a page boundary; on a huge page's in hugetlbfs.
        size: bytes, whole pages.
        device: where userfaultfd's is.

    Raises:
        HostError: this kernel, or this user's permissions, have no asynchronous write protection.
        UntrackableError: the memory is not of a kind that can be watched, or a part of a huge page of hugetlbfs.
        AlreadyWatchedError: somebody watches some of it.
    """

    def __init__(self, address: int, size: int, *, device: str = USERFAULTFD_DEVICE) -> None:
        self.address = address
        self.size = size
        self._made_by = MadeBy()
        self._pagemap = Pagemap()
        try:
            self._userfaultfd = Userfaultfd(FEATURES, device=device)
            try:
                self._userfaultfd.register(address, size, RegisterMode.WP)
                self._granule = PAGE_SIZE if self._takes_small_pages() else _page_size_at(address)
                self._check_told()
            except BaseException:
                self._userfaultfd.close()
                raise
        except BaseException:
            self._pagemap.close()
            raise

    def _takes_small_pages(self) -> bool:
        """Whether the memory is not hugetlbfs', which refuses what is not aligned to its pages. Registers nothing new.

        Asking /proc/self/smaps would walk every page of the process.
        """
        if self.size <= PAGE_SIZE:
            return True
        try:
            self._userfaultfd.register(self.address + PAGE_SIZE, PAGE_SIZE, RegisterMode.WP)
        except UntrackableError:
            return False
        return True

    def _check_told(self) -> None:
        """Scans leave out memory of devices, which some kernels register all the same."""
        if self._granule == PAGE_SIZE and not self.written(0, PAGE_SIZE).size:
            raise UntrackableError(
                f"the kernel does not tell what is written at {self.address:#x}", remedy="watch it by comparison"
            )

    def close(self) -> None:
        """Watch no more; idempotent. In a child of the process that made it, this only gives the descriptors up."""
        if self._made_by.is_this and self._userfaultfd.fd >= 0:
            self._userfaultfd.unregister(self.address, self.size)
        self._userfaultfd.close()
        self._pagemap.close()

    def written(self, offset: int, size: int, *, protect: bool = False) -> Regions:
        """Which pages of a part were written since they were last protected, as `pagemap.REGION` of addresses.

        Args:
            offset: of the part, whole pages.
            size: of the part, whole pages.
            protect: also have the next write to each of those pages noted anew, in the same step. The part is widened
                to whole huge pages of hugetlbfs.

        Raises:
            LostMappingError: some of the memory is not there any more, or was replaced.
            ForkedError: this is a child of the process that made it.
        """
        start = self.address + align_down(offset, self._granule)
        end = self.address + align_up(offset + size, self._granule)
        found = self._pagemap.scan(start, end, Category.WRITTEN, protect=protect, watched=True)
        if not is_mapped(start, end - start):
            raise LostMappingError(
                f"some of the memory at {start:#x} to {end:#x} was unmapped or moved while it was watched",
                remedy="close the watch first, and watch the memory anew where it is then",
            )
        return found


def _page_size_at(address: int) -> int:
    """The page size of the mapping at an address."""
    inside = False
    with _SMAPS.open() as file:
        for line in file:
            name, _, rest = line.partition(" ")
            if "-" in name:
                start, end = (int(number, 16) for number in name.split("-"))
                inside = start <= address < end
            elif inside and name == "KernelPageSize:":
                return int(rest.split()[0]) * KIB
    raise LostMappingError(f"nothing is mapped at {address:#x}")

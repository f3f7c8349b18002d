"""Pages that differ from what they were: works on any memory, whoever writes it, and costs a look at all of it.

A page that was written without being changed, or changed back, is not reported: whoever has read it before knows what
it holds. Memory that changes while it is compared counts as it was found, and the rest is found the next time.

Unlike the kernel's logs, comparing reads the memory. Where that would end the process (it was unmapped, or the file
behind it was cut short) it is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

from dirtylog.errors import HostError, LostMappingError, UsageError
from dirtylog.linux.mapping import is_readable
from dirtylog.memory import Numbers, PageBitmap, Words
from dirtylog.units import PAGE_SIZE, WORD_BITS, format_size, page_span

Bytes = npt.NDArray[np.uint8]

_PAGES_AT_ONCE = 512
"""What is computed of so many pages on the way stays in a CPU's cache."""


class ComparisonTracker(ABC):
    """Compares each page with what is kept of it from the last clear.

    Args:
        memory: the bytes, shape (size,); the last page may be a part of one.
    """

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self._pages = page_span(0, memory.size)[1]
        self._armed = False

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self._pages

    def arm(self) -> None:
        """Keep something of every page.

        Raises:
            HostError: there is not enough memory for that.
            LostMappingError: the memory cannot be read.
        """
        self._check_readable()
        self._keep_all()
        self._armed = True

    def collect(self, words: Words) -> None:
        """Compare every page.

        Raises:
            LostMappingError: the memory cannot be read any more.
        """
        self._check_armed()
        self._check_readable()
        found = np.zeros(words.size * WORD_BITS, np.bool_)
        for first in range(0, self._pages, _PAGES_AT_ONCE):
            end = min(first + _PAGES_AT_ONCE, self._pages)
            found[first:end] = self._changed(first, end)
        words[:] = np.packbits(found, bitorder="little").view(np.uint64)

    def clear(self, first: int, count: int, words: Words) -> None:
        """Keep something of the named pages as they are now."""
        self._check_armed()
        self._check_readable()
        self._keep(PageBitmap(count, words.copy()).indices() + first)

    def disarm(self) -> None:
        """Keep nothing."""
        self._armed = False
        self._forget()

    def _check_armed(self) -> None:
        if not self._armed:
            raise UsageError("the tracker is not armed")

    def _check_readable(self) -> None:
        address = self._memory.ctypes.data
        if not is_readable(address, self._memory.size):
            raise LostMappingError(
                f"some of the memory at {address:#x} to {address + self._memory.size:#x} was unmapped while it was "
                "watched, or the file behind it was cut short",
                remedy="close the watch first, and watch the memory anew where it is then",
            )

    @abstractmethod
    def _keep_all(self) -> None: ...

    @abstractmethod
    def _keep(self, pages: Numbers) -> None: ...

    @abstractmethod
    def _changed(self, first: int, end: int) -> npt.NDArray[np.bool_]: ...

    @abstractmethod
    def _forget(self) -> None: ...


class CopyTracker(ComparisonTracker):
    """Keeps a copy: as much memory again, compared at the speed of memory."""

    def __init__(self, memory: Bytes) -> None:
        super().__init__(memory)
        self._whole = memory.size // PAGE_SIZE
        self._forget()

    def _keep_all(self) -> None:
        try:
            self._copy = self._memory.copy()
        except MemoryError as error:
            raise HostError(
                f"there is no memory for a copy of {format_size(self._memory.size)}",
                remedy="compare hashes, which take 1/256 of that",
            ) from error

    def _keep(self, pages: Numbers) -> None:
        whole = pages[pages < self._whole]
        copy, memory = (_rows(one, self._whole) for one in (self._copy, self._memory))
        for first in range(0, whole.size, _PAGES_AT_ONCE):
            some = whole[first : first + _PAGES_AT_ONCE]
            copy[some] = memory[some]
        if whole.size < pages.size:
            part = slice(self._whole * PAGE_SIZE, None)
            self._copy[part] = self._memory[part]

    def _changed(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        pages = slice(first, min(end, self._whole))
        now, then = (_rows(memory, self._whole)[pages].view(np.uint64) for memory in (self._memory, self._copy))
        changed: npt.NDArray[np.bool_] = (now != then).any(axis=1)
        if end > self._whole:
            part = slice(self._whole * PAGE_SIZE, None)
            changed = np.append(changed, not np.array_equal(self._memory[part], self._copy[part]))
        return changed

    def _forget(self) -> None:
        self._copy = np.empty(0, np.uint8)


class HashTracker(ComparisonTracker):
    """Keeps a 128-bit hash (XXH3) of each page: 1/256 of the memory, and slower than a copy."""

    def __init__(self, memory: Bytes) -> None:
        super().__init__(memory)
        self._forget()

    def _keep_all(self) -> None:
        self._hashes = self._hash(range(self._pages))

    def _keep(self, pages: Numbers) -> None:
        self._hashes[pages] = self._hash(pages.tolist())

    def _changed(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        changed: npt.NDArray[np.bool_] = self._hashes[first:end] != self._hash(range(first, end))
        return changed

    def _hash(self, pages: Iterable[int]) -> npt.NDArray[np.void]:
        memory = self._memory.data
        digest = xxhash.xxh3_128_digest
        digests = b"".join(digest(memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in pages)
        return np.frombuffer(bytearray(digests), "V16")

    def _forget(self) -> None:
        self._hashes = np.empty(0, "V16")


def _rows(memory: Bytes, pages: int) -> Bytes:
    """The first ``pages`` pages, a row each."""
    return memory[: pages * PAGE_SIZE].reshape(pages, PAGE_SIZE)

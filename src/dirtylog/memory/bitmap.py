"""Bitmaps with one bit a page, in KVM's own layout."""

from typing import Self

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.units import WORD_BITS, word_count

Words = npt.NDArray[np.uint64]
"""Little-endian 64-bit words; bit i of word w stands for page 64 * w + i."""

_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class PageBitmap:
    """One bit for each of ``pages`` pages; no bit is ever set past the end.

    Ranges are given as first page and count, and default to everything. Not locked: one thread at a time, or the
    owner's lock.

    Attributes:
        pages: how many pages.
        words: the bits, for those who hand them to the kernel or merge them.
    """

    def __init__(self, pages: int, words: Words | None = None) -> None:
        if pages < 0:
            raise UsageError(f"a bitmap of {pages} pages")
        self.pages = pages
        if words is None:
            words = np.zeros(word_count(pages), np.uint64)
        elif words.dtype != np.uint64 or words.shape != (word_count(pages),):
            raise UsageError(f"{words.shape} words of {words.dtype} are not a bitmap of {pages} pages")
        self.words = words
        mask_tail(words, pages)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageBitmap):
            return NotImplemented
        return self.pages == other.pages and bool(np.array_equal(self.words, other.words))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def copy(self) -> Self:
        """A bitmap of its own with the same bits."""
        return type(self)(self.pages, self.words.copy())

    def set(self, first: int = 0, count: int | None = None) -> None:
        """Set the bits of a range."""
        span, head, tail = self._span(first, count)
        if span.size == 1:
            span |= head & tail
        elif span.size:
            span[0] |= head
            span[1:-1] = _ONES
            span[-1] |= tail

    def clear(self, first: int = 0, count: int | None = None) -> None:
        """Clear the bits of a range."""
        span, head, tail = self._span(first, count)
        if span.size == 1:
            span &= ~(head & tail)
        elif span.size:
            span[0] &= ~head
            span[1:-1] = 0
            span[-1] &= ~tail

    def test(self, page: int) -> bool:
        """Whether one page's bit is set."""
        return self.any(page, 1)

    def any(self, first: int = 0, count: int | None = None) -> bool:
        """Whether any bit of a range is set."""
        return bool(self._masked(first, count).any())

    def count(self, first: int = 0, count: int | None = None) -> int:
        """How many bits of a range are set."""
        return int(np.bitwise_count(self._masked(first, count)).sum(dtype=np.int64))

    def runs(self, first: int = 0, count: int | None = None) -> npt.NDArray[np.int64]:
        """The maximal runs of set bits in a range, ascending: shape (n, 2), columns first page and length."""
        words = self._masked(first, count)
        carry = np.zeros_like(words)
        carry[1:] = words[:-1] >> np.uint64(63)
        starts = _positions(words & ~(words << np.uint64(1) | carry))
        carry[:-1] = words[1:] << np.uint64(63)
        carry[-1:] = 0
        last = _positions(words & ~(words >> np.uint64(1) | carry))
        base = first // WORD_BITS * WORD_BITS
        return np.stack((starts + base, last - starts + 1), axis=1)

    def indices(self, first: int = 0, count: int | None = None) -> npt.NDArray[np.int64]:
        """The pages of a range whose bits are set, ascending."""
        return _positions(self._masked(first, count)) + first // WORD_BITS * WORD_BITS

    def extract(self, first: int = 0, count: int | None = None) -> Words:
        """The bits of a range as new words whose bit 0 is page ``first``; zeros past the range."""
        count = self._count(first, count)
        words = self._masked(first, count)
        shift = np.uint64(first % WORD_BITS)
        if shift:
            shifted = words >> shift
            shifted[:-1] |= words[1:] << (np.uint64(WORD_BITS) - shift)
            words = shifted
        return words[: word_count(count)]

    def fetch_and_clear(self, first: int = 0, count: int | None = None) -> Words:
        """What `extract` gives, and clear those bits."""
        words = self.extract(first, count)
        self.clear(first, count)
        return words

    def merge(self, words: Words, first: int = 0, count: int | None = None) -> int:
        """Set the bits of a range that are 1 in ``words``, whose bit 0 is page ``first``.

        Bits past the range are ignored.

        Returns:
            How many were not set before.
        """
        count = self._count(first, count)
        if words.shape != (word_count(count),):
            raise UsageError(f"{words.size} words do not cover {count} pages")
        if count % WORD_BITS:
            words = words.copy()
            mask_tail(words, count)
        shift = np.uint64(first % WORD_BITS)
        if shift:
            shifted = np.zeros(len(words) + 1, np.uint64)
            shifted[:-1] = words << shift
            shifted[1:] |= words >> (np.uint64(WORD_BITS) - shift)
            words = shifted
        start = first // WORD_BITS
        mine = self.words[start : start + len(words)]
        words = words[: len(mine)]
        fresh = int(np.bitwise_count(words & ~mine).sum(dtype=np.int64))
        mine |= words
        return fresh

    def _count(self, first: int, count: int | None) -> int:
        if count is None:
            count = self.pages - first
        if first < 0 or count < 0 or first + count > self.pages:
            raise UsageError(f"pages [{first}, {first + count}) are not in a bitmap of {self.pages}")
        return count

    def _span(self, first: int, count: int | None) -> tuple[Words, np.uint64, np.uint64]:
        """The words of a range, with masks of its bits in the first and in the last of them."""
        count = self._count(first, count)
        if count == 0:
            return self.words[:0], _ONES, _ONES
        end = first + count
        span = self.words[first // WORD_BITS : word_count(end)]
        head = _ONES << np.uint64(first % WORD_BITS)
        tail = _ONES >> np.uint64(-end % WORD_BITS)
        return span, head, tail

    def _masked(self, first: int, count: int | None) -> Words:
        span, head, tail = self._span(first, count)
        words = span.copy()
        if words.size:
            words[0] &= head
            words[-1] &= tail
        return words


def mask_tail(words: Words, pages: int) -> None:
    """Zero the bits at and past ``pages`` in the last word of words that cover them."""
    if pages % WORD_BITS:
        words[pages // WORD_BITS] &= _ONES >> np.uint64(-pages % WORD_BITS)


def _positions(words: Words) -> npt.NDArray[np.int64]:
    """The numbers of the set bits, ascending; only words that are not zero cost anything beyond one look."""
    occupied = np.flatnonzero(words)
    bits = np.flatnonzero(np.unpackbits(words[occupied].astype("<u8").view(np.uint8), bitorder="little"))
    return occupied[bits // WORD_BITS] * WORD_BITS + bits % WORD_BITS

"""Bitmaps with one bit a page, in KVM's own layout."""

from collections.abc import Callable, Iterator
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.units import WORD_BITS, word_count

Words = npt.NDArray[np.uint64]
"""Little-endian 64-bit words; bit i of word w stands for page 64 * w + i."""

Numbers = npt.NDArray[np.int64]
"""Numbers of pages, or how many."""

_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ONE = np.uint64(1)
_LAST_BIT = np.uint64(WORD_BITS - 1)

_BLOCK: Final = 1 << 15
"""How many words are looked at together: what is computed of them on the way stays in a CPU's cache."""
_SPREAD: Final = 1 << 17
"""How many bits are spread to bytes together: few enough for a CPU's cache."""
_FEW: Final = 4
"""Up to so many bits a word, on average, finding them one by one costs less than unpacking all words."""
_LAYERS: Final = 6
"""How many bits are found in a word one by one, before words that have more are unpacked."""


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

    @classmethod
    def from_runs(cls, pages: int, starts: Numbers, ends: Numbers) -> Self:
        """The pages of runs [start, end) that ascend and do not overlap, but may touch.

        Costs a little for each run and each word, nothing for each page of a run: the bits where runs begin and end are
        set, and then each bit becomes the parity of those up to it, in six steps within words and one across.

        Raises:
            UsageError: they overlap, descend, are empty, or do not lie in [0, pages).
        """
        if starts.size and (
            starts[0] < 0 or ends[-1] > pages or (starts >= ends).any() or (ends[:-1] > starts[1:]).any()
        ):
            raise UsageError(f"these are not ascending runs of {pages} pages")
        words = _toggles(word_count(pages) + 1, starts, ends)
        if starts.size:
            for distance in (1, 2, 4, 8, 16, 32):
                words ^= words << np.uint64(distance)
            inverted = np.bitwise_xor.accumulate(words >> _LAST_BIT)
            words[1:] ^= np.uint64(0) - inverted[:-1]
        return cls(pages, words[:-1])

    def copy(self) -> Self:
        """A bitmap of its own with the same bits."""
        return type(self)(self.pages, self.words.copy())

    def set(self, first: int = 0, count: int | None = None) -> None:
        """Set the bits of a range."""
        count = self._count(first, count)
        word, bit = divmod(first, WORD_BITS)
        if 0 < count <= WORD_BITS - bit:
            self.words[word] = self.words.item(word) | ((1 << count) - 1) << bit
            return
        span, head, tail = self._span(first, count)
        if span.size:
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
        if not 0 <= page < self.pages:
            raise UsageError(f"page {page} is not in a bitmap of {self.pages}")
        return bool(self.words.item(page // WORD_BITS) >> page % WORD_BITS & 1)

    def test_each(self, pages: Numbers) -> npt.NDArray[np.bool_]:
        """Whether the bit of each of some pages is set."""
        bits = self.words[pages // WORD_BITS] >> (pages % WORD_BITS).astype(np.uint64)
        return (bits & np.uint64(1)).astype(np.bool_)

    def clear_one(self, page: int) -> None:
        """Clear one page's bit, faster than `clear` does."""
        if not 0 <= page < self.pages:
            raise UsageError(f"page {page} is not in a bitmap of {self.pages}")
        word = page // WORD_BITS
        self.words[word] = self.words.item(word) & ~(1 << page % WORD_BITS)

    def clear_each(self, pages: Numbers) -> None:
        """Clear the bits of some pages."""
        bits = np.uint64(1) << (pages % WORD_BITS).astype(np.uint64)
        np.bitwise_and.at(self.words, pages // WORD_BITS, ~bits)

    def any(self, first: int = 0, count: int | None = None) -> bool:
        """Whether any bit of a range is set."""
        return any(bool(words.any()) for _, words, _ in self._blocks(first, count))

    def count(self, first: int = 0, count: int | None = None) -> int:
        """How many bits of a range are set."""
        return sum(_population(words) for _, words, _ in self._blocks(first, count))

    def runs(self, first: int = 0, count: int | None = None) -> Numbers:
        """The maximal runs of set bits in a range, ascending: shape (n, 2), columns first page and length."""
        edges = self._positions(_edges, first, count)
        # Where runs begin and end, in turn. No word may have the end of a run up to the range's own, which comes last.
        runs = edges[: edges.size // 2 * 2].reshape(-1, 2)
        runs[:, 1] -= runs[:, 0]
        return runs

    def indices(self, first: int = 0, count: int | None = None) -> Numbers:
        """The pages of a range whose bits are set, ascending."""
        return self._positions(lambda words, _: words, first, count)[:-1]

    def find(self, first: int) -> int:
        """The first page from ``first`` on whose bit is set; `pages` if there is none."""
        for start, words, _ in self._blocks(first, None):
            filled = words != 0
            if filled.any():
                index = int(filled.argmax())
                word = int(words[index])
                return (start + index) * WORD_BITS + (word & -word).bit_length() - 1
        return self.pages

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
        shift = np.uint64(first % WORD_BITS)
        fresh = 0
        for low in range(0, words.size, _BLOCK):
            part = words[low : low + _BLOCK]
            if low + part.size == words.size:
                part = part.copy()
                mask_tail(part, count - low * WORD_BITS)
            if shift:
                shifted = np.zeros(part.size + 1, np.uint64)
                shifted[:-1] = part << shift
                shifted[1:] |= part >> (np.uint64(WORD_BITS) - shift)
                part = shifted
            start = first // WORD_BITS + low
            mine = self.words[start : start + part.size]
            fresh += _merge(part[: mine.size], mine)
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

    def _blocks(self, first: int, count: int | None) -> Iterator[tuple[int, Words, np.uint64]]:
        """The words of a range with nothing but its bits, some at a time; not to be changed.

        With each block come the number of its first word and, as 0 or 1, the bit before the block.
        """
        span, head, tail = self._span(first, count)
        before = np.uint64(0)
        for low in range(0, span.size, _BLOCK):
            words = span[low : low + _BLOCK]
            starts, ends = low == 0, low + words.size == span.size
            if starts or ends:
                words = words.copy()
            if starts:
                words[0] &= head
            if ends:
                words[-1] &= tail
            yield first // WORD_BITS + low, words, before
            before = words[-1] >> _LAST_BIT

    def _positions(self, select: Callable[[Words, np.uint64], Words], first: int, count: int | None) -> Numbers:
        """The numbers of the bits that ``select`` leaves of a range's blocks, ascending, and then the range's end."""
        blocks = list(self._blocks(first, count))
        counts = [_population(select(words, before)) for _, words, before in blocks]
        found = np.empty(sum(counts) + 1, np.int64)
        found[-1] = first + self._count(first, count)
        done = 0
        for (start, words, before), size in zip(blocks, counts, strict=True):
            if size:
                _list_bits(select(words, before), start * WORD_BITS, found[done : done + size])
                done += size
        return found


def mask_tail(words: Words, pages: int) -> None:
    """Zero the bits at and past ``pages`` in the last word of words that cover them."""
    if pages % WORD_BITS:
        words[pages // WORD_BITS] &= _ONES >> np.uint64(-pages % WORD_BITS)


def _toggles(count: int, starts: Numbers, ends: Numbers) -> Words:
    """So many words with the bits set where runs begin or end, but not where one ends and the next begins.

    A byte for each bit is set, and the bytes are packed: numpy does that faster than it joins bits that share a word.
    """
    words = np.zeros(count, np.uint64)
    firsts = np.arange(0, count * WORD_BITS + _SPREAD, _SPREAD)
    begin, end = starts.searchsorted(firsts), ends.searchsorted(firsts)
    for block in ((begin[1:] > begin[:-1]) | (end[1:] > end[:-1])).nonzero()[0].tolist():
        first = block * _SPREAD
        into = words[first // WORD_BITS :][: _SPREAD // WORD_BITS]
        edges = np.zeros(into.size * WORD_BITS, np.uint8)
        edges[starts[begin[block] : begin[block + 1]] - first] = 1
        edges[ends[end[block] : end[block + 1]] - first] ^= 1
        into[:] = np.packbits(edges, bitorder="little").view(np.uint64)
    return words


def _population(block: Words) -> int:
    return int(np.bitwise_count(block).sum(dtype=np.uint32))


def _merge(words: Words, into: Words) -> int:
    """Set what is 1 in ``words``; how many bits were not set before."""
    new = ~into
    new &= words
    fresh = _population(new)
    if fresh:
        into |= words
    return fresh


def _edges(words: Words, before: np.uint64) -> Words:
    """The bits that differ from the bit before them."""
    edges = words << _ONE
    edges[1:] |= words[:-1] >> _LAST_BIT
    edges[0] |= before
    edges ^= words
    return edges


def _list_bits(words: Words, base: int, into: Numbers) -> None:
    """Write ``base`` plus the numbers of the set bits, ascending, to where there is room for just these.

    Where bits are few, the lowest of each word that is not zero is put in its place, then the next of those words that
    have more, and so on: each bit costs a step, zeros hardly anything. Where they are many, unpacking costs less.
    """
    if into.size == words.size * WORD_BITS:
        into[:] = np.arange(base, base + into.size)
        return
    if into.size > words.size * _FEW:
        np.add(_unpacked(words), base, out=into)
        return
    occupied = np.flatnonzero(words != 0)
    left = words.take(occupied)
    numbers = occupied * WORD_BITS + base
    places = _before(np.bitwise_count(left))
    for _ in range(_LAYERS):
        lowest = left & -left
        into[places] = numbers + np.bitwise_count(lowest - _ONE)
        left ^= lowest
        more = np.flatnonzero(left != 0)
        if not more.size:
            return
        left, numbers, places = left.take(more), numbers.take(more), places.take(more)
        places += 1
    bits = _unpacked(left)
    word = bits // WORD_BITS
    places -= _before(np.bitwise_count(left))
    into[places[word] + np.arange(bits.size)] = numbers[word] + bits % WORD_BITS


def _unpacked(words: Words) -> Numbers:
    """The numbers of the set bits, ascending, at a cost for each bit, set or not."""
    return np.flatnonzero(np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little").view(np.bool_))


def _before(counts: npt.NDArray[np.uint8]) -> Numbers:
    """The sum of all counts before each."""
    sums: Numbers = np.cumsum(counts, dtype=np.int64)
    sums -= counts
    return sums

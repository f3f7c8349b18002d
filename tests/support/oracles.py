"""Slow, readable twins of the fast code."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dirtylog.memory import MemoryRegion, Words


def to_words(bits: Iterable[int], pages: int) -> Words:
    """A bitmap's words from the numbers of its set bits, a bit at a time."""
    words = [0] * ((pages + 63) // 64)
    for bit in bits:
        words[bit // 64] |= 1 << bit % 64
    return np.array(words, np.uint64)


def to_bits(words: Words) -> set[int]:
    """The numbers of the set bits."""
    return {64 * index + bit for index, word in enumerate(words.tolist()) for bit in range(64) if word >> bit & 1}


class SetBitmap:
    """`PageBitmap` as a set of page numbers."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.bits: set[int] = set()

    def _range(self, first: int, count: int | None) -> range:
        return range(first, self.pages if count is None else first + count)

    def set(self, first: int = 0, count: int | None = None) -> None:
        self.bits |= set(self._range(first, count))

    def clear(self, first: int = 0, count: int | None = None) -> None:
        self.bits -= set(self._range(first, count))

    def count(self, first: int = 0, count: int | None = None) -> int:
        return len(self.bits & set(self._range(first, count)))

    def runs(self, first: int = 0, count: int | None = None) -> list[list[int]]:
        runs: list[list[int]] = []
        for page in self._range(first, count):
            if page not in self.bits:
                continue
            if runs and sum(runs[-1]) == page:
                runs[-1][1] += 1
            else:
                runs.append([page, 1])
        return runs

    def indices(self, first: int = 0, count: int | None = None) -> list[int]:
        return sorted(self.bits & set(self._range(first, count)))

    def extract(self, first: int = 0, count: int | None = None) -> list[int]:
        pages = self._range(first, count)
        words: list[int] = to_words((page - first for page in pages if page in self.bits), len(pages)).tolist()
        return words

    def merge(self, words: Words, first: int = 0, count: int | None = None) -> int:
        pages = self._range(first, count)
        fresh = {first + bit for bit in to_bits(words) if bit < len(pages)} - self.bits
        self.bits |= fresh
        return len(fresh)


@dataclass(eq=False)
class Node:
    """A region as a test built it, kept apart from what the region itself remembers."""

    region: MemoryRegion
    target: "Node | None" = None
    offset: int = 0
    children: list[tuple["Node", int, int]] = field(default_factory=list)
    """Child, address and priority, in the order they were added."""

    def shows(self, other: "Node") -> bool:
        inner = [child for child, _, _ in self.children] + ([] if self.target is None else [self.target])
        return self is other or any(node.shows(other) for node in inner)

    def answer(self, offset: int) -> tuple[MemoryRegion, int] | None:
        """Which RAM region, and which byte of it, answers at an offset of this region."""
        if not 0 <= offset < self.region.size:
            return None
        if self.target is not None:
            return self.target.answer(offset + self.offset)
        newest_first = list(reversed(self.children))
        for child, address, _ in sorted(newest_first, key=lambda entry: -entry[2]):
            found = child.answer(offset - address)
            if found is not None:
                return found
        return (self.region, offset) if self.region.block is not None else None

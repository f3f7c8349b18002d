"""Slow, readable twins of the fast code."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dirtylog.memory import FlatView, MemoryRegion, Words


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

    def find(self, first: int) -> int:
        return min((bit for bit in self.bits if bit >= first), default=self.pages)

    def test_each(self, pages: Iterable[int]) -> list[bool]:
        return [page in self.bits for page in pages]

    def clear_each(self, pages: Iterable[int]) -> None:
        self.bits -= set(pages)

    def extract(self, first: int = 0, count: int | None = None) -> list[int]:
        pages = self._range(first, count)
        words: list[int] = to_words((page - first for page in pages if page in self.bits), len(pages)).tolist()
        return words

    def merge(self, words: Words, first: int = 0, count: int | None = None) -> int:
        pages = self._range(first, count)
        fresh = {first + bit for bit in to_bits(words) if bit < len(pages)} - self.bits
        self.bits |= fresh
        return len(fresh)


class Answer(NamedTuple):
    """What is found at one address."""

    region: MemoryRegion
    offset: int
    readonly: bool
    direct: bool


@dataclass(eq=False)
class Node:
    """A region as a test built it, kept apart from what the region itself remembers."""

    region: MemoryRegion
    size: int
    target: "Node | None" = None
    offset: int = 0
    children: list[tuple["Node", int, int]] = field(default_factory=list)
    """Child, address and priority, in the order they were mapped."""
    answers: bool = False
    has_memory: bool = False
    readonly: bool = False
    trapped: bool = False
    enabled: bool = True

    def shows(self, other: "Node") -> bool:
        inner = [child for child, _, _ in self.children] + ([] if self.target is None else [self.target])
        return self is other or any(node.shows(other) for node in inner)

    def answer(self, offset: int, *, readonly: bool = False) -> Answer | None:
        """Who answers at an offset of this region, seen through what is read-only or not."""
        if not self.enabled or not 0 <= offset < self.size:
            return None
        readonly = readonly or self.readonly
        if self.target is not None:
            return self.target.answer(offset + self.offset, readonly=readonly)
        newest_first = list(reversed(self.children))
        for child, address, _ in sorted(newest_first, key=lambda entry: -entry[2]):
            found = child.answer(offset - address, readonly=readonly)
            if found is not None:
                return found
        if not self.answers:
            return None
        return Answer(self.region, offset, readonly, self.has_memory and not self.trapped)

    def edges(self, base: int = 0) -> set[int]:
        """Every address at which what is shown may change, this region being at ``base``."""
        found = {base, base + self.size}
        if self.target is not None:
            found |= self.target.edges(base - self.offset)
        for child, address, _ in self.children:
            found |= child.edges(base + address)
        return found


def ask_everywhere(root: Node, last: int = (1 << 64) - 1) -> list[tuple[int, int, Answer]]:
    """What a tree shows up to a last address, as (start, size, answer): found by asking at both sides of each edge.

    Neighbours that go on where the one before ends, in the same way, are one.
    """
    edges = sorted({0, last + 1} | {edge for edge in root.edges() if 0 < edge <= last})
    shown: list[tuple[int, int, Answer]] = []
    for start, end in itertools.pairwise(edges):
        answer = root.answer(start)
        assert root.answer(end - 1) == (
            None if answer is None else answer._replace(offset=answer.offset + end - 1 - start)
        )
        if answer is None:
            continue
        if shown:
            before, size, known = shown[-1]
            if before + size == start and known._replace(offset=known.offset + size) == answer:
                shown[-1] = before, size + end - start, known
                continue
        shown.append((start, end - start, answer))
    return shown


def as_asked(view: FlatView) -> list[tuple[int, int, Answer]]:
    """A view in the form of `ask_everywhere`."""
    return [
        (flat.start, flat.size, Answer(flat.region, flat.offset, flat.readonly, flat.direct)) for flat in view.ranges
    ]

"""Bitmaps of large memories, timed: merging what a tracker collected, and listing runs."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.support.compiled import RunLister
from benchmarks.support.timing import Figure, Operation, compare, time_alone
from dirtylog.errors import PeerError
from dirtylog.memory import PageBitmap, Words
from dirtylog.units import MIB, WORD_BITS, format_size

FILLS: Final = (0, 1, 100)
"""Per cent of bits set."""
LIMITS: Final = {(384 * MIB, 1): 3 * 0.382}
"""The most seconds for listing runs, by size and fill: three times what cloud-hypervisor b6c266c880, in Rust, needs."""

_DRAWN_AT_ONCE: Final = 1 << 20


def bitmap_figures(sizes: Sequence[int], runs: int) -> Iterator[Figure]:
    """Of bitmaps of some sizes in bytes, empty, with a few random bits, and full."""
    with tempfile.TemporaryDirectory(prefix="dirtylog-benchmark-") as folder:
        lister = RunLister.compiled(Path(folder))
        for size in sizes:
            for fill in FILLS:
                words = filled(size, fill)
                name = f"{format_size(size)}, {fill} %" + (" at random" if 0 < fill < 100 else "")
                yield _merge(f"merge bits: {name}", words, runs)
                yield _list_runs(f"list runs: {name}", words, runs, lister, LIMITS.get((size, fill)))


def filled(size: int, fill: int) -> Words:
    """A bitmap with some per cent of its bits set; where these are drawn at random, a few less, as some come twice."""
    words = np.full(size // 8, -(fill == 100), np.int64).view(np.uint64)
    if 0 < fill < 100:
        random, left = np.random.default_rng(0), size * 8 * fill // 100
        while left:
            bits = random.integers(size * 8, size=min(left, _DRAWN_AT_ONCE), dtype=np.uint64)
            np.bitwise_or.at(words, bits // WORD_BITS, np.uint64(1) << bits % WORD_BITS)
            left -= bits.size
    return words


def _merge(name: str, words: Words, runs: int) -> Figure:
    """Into an empty bitmap: all that is set is new."""
    target = PageBitmap(words.size * WORD_BITS)
    merge = Operation(name, partial(target.merge, words), before=target.clear)
    either = partial(np.bitwise_or, target.words, words, out=target.words)
    return compare(merge, Operation("numpy OR", either, before=target.clear), runs)


def _list_runs(name: str, words: Words, runs: int, lister: RunLister | None, limit: float | None) -> Figure:
    bitmap = PageBitmap(words.size * WORD_BITS, words)
    samples = time_alone(Operation(name, bitmap.runs), runs)
    if lister is None:
        return Figure(name, samples, limit=limit)
    known = len(bitmap.runs())
    found, raw = lister.measure(words, runs)
    if found != known:
        raise PeerError(f"in {name}, the program in C found {found} runs and dirtylog {known}")
    return Figure(name, samples, "C", raw, limit)

"""Clears put off until the first page of a chunk is about to be read."""

import numpy as np

from dirtylog.errors import UsageError
from dirtylog.units import PAGE_SIZE, WORD_BITS


class ClearChunks:
    """Which chunks of a block have a `log_clear` due.

    A clear makes the guest fault again on the pages it protects, so it should come as late as D3 allows: right
    before the first page of the chunk is read. (QEMU's clear_bmap, commit 002cad6b16.)

    Attributes:
        pages: the pages of the block.
        chunk: pages per chunk, a multiple of 64, so that each clear is whole words.
    """

    def __init__(self, pages: int, chunk_size: int) -> None:
        if chunk_size < 1:
            raise UsageError(f"a clear chunk of {chunk_size} bytes", remedy="at least 256K are needed, 128M are usual")
        unit = PAGE_SIZE * WORD_BITS
        self.pages = pages
        self.chunk = -(-chunk_size // unit) * WORD_BITS
        self._due = np.zeros(-(-pages // self.chunk), np.bool_)

    def postpone(self, first: int, count: int) -> None:
        """Note that the pages of a range were harvested and are to be cleared before they are read."""
        self._due[first // self.chunk : -(-(first + count) // self.chunk)] = True

    def take(self, first: int, count: int) -> list[tuple[int, int]]:
        """The clears due before the pages of a range may be read, as (first page, count) of whole chunks.

        Neighbours are joined; they are due no longer.
        """
        start = first // self.chunk
        due = self._due[start : -(-(first + count) // self.chunk)]
        if not due.any():
            return []
        edges = np.flatnonzero(np.diff(due, prepend=False, append=False))
        due[:] = False
        return [
            ((start + begin) * self.chunk, min((start + end) * self.chunk, self.pages) - (start + begin) * self.chunk)
            for begin, end in edges.reshape(-1, 2).tolist()
        ]

"""Who wants to know which pages of a block were written, and what each has yet to hear."""

import threading
from enum import IntFlag
from typing import Final

from dirtylog.errors import UsageError
from dirtylog.memory.bitmap import PageBitmap, Words
from dirtylog.units import PAGE_SIZE, page_span


class Client(IntFlag):
    """Users of the dirty log. Each has a bitmap of its own, so that one's clear never costs another its pages."""

    DISPLAY = 1
    CODE = 2
    MIGRATION = 4
    WATCH = 8


NOBODY: Final = Client(0)


class DirtyMemory:
    """One page bitmap per client for the pages of one RAM block, all dirty at first.

    The methods that clear are for `MemoryRegion`, which tells the listeners afterwards; nobody else calls them.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._lock = threading.Lock()
        self._bitmaps = {client: PageBitmap(pages) for client in Client}
        # Operations on flags take several times as long as on numbers, and each write by the host comes here.
        self._by_bit = [(int(client), bitmap) for client, bitmap in self._bitmaps.items()]
        self.mark(0, pages, ~Client(0))

    def mark(self, first: int, count: int, clients: Client) -> None:
        """Set a range of pages dirty for some clients."""
        wanted = int(clients)
        with self._lock:
            for bit, bitmap in self._by_bit:
                if bit & wanted:
                    bitmap.set(first, count)

    def merge(self, words: Words, first: int, count: int, clients: Client) -> None:
        """Set the pages of a range dirty whose bit in ``words`` (bit 0 is ``first``) is 1."""
        with self._lock:
            for client in clients:
                self._bitmaps[client].merge(words, first, count)

    def count(self, client: Client, first: int = 0, count: int | None = None) -> int:
        """How many pages of a range, of all pages by default, are dirty for one client."""
        with self._lock:
            return self._bitmaps[_one(client)].count(first, count)

    def any(self, first: int, count: int, client: Client) -> bool:
        """Whether any page of a range is dirty for one client."""
        with self._lock:
            return self._bitmaps[_one(client)].any(first, count)

    def fetch_and_clear(self, first: int, count: int, client: Client) -> Words:
        """The dirty bits of a range (bit 0 is ``first``), cleared in the same step."""
        with self._lock:
            return self._bitmaps[_one(client)].fetch_and_clear(first, count)


class DirtySnapshot:
    """The pages of a region that were dirty for a client when they were cleared."""

    def __init__(self, first: int, bitmap: PageBitmap) -> None:
        self._first = first
        self._bitmap = bitmap

    def is_dirty(self, offset: int, size: int) -> bool:
        """Whether any page touched by [offset, offset + size) of the region was dirty.

        Raises:
            UsageError: the range is not in the snapshot.
        """
        first, count = page_span(offset, size)
        if first < self._first or first + count > self._first + self._bitmap.pages:
            raise UsageError(
                f"[{offset:#x}, {offset + size:#x}) is not in the snapshot of pages from {self._first * PAGE_SIZE:#x}"
            )
        return self._bitmap.any(first - self._first, count)


def _one(client: Client) -> Client:
    if len(client) != 1:
        raise UsageError(f"{client!r} is not one client")
    return client

"""What was written in an interval, and how its bitmaps are packed for files and connections."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from dirtylog.errors import ProtocolError
from dirtylog.memory import PageBitmap
from dirtylog.units import word_count

_LEVEL: Final = 1
"""For 256 GiB, 20 to 30 ms if a few thousand pages were written, and 0.35 s if half of all were, at random."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Which pages were written in an interval.

    Attributes:
        time: seconds from the start of the watch to the interval's end, on the clock of the machine's process.
        seconds: the interval's length.
        written: by the name of the block.
    """

    time: float
    seconds: float
    written: Mapping[str, PageBitmap]

    @property
    def pages(self) -> int:
        """How many pages were written, in all blocks."""
        return sum(bitmap.count() for bitmap in self.written.values())

    @property
    def rate(self) -> float:
        """Pages written a second, each counted once."""
        return self.pages / self.seconds if self.seconds else 0.0


def pack(bitmap: PageBitmap) -> bytes:
    """A bitmap's words (W1) as a zlib stream; no bytes if no page is set."""
    return zlib.compress(bitmap.words.astype("<u8", copy=False).tobytes(), _LEVEL) if bitmap.any() else b""


def packed_bound(pages: int) -> int:
    """How many bytes `pack` makes at most: zlib stores what it cannot compress, in pieces with five bytes each."""
    size = word_count(pages) * 8
    return size + (size >> 10) + 64


def unpack(packed: bytes, pages: int) -> PageBitmap:
    """The reverse of `pack`.

    Raises:
        ProtocolError: these bytes are no bitmap of so many pages.
    """
    if not packed:
        return PageBitmap(pages)
    size = word_count(pages) * 8
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise ProtocolError(f"a bitmap of {pages} pages is damaged: {error}") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise ProtocolError(f"a bitmap does not have {pages} pages")
    words = np.frombuffer(raw, "<u8").astype(np.uint64)
    bitmap = PageBitmap(pages, words.copy())
    if not np.array_equal(bitmap.words, words):
        raise ProtocolError(f"a bitmap of {pages} pages has a page past its end")
    return bitmap

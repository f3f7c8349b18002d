"""Contents of pages in fewer bytes: zstd, and zstd of what changed since they were last sent.

The difference is the exclusive or with the copy that the destination has. Where a page changed little, that is nearly
all zeros, of which zstd makes next to nothing, at several gigabytes a second.
"""

import sys
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ProtocolError
from dirtylog.memory import Numbers
from dirtylog.units import PAGE_SIZE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Rows = npt.NDArray[np.uint64]
"""Pages as 64-bit words: shape (pages, 512)."""

_EMPTY: Final = -1
_LONGEST_WINDOW: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: 24}
"""What a frame may ask of the destination's memory: as much as the longest batch has."""


class Compressor:
    """Makes zstd frames at some level, in one thread at a time."""

    def __init__(self, level: int) -> None:
        self._compressor = zstd.ZstdCompressor(level)

    def compress(self, rows: Rows) -> bytes:
        """A frame of pages that nobody writes meanwhile.

        Were they written, zstd could repeat in one page what was found in another before it changed.
        """
        return self._compressor.compress(rows.data.cast("B"), zstd.ZstdCompressor.FLUSH_FRAME)


def decompress(data: bytes | bytearray, pages: int) -> Rows:
    """The pages in a zstd frame.

    Raises:
        ProtocolError: it is not one frame with just so many.
    """
    size = pages * PAGE_SIZE
    decompressor = zstd.ZstdDecompressor(options=_LONGEST_WINDOW)
    try:
        contents = decompressor.decompress(data, size + 1)
    except zstd.ZstdError as error:
        raise ProtocolError(f"the stream is corrupt: {len(data)} bytes are no zstd frame ({error})") from error
    if len(contents) != size or not decompressor.eof or decompressor.unused_data:
        raise ProtocolError(f"the stream is corrupt: a zstd frame of {len(data)} bytes is not {pages} pages")
    return np.frombuffer(contents, np.uint64).reshape(pages, PAGE_SIZE // 8)


class SentCopies:
    """Pages as the destination has them, as many as fit. Any thread may use it.

    Each page has one place in its block's share, which other pages have too; the one sent last is there.

    Args:
        blocks: how many pages each has.
        size: bytes of copies to keep at most, and one page a block at least.
    """

    def __init__(self, blocks: Sequence[int], size: int) -> None:
        share = min(1.0, size / (sum(blocks) * PAGE_SIZE))
        self._lock = threading.Lock()
        self._places = [_Places(max(1, int(pages * share))) for pages in blocks]

    def known(self, block: int, pages: Numbers) -> npt.NDArray[np.bool_]:
        """Which of some pages there is a copy of."""
        with self._lock:
            return self._places[block].known(pages)

    def differences(self, block: int, pages: Numbers, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Which of some pages there is a copy of, and the exclusive or of those with their copies."""
        with self._lock:
            places = self._places[block]
            known = places.known(pages)
            return known, places.rows(pages[known]) ^ rows[known]

    def keep(self, block: int, pages: Numbers, rows: Rows) -> None:
        """Take note of what was sent."""
        with self._lock:
            self._places[block].keep(pages, rows)

    def forget(self, block: int, pages: Numbers) -> None:
        """Pages were sent without taking note of what was in them."""
        with self._lock:
            self._places[block].forget(pages)


class _Places:
    def __init__(self, count: int) -> None:
        self._rows = np.zeros((count, PAGE_SIZE // 8), np.uint64)
        self._pages = np.full(count, _EMPTY, np.int64)

    def known(self, pages: Numbers) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self._pages[pages % self._pages.size] == pages
        return found

    def rows(self, pages: Numbers) -> Rows:
        return self._rows[pages % self._pages.size]

    def keep(self, pages: Numbers, rows: Rows) -> None:
        places = pages % self._pages.size
        _, last = np.unique(places[::-1], return_index=True)  # of pages that share a place
        chosen = places.size - 1 - last
        self._rows[places[chosen]] = rows[chosen]
        self._pages[places[chosen]] = pages[chosen]

    def forget(self, pages: Numbers) -> None:
        places = pages % self._pages.size
        self._pages[places[self._pages[places] == pages]] = _EMPTY

"""Contents of pages in fewer bytes: zstd, and zstd of what changed since they were last sent.

The difference is the exclusive or with the copy that the destination has. Where a page changed little, that is nearly
all zeros, of which zstd makes next to nothing, at several gigabytes a second.
"""

import sys
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ProtocolError
from dirtylog.units import PAGE_SIZE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Rows = npt.NDArray[np.uint64]
"""Pages as 64-bit words: shape (pages, 512)."""

_EMPTY: Final = -1


def compress(rows: Rows, level: int) -> bytes:
    """A zstd frame of pages that nobody writes meanwhile.

    Were they written, zstd could repeat in one page what was found in another before it changed.
    """
    return zstd.compress(rows.data.cast("B"), level)


def decompress(data: bytes | bytearray, pages: int) -> Rows:
    """The pages in a zstd frame.

    Raises:
        ProtocolError: it is not one frame with just so many.
    """
    size = pages * PAGE_SIZE
    decompressor = zstd.ZstdDecompressor()
    try:
        contents = decompressor.decompress(data, size + 1)
    except zstd.ZstdError as error:
        raise ProtocolError(f"the stream is corrupt: {len(data)} bytes are no zstd frame ({error})") from error
    if len(contents) != size or not decompressor.eof or decompressor.unused_data:
        raise ProtocolError(f"the stream is corrupt: a zstd frame of {len(data)} bytes is not {pages} pages")
    return np.frombuffer(contents, np.uint64).reshape(pages, PAGE_SIZE // 8)


class SentCopies:
    """The pages of one block as they were last sent, as many as fit.

    Each page has one place, shared with others; the one sent last has it.

    Args:
        pages: how many to keep at most.
    """

    def __init__(self, pages: int) -> None:
        self._rows = np.zeros((pages, PAGE_SIZE // 8), np.uint64)
        self._pages = np.full(pages, _EMPTY, np.int64)

    def known(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some pages there is a copy of."""
        found: npt.NDArray[np.bool_] = self._pages[pages % self._pages.size] == pages
        return found

    def differences(self, pages: npt.NDArray[np.int64], rows: Rows) -> Rows:
        """The exclusive or of pages with their copies, all of them known."""
        return self._rows[pages % self._pages.size] ^ rows

    def keep(self, pages: npt.NDArray[np.int64], rows: Rows) -> None:
        """Take note of what is sent now. Of pages that share a place, the last is kept."""
        places = pages % self._pages.size
        _, last = np.unique(places[::-1], return_index=True)
        chosen = places.size - 1 - last
        self._rows[places[chosen]] = rows[chosen]
        self._pages[places[chosen]] = pages[chosen]

    def forget(self, pages: npt.NDArray[np.int64]) -> None:
        """Pages were sent without taking note of what was in them."""
        places = pages % self._pages.size
        stale = self._pages[places] == pages
        self._pages[places[stale]] = _EMPTY

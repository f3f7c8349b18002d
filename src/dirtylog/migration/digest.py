"""A digest of a block's contents, the same whether zeros are stored or are holes."""

import numpy as np
import xxhash

from dirtylog.memory import RAMBlock
from dirtylog.units import MIB, PAGE_SIZE

_PIECE = 4 * MIB


def block_digest(block: RAMBlock) -> bytes:
    """Two XXH3-128 digests, of the numbers of the pages that are not zero and of their contents. Not a security hash.

    Holes are not read: that would allocate them.
    """
    numbers, contents = xxhash.xxh3_128(), xxhash.xxh3_128()
    memory = block.memory
    words = block.page_words
    for start, end in block.mapping.extents(0, block.size):
        for low in range(start, end, _PIECE):
            first, last = low // PAGE_SIZE, min(low + _PIECE, end) // PAGE_SIZE
            filled = words[first:last].any(axis=1)
            edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)) + first
            for begin, stop in edges.reshape(-1, 2).tolist():
                numbers.update(np.arange(begin, stop, dtype="<u8").tobytes())
                contents.update(memory[begin * PAGE_SIZE : stop * PAGE_SIZE])
    return numbers.digest() + contents.digest()

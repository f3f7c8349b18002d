"""Host memory that backs guest RAM."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.linux.mapping import BufferMapping, MemfdMapping
from dirtylog.memory.dirty import DirtyMemory
from dirtylog.units import PAGE_SIZE


class RAMBlock:
    """A named piece of host memory, a memfd mapping or a caller's buffer, with its dirty bitmaps.

    Attributes:
        name: unique in its `Memory`; how both sides of a migration know the block.
        size: bytes.
        pages: pages of `PAGE_SIZE`.
        mapping: the memory itself.
        dirty: what was written, per client.
        fetch: while parts of the memory are still to come: to be called with offset and size by threads of this process
            before they touch it, and by nobody while it holds a lock that those need who bring it. None otherwise.
    """

    def __init__(self, name: str, size: int, buffer: memoryview | None = None) -> None:
        if buffer is not None and buffer.nbytes != size:
            raise UsageError(f"the buffer for {name!r} has {buffer.nbytes} bytes, not {size}")
        self.name = name
        self.size = size
        self.pages = size // PAGE_SIZE
        self.mapping = MemfdMapping(f"dirtylog-{name}", size) if buffer is None else BufferMapping(buffer)
        self.dirty = DirtyMemory(self.pages)
        self.fetch: Callable[[int, int], None] | None = None

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, shape (size,)."""
        return self.mapping.array

    @property
    def memory(self) -> memoryview:
        """The bytes, for those who hand pieces of them to sockets and files."""
        return self.mapping.memory

    @property
    def page_words(self) -> npt.NDArray[np.uint64]:
        """The memory as 64-bit words, a row a page: shape (pages, 512)."""
        return self.array.view(np.uint64).reshape(self.pages, PAGE_SIZE // 8)

    @property
    def stored(self) -> int:
        """How many pages have contents, be they zeros that somebody wrote; all of them where nobody knows."""
        return sum(-(-end // PAGE_SIZE) - start // PAGE_SIZE for start, end in self.mapping.extents(0, self.size))

    def close(self) -> None:
        """Give up the memory; idempotent."""
        self.mapping.close()

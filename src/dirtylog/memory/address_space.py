"""A tree of regions, seen flat."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import UsageError
from dirtylog.memory.flatview import FlatRange, FlatView, render
from dirtylog.memory.section import MemoryRegionSection

if TYPE_CHECKING:
    from dirtylog.memory.memory import Memory
    from dirtylog.memory.region import MemoryRegion


class AddressSpace:
    """What one kind of access sees of a memory. `Memory.address_space` makes them.

    Attributes:
        memory: what it belongs to.
        name: for people.
        root: the region at address 0.
        view: the root rendered; replaced whole when a transaction commits.
    """

    def __init__(self, memory: "Memory", name: str, root: "MemoryRegion") -> None:
        self.memory = memory
        self.name = name
        self.root = root
        self.view = FlatView()

    def render(self) -> FlatView:
        """The view that the tree has now, which may not be committed yet."""
        return render(self.root)

    def section(self, flat: FlatRange) -> MemoryRegionSection:
        """What a listener is told about a range."""
        return MemoryRegionSection(flat.region, self, flat.offset, flat.start, flat.size)

    def read(self, address: int, size: int) -> bytes:
        """Read bytes.

        Raises:
            UsageError: nothing answers at some address of the range.
        """
        return b"".join(
            flat.region.block.array[offset : offset + length].tobytes()
            for flat, offset, length in self._pieces(address, size)
            if flat.region.block is not None
        )

    def write(self, address: int, data: bytes) -> None:
        """Write bytes, and note that for the clients that log the memory.

        Raises:
            UsageError: nothing answers at some address of the range; nothing was written then.
        """
        source = np.frombuffer(data, np.uint8)
        done = 0
        for flat, offset, length in list(self._pieces(address, len(source))):
            if flat.region.block is not None:
                flat.region.block.array[offset : offset + length] = source[done : done + length]
                flat.region.set_dirty(offset, length)
            done += length

    def _pieces(self, address: int, size: int) -> Iterator[tuple[FlatRange, int, int]]:
        """The range, offset in its region and length of each piece of [address, address + size)."""
        view = self.view
        end = address + size
        while address < end:
            flat = view.lookup(address)
            if flat is None:
                raise UsageError(f"nothing answers at {address:#x} of {self.name}")
            length = min(end, flat.end) - address
            yield flat, flat.offset + address - flat.start, length
            address += length

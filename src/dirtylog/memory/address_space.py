"""A tree of regions, seen flat."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from dirtylog.errors import AccessError, UsageError
from dirtylog.memory.access import MemoryRegionOps, access_size, read_register, write_register
from dirtylog.memory.eventfd import IOEventFD
from dirtylog.memory.flatview import FlatRange, FlatView
from dirtylog.memory.section import MemoryRegionSection

if TYPE_CHECKING:
    from dirtylog.memory.memory import Memory
    from dirtylog.memory.region import MemoryRegion

_SMALL: Final = 64
"""Up to this many bytes a memoryview's slice is quicker than numpy's."""


class AddressSpace:
    """What one kind of access sees of a memory. `Memory.address_space` makes them.

    Attributes:
        memory: what it belongs to.
        name: for people.
        root: the region at address 0, or None once `Memory.remove_address_space` took it away.
        view: the root rendered; replaced whole when a transaction commits.
        eventfds: the eventfds that its listeners know of, with the range that showed each.
    """

    def __init__(self, memory: "Memory", name: str, root: "MemoryRegion") -> None:
        self.memory = memory
        self.name = name
        self.root: MemoryRegion | None = root
        self.view = FlatView()
        self.eventfds: dict[IOEventFD, FlatRange] = {}

    def __repr__(self) -> str:
        return f"<AddressSpace {self.name!r}>"

    def section(self, flat: FlatRange) -> MemoryRegionSection:
        """What a listener is told about a range."""
        return MemoryRegionSection(flat.region, self, flat.offset, flat.start, flat.size, flat.readonly, flat.direct)

    def piece(self, flat: FlatRange, address: int, size: int) -> MemoryRegionSection:
        """What a listener is told about [address, address + size), which starts in a range."""
        offset = address - flat.start + flat.offset
        return MemoryRegionSection(flat.region, self, offset, address, size, flat.readonly, flat.direct)

    def read(self, address: int, size: int) -> bytes:
        """Read bytes: memory as it lies there, devices by as few accesses as they accept.

        Raises:
            AccessError: nothing answers at some address of the range, or what is there refuses.
        """
        flat = self.view.lookup(address)
        if flat is not None and 0 < size <= flat.end - address:
            return self._read_piece(flat, address - flat.start + flat.offset, size)
        return b"".join(self._read_piece(*piece) for piece in list(self._pieces(address, size)))

    def write(self, address: int, data: bytes) -> None:
        """Write bytes, and note that for the clients that log the memory.

        Raises:
            AccessError: nothing answers at some address of the range, or something there is read-only: nothing was
                written then. Or a device refuses: what comes before it was written.
        """
        flat = self.view.lookup(address)
        if flat is not None and len(data) <= flat.end - address and _takes_writes(flat):
            _write_piece(flat, address - flat.start + flat.offset, data)
            return
        done = 0
        pieces = list(self._pieces(address, len(data)))
        for flat, offset, length in pieces:
            if not _takes_writes(flat):
                raise AccessError(f"{flat.region!r} refuses writes", flat.start + offset - flat.offset, length)
        for flat, offset, length in pieces:
            _write_piece(flat, offset, data[done : done + length])
            done += length

    def _read_piece(self, flat: FlatRange, offset: int, length: int) -> bytes:
        if flat.direct:
            return _read_block(flat, offset, length)
        ops = _ops(flat, offset, length)
        parts = []
        while length:
            size = access_size(ops, offset, length)
            try:
                parts.append(read_register(ops, offset, size))
            except AccessError as error:
                raise _refused(flat, offset, size) from error
            offset, length = offset + size, length - size
        return b"".join(parts)

    def _pieces(self, address: int, size: int) -> Iterator[tuple[FlatRange, int, int]]:
        """The range, offset in its region and length of each piece of [address, address + size)."""
        if size < 0:
            raise UsageError(f"an access of {size} bytes")
        view = self.view
        end = address + size
        while address < end:
            flat = view.lookup(address)
            if flat is None:
                raise AccessError(f"nothing answers in the address space {self.name!r}", address, end - address)
            length = min(end, flat.end) - address
            yield flat, flat.offset + address - flat.start, length
            address += length


def _read_block(flat: FlatRange, offset: int, size: int) -> bytes:
    block = flat.region.block
    if block is None:
        raise AccessError(f"{flat.region!r} has no memory", offset, size)
    if block.fetch is not None:
        block.fetch(offset, size)
    return block.memory[offset : offset + size].tobytes()


def _takes_writes(flat: FlatRange) -> bool:
    return not flat.readonly and (flat.region.block is not None or flat.region.ops is not None)


def _write_piece(flat: FlatRange, offset: int, data: bytes) -> None:
    block, ops = flat.region.block, flat.region.ops
    if block is not None and ops is None:
        if block.fetch is not None:
            block.fetch(offset, len(data))
        if len(data) <= _SMALL:
            block.memory[offset : offset + len(data)] = data
        else:
            block.array[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        flat.region.set_dirty(offset, len(data))
        return
    ops = _ops(flat, offset, len(data))
    while data:
        size = access_size(ops, offset, len(data))
        try:
            write_register(ops, offset, data[:size])
        except AccessError as error:
            raise _refused(flat, offset, size) from error
        offset, data = offset + size, data[size:]


def _ops(flat: FlatRange, offset: int, size: int) -> MemoryRegionOps:
    region = flat.region
    if region.ops is None:
        raise AccessError(f"{region!r} does not answer", flat.start + offset - flat.offset, size)
    if region.coalesced:
        region.memory.flush_coalesced()
    return region.ops


def _refused(flat: FlatRange, offset: int, size: int) -> AccessError:
    return AccessError(f"{flat.region!r} refuses the access", flat.start + offset - flat.offset, size)

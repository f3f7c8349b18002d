"""Accesses of a processor, on their way to an address space."""

from collections.abc import Iterator
from contextlib import suppress

from dirtylog.errors import AccessError
from dirtylog.memory import AddressSpace
from dirtylog.memory.access import access_size


def read_bus(space: AddressSpace, address: int, size: int) -> bytes:
    """Read; where nothing answers, or what is there refuses, there are ones, as on a bus nobody drives."""
    parts = []
    for start, length in _accesses(space, address, size):
        try:
            parts.append(space.read(start, length))
        except AccessError:
            parts.append(b"\xff" * length)
    return b"".join(parts)


def write_bus(space: AddressSpace, address: int, data: bytes) -> None:
    """Write; where nothing answers, or what is there refuses, it is lost."""
    for start, length in _accesses(space, address, len(data)):
        with suppress(AccessError):
            space.write(start, data[start - address :][:length])


def _accesses(space: AddressSpace, address: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut an access to what answers at once, so that each part is carried out, or refused, on its own and once."""
    while size:
        flat = space.view.lookup(address)
        length = 1 if flat is None else min(size, flat.end - address)
        if flat is not None and flat.region.ops is not None:
            length = access_size(flat.region.ops, address - flat.start + flat.offset, length)
        yield address, length
        address, size = address + length, size - length

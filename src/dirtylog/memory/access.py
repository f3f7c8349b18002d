"""How accesses reach a device's callbacks: which sizes are allowed, which are implemented, in which byte order.

A device says what accesses it accepts (``valid``) and what its callbacks handle (``implemented``). An access that is
accepted but not implemented is cut into smaller ones, or made of a wider one of which a part is used.
"""

from dataclasses import dataclass
from typing import Final, Literal

from dirtylog.errors import AccessError

ByteOrder = Literal["little", "big"]
MAX_ACCESS: Final = 8


@dataclass(frozen=True, slots=True)
class AccessSizes:
    """From ``smallest`` to ``largest`` bytes, powers of two; at any address if ``unaligned``, else at multiples."""

    smallest: int = 1
    largest: int = 4
    unaligned: bool = False

    def __post_init__(self) -> None:
        sizes = (1, 2, 4, 8)
        if self.smallest not in sizes or self.largest not in sizes or self.smallest > self.largest:
            raise ValueError(f"accesses of {self.smallest} to {self.largest} bytes")

    def allow(self, offset: int, size: int) -> bool:
        """Whether an access is within them."""
        return self.smallest <= size <= self.largest and (self.unaligned or offset % size == 0)


class MemoryRegionOps:
    """A device's callbacks. Override `read` and `write`, and what the device accepts.

    Attributes:
        valid: accesses it accepts; others are refused.
        implemented: accesses its callbacks are called with.
        byte_order: of its registers.
    """

    valid: AccessSizes = AccessSizes(1, MAX_ACCESS)
    implemented: AccessSizes = AccessSizes(1, MAX_ACCESS)
    byte_order: ByteOrder = "little"

    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at an offset in the region. May raise; the access fails then."""
        raise AccessError("nothing can be read here", offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a value of ``size`` bytes at an offset in the region. May raise; the access fails then."""
        del value
        raise AccessError("nothing can be written here", offset, size)


def access_size(ops: MemoryRegionOps, offset: int, left: int) -> int:
    """How many bytes of ``left`` at an offset the next single access of a longer transfer has."""
    size = min(left, ops.valid.largest)
    size = 1 << (size.bit_length() - 1)
    if not ops.valid.unaligned and offset:
        size = min(size, offset & -offset)
    return size


def read_register(ops: MemoryRegionOps, offset: int, size: int) -> bytes:
    """One read of ``size`` bytes, in memory order.

    Raises:
        AccessError: the device does not accept it.
    """
    _check(ops, offset, size, "read")
    start, step = _steps(ops, offset, size)
    if step == size and start == offset:
        return (ops.read(offset, size) & _ones(size)).to_bytes(size, ops.byte_order)
    wide = b"".join(
        (ops.read(at, step) & _ones(step)).to_bytes(step, ops.byte_order) for at in range(start, offset + size, step)
    )
    return wide[offset - start : offset - start + size]


def write_register(ops: MemoryRegionOps, offset: int, data: bytes) -> None:
    """One write, of bytes in memory order. What is narrower than the device implements is merged into what it reads.

    Raises:
        AccessError: the device does not accept it.
    """
    size = len(data)
    _check(ops, offset, size, "written")
    start, step = _steps(ops, offset, size)
    head = offset - start
    if head or (head + size) % step:
        end = -(-(offset + size - start) // step) * step + start
        old = b"".join(
            (ops.read(at, step) & _ones(step)).to_bytes(step, ops.byte_order) for at in range(start, end, step)
        )
        data = old[:head] + data + old[head + size :]
    for index in range(0, len(data), step):
        ops.write(start + index, step, int.from_bytes(data[index : index + step], ops.byte_order))


def _check(ops: MemoryRegionOps, offset: int, size: int, what: str) -> None:
    if not ops.valid.allow(offset, size):
        raise AccessError(f"{size} bytes cannot be {what} at once here", offset, size)


def _steps(ops: MemoryRegionOps, offset: int, size: int) -> tuple[int, int]:
    """Where the implemented accesses that cover an access start, and their size."""
    step = min(max(size, ops.implemented.smallest), ops.implemented.largest)
    if ops.implemented.unaligned:
        return offset, step
    while step > ops.implemented.smallest and offset % step:
        step //= 2
    return offset - offset % step, step


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1

"""A device made of registers that are bytes, and what it was asked."""

from typing import NamedTuple

from dirtylog.errors import AccessError
from dirtylog.memory import AccessSizes, MemoryRegionOps
from dirtylog.memory.access import ByteOrder


class Call(NamedTuple):
    """One callback."""

    what: str
    offset: int
    size: int
    value: int


class ByteDevice(MemoryRegionOps):
    """Its registers hold what is written to them; ``calls`` has each callback, in order.

    Accesses to offsets in ``refused`` raise.
    """

    def __init__(
        self,
        size: int,
        *,
        valid: AccessSizes = MemoryRegionOps.valid,
        implemented: AccessSizes = MemoryRegionOps.implemented,
        byte_order: ByteOrder = "little",
    ) -> None:
        self.registers = bytearray(size)
        self.calls: list[Call] = []
        self.refused: frozenset[int] = frozenset()
        self.valid = valid
        self.implemented = implemented
        self.byte_order = byte_order

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(self.registers[offset : offset + size], self.byte_order)
        self._called("read", offset, size, value)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self._called("write", offset, size, value)
        self.registers[offset : offset + size] = value.to_bytes(size, self.byte_order)

    def _called(self, what: str, offset: int, size: int, value: int) -> None:
        assert self.implemented.allow(offset, size)
        if offset in self.refused:
            raise AccessError("the device is asleep", offset, size)
        self.calls.append(Call(what, offset, size, value))

"""What the guests' boot sectors have in common: addresses, and the range that they write.

``guests/sector.inc`` is the source of the common part. The numbers here are the ones there.
"""

import struct
from importlib import resources
from typing import Final

from dirtylog.errors import HostError, UsageError
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

LOAD_ADDRESS: Final = 0x7C00
"""Where a PC BIOS loads a boot sector, and starts it in real mode."""

COUNTER_ADDRESS: Final = 0x8000
"""Where a guest counts: a little-endian 64-bit word."""

STARTED_ADDRESS: Final = 0x8008
STARTED: Final = b"RUN1"
"""What stands at ``STARTED_ADDRESS`` from the moment when the guest keeps its promises."""

DEFAULT_RANGE: Final = (1 * MIB, 100 * MIB)
"""The range of the shipped images, as ``(first, last)``; ``last`` is the address after it."""

_LOWEST: Final = 64 * KIB
_HIGHEST: Final = 3 * GIB
_SIZE: Final = 512
_SIGNATURE: Final = b"\x55\xaa"
_PARAMETERS_OFFSET: Final = 4
_PARAMETER: Final = struct.Struct("<I")


def build(name: str, magic: bytes, first: int, last: int, *more: int) -> bytes:
    """A shipped image, set to write the pages of ``[first, last)``.

    Args:
        name: of the file.
        magic: that of the layout which the caller knows.
        first: address of the first page; a guest's own code and counter lie below 64 KiB.
        last: address after the last page; at most 3 GiB, where a PC's memory makes room for its devices.
        more: the guest's own parameters, 32 bits each.
    """
    _check_range(first, last)
    image = bytearray(_shipped(name, magic))
    parameters = b"".join(_PARAMETER.pack(value) for value in (first, last, *more))
    start = _PARAMETERS_OFFSET + len(magic)
    image[start : start + len(parameters)] = parameters
    return bytes(image)


def _check_range(first: int, last: int) -> None:
    asked = f"the range {first:#x} to {last:#x}"
    if first % PAGE_SIZE or last % PAGE_SIZE:
        raise UsageError(f"{asked} is not whole pages", remedy=f"use multiples of {PAGE_SIZE}")
    if first >= last:
        raise UsageError(f"{asked} holds no page", remedy="put its end above its start")
    if first < _LOWEST:
        raise UsageError(f"{asked} covers the guest's own code or counter", remedy=f"start at {_LOWEST:#x} or above")
    if last > _HIGHEST:
        raise UsageError(f"{asked} reaches into the PCI hole", remedy=f"end at {_HIGHEST:#x} or below")


def _shipped(name: str, magic: bytes) -> bytes:
    try:
        image = resources.files("dirtylog.guests").joinpath(name).read_bytes()
    except OSError as error:
        raise HostError(f"the guest image {name} cannot be read", remedy="reinstall dirtylog") from error
    found = image[_PARAMETERS_OFFSET : _PARAMETERS_OFFSET + len(magic)]
    if len(image) != _SIZE or found != magic or not image.endswith(_SIGNATURE):
        raise HostError(f"the guest image {name} is damaged", remedy="reinstall dirtylog")
    return image

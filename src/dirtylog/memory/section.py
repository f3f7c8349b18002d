"""What listeners are told about: a piece of a region, where an address space shows it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dirtylog.memory.address_space import AddressSpace
    from dirtylog.memory.region import MemoryRegion


@dataclass(frozen=True, slots=True, eq=False)
class MemoryRegionSection:
    """``size`` bytes of a region from ``offset_within_region``, seen at ``offset_within_address_space``."""

    region: "MemoryRegion"
    address_space: "AddressSpace"
    offset_within_region: int
    offset_within_address_space: int
    size: int

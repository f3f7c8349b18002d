"""What listeners are told about: a piece of a region, where an address space shows it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from dirtylog.units import PAGE_SIZE, align_down

if TYPE_CHECKING:
    from dirtylog.memory.address_space import AddressSpace
    from dirtylog.memory.region import MemoryRegion


@dataclass(frozen=True, slots=True, eq=False)
class MemoryRegionSection:
    """``size`` bytes of a region from ``offset_within_region``, seen at ``offset_within_address_space``.

    ``readonly``: writes are refused or, by a ROM device, trapped. ``direct``: reads need no callback.
    """

    region: "MemoryRegion"
    address_space: "AddressSpace"
    offset_within_region: int
    offset_within_address_space: int
    size: int
    readonly: bool = False
    direct: bool = True

    def whole_pages(self) -> Self | None:
        """The part of it that is whole pages of the address space; None if there is none.

        The start rounds up and the size shrinks by as much and rounds down, for what cannot map part of a page.
        """
        skip = -self.offset_within_address_space % PAGE_SIZE
        size = align_down(self.size - skip, PAGE_SIZE)
        if size <= 0:
            return None
        return replace(
            self,
            offset_within_region=self.offset_within_region + skip,
            offset_within_address_space=self.offset_within_address_space + skip,
            size=size,
        )

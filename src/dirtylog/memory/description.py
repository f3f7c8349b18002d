"""What a memory looks like now, for people and programs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog.memory.dirty import Client
from dirtylog.memory.flatview import FlatRange
from dirtylog.memory.region import MemoryRegion

if TYPE_CHECKING:
    from dirtylog.memory.address_space import AddressSpace
    from dirtylog.memory.memory import Memory


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """A node of the tree. ``address`` is where its container, wherever that is mapped, would show it."""

    name: str
    kind: str
    address: int
    size: int
    priority: int
    enabled: bool
    readonly: bool
    logging: tuple[str, ...]
    target: str | None
    target_offset: int
    children: tuple["RegionDescription", ...]


@dataclass(frozen=True, slots=True)
class RangeDescription:
    """A range of a flat view. ``dirty``: pages of the range per client that logs it, as far as they were synced."""

    start: int
    size: int
    region: str
    kind: str
    offset: int
    readonly: bool
    logging: tuple[str, ...]
    dirty: dict[str, int]


@dataclass(frozen=True, slots=True)
class AddressSpaceDescription:
    """An address space: the tree under its root, and what it shows."""

    name: str
    root: RegionDescription | None
    ranges: tuple[RangeDescription, ...]


@dataclass(frozen=True, slots=True)
class MemoryDescription:
    """All of a memory. ``tracking``: why all RAM is logged, if it is."""

    address_spaces: tuple[AddressSpaceDescription, ...]
    tracking: tuple[str, ...]


def describe(memory: "Memory") -> MemoryDescription:
    """Describe a memory. Nothing is synced: dirty counts are what the clients know."""
    return MemoryDescription(
        tuple(_address_space(space) for space in memory.address_spaces),
        tuple(reason.name.lower() for reason in memory.tracking if reason.name),
    )


def _address_space(space: "AddressSpace") -> AddressSpaceDescription:
    root = None if space.root is None else _region(space.root, 0)
    return AddressSpaceDescription(space.name, root, tuple(map(_range, space.view.ranges)))


def _region(region: MemoryRegion, base: int) -> RegionDescription:
    address = base + region.address
    return RegionDescription(
        name=region.name,
        kind=region.kind,
        address=address,
        size=region.size,
        priority=region.priority,
        enabled=region.enabled,
        readonly=region.readonly,
        logging=_names(region.logging),
        target=None if region.target is None else region.target.name,
        target_offset=region.target_offset,
        children=tuple(_region(child, address) for child in region.children),
    )


def _range(flat: FlatRange) -> RangeDescription:
    region = flat.region
    return RangeDescription(
        start=flat.start,
        size=flat.size,
        region=region.name,
        kind=region.kind if flat.direct or region.block is None else f"{region.kind}, trapped",
        offset=flat.offset,
        readonly=flat.readonly,
        logging=_names(flat.logging),
        dirty={name: region.count_dirty(flat.offset, flat.size, Client[name.upper()]) for name in _names(flat.logging)},
    )


def _names(clients: Client) -> tuple[str, ...]:
    return tuple(client.name.lower() for client in clients if client.name)

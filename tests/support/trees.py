"""Random trees of regions, with the oracle's twin of each."""

from typing import Final

from hypothesis import strategies as st
from support.oracles import Node

from dirtylog.memory import Memory, MemoryRegionOps
from dirtylog.units import PAGE_SIZE

UNIT: Final = PAGE_SIZE // 4
"""Small trees are made of these: parts of pages, so that nothing is aligned by luck."""

_WIDE = [0, 1, PAGE_SIZE - 1, PAGE_SIZE, 1 << 32, 1 << 63, (1 << 64) - PAGE_SIZE, (1 << 64) - 1]
_KINDS = ["ram", "rom", "rom-device", "mmio", "reservation", "container", "alias", "alias"]

narrow_places = st.integers(0, 10).map(lambda count: count * UNIT)
narrow_sizes = st.integers(1, 24).map(lambda count: count * UNIT)
places = narrow_places | st.sampled_from(_WIDE)
sizes = narrow_sizes | st.sampled_from([size for size in _WIDE if size] + [1 << 64])
priorities = st.integers(-1, 1)


def make(memory: Memory, nodes: list[Node], data: st.DataObject, *, wide: bool) -> Node:
    """One more region of any kind, not mapped yet; an alias is of one that there is."""
    name = f"r{len(memory.blocks)}.{len(nodes)}"
    kind = data.draw(st.sampled_from(_KINDS))
    size = data.draw(sizes if wide else narrow_sizes)
    pages = data.draw(st.integers(1, 4)) * PAGE_SIZE
    if kind == "ram":
        return Node(memory.ram(name, pages), pages, answers=True, has_memory=True)
    if kind == "rom":
        return Node(memory.rom(name, bytes(pages)), pages, answers=True, has_memory=True, readonly=True)
    if kind == "rom-device":
        return Node(memory.rom_device(name, bytes(pages), MemoryRegionOps()), pages, answers=True, has_memory=True)
    if kind == "mmio":
        return Node(memory.mmio(name, size, MemoryRegionOps()), size, answers=True)
    if kind == "reservation":
        return Node(memory.reservation(name, size), size, answers=True)
    if kind == "container":
        return Node(memory.container(name, size), size)
    target, offset = data.draw(st.sampled_from(nodes)), data.draw(places if wide else narrow_places)
    return Node(memory.alias(name, target.region, offset, size), size, target, offset)

"""The memory model itself, timed: commits, look-ups and accesses."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from operator import itemgetter
from typing import Final

import numpy as np

from benchmarks.support.timing import Figure, Operation, compare
from dirtylog.memory import (
    AddressSpace,
    Client,
    FlatRange,
    FlatView,
    Memory,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    TrackingReason,
)
from dirtylog.units import GIB, MIB, PAGE_SIZE

COMMIT_LIMIT: Final = 20e-3
ACCESS_LIMIT: Final = 5e-6
READ_LIMIT: Final = MIB / 5e9

_REGIONS: Final = (1_000, 10_000)
_RANGES: Final = (10, 1_000, 100_000)
_LOOK_UPS: Final = 1_000
_RAM_SIZE: Final = 64 * MIB
"""More than a CPU's cache holds, so that reads of it, one after the other, come from memory."""
_DEVICE_ADDRESS: Final = 4 * GIB


class _Device(MemoryRegionOps):
    """Does nothing, and that fast."""

    def read(self, offset: int, size: int) -> int:
        del size
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size, value


def commit_figures(runs: int) -> Iterator[Figure]:
    """One region of many is shown or hidden: until the listener has heard of all."""
    for count in _REGIONS:
        memory = Memory()
        root, device = memory.container("root"), _Device()
        regions = [memory.mmio(f"device {number}", PAGE_SIZE, device) for number in range(count)]
        with memory.transaction():
            for number, region in enumerate(regions):
                root.add(region, 2 * number * PAGE_SIZE)
        memory.register(MemoryListener(), memory.address_space("space", root))
        yield compare(
            Operation(f"commit, {count:,} regions", partial(_toggle, regions[count // 2])),
            Operation("sort and compare tuples", _sorter(regions)),
            runs,
            limit=COMMIT_LIMIT if count == min(_REGIONS) else None,
        )


def _toggle(region: MemoryRegion) -> None:
    region.set_enabled(not region.enabled)


def _sorter(regions: list[MemoryRegion]) -> Callable[[], object]:
    """What no way of rendering and comparing views can do without."""
    old = [(region.address, region.size, region) for region in regions]
    new = [(region.address, region.size, region) for region in reversed(regions)]
    return lambda: sorted(new, key=itemgetter(0)) == old


def look_up_figures(runs: int) -> Iterator[Figure]:
    """Which range is at an address."""
    region = Memory().mmio("device", PAGE_SIZE, _Device())
    for count in _RANGES:
        starts = range(0, 2 * count * PAGE_SIZE, 2 * PAGE_SIZE)  # with gaps, or else the ranges would be joined
        view = FlatView(FlatRange(region, 0, start, PAGE_SIZE, False, False, Client(0)) for start in starts)
        addresses: list[int] = (np.random.default_rng(0).integers(count, size=_LOOK_UPS) * 2 * PAGE_SIZE).tolist()
        yield compare(
            Operation(f"look-up, {count:,} ranges", partial(_for_each, view.lookup, addresses), _LOOK_UPS),
            Operation("bisect", partial(_for_each, partial(bisect_right, list(starts)), addresses), _LOOK_UPS),
            runs,
        )


def _for_each(look_up: Callable[[int], object], addresses: list[int]) -> None:
    for address in addresses:
        look_up(address)


def access_figures(runs: int) -> Iterator[Figure]:
    """Reads and writes through an address space."""
    with _small_machine() as (memory, space, device):
        data, content = b"\1" * 8, memory.blocks["ram"].memory
        place = slice(PAGE_SIZE, PAGE_SIZE + 8)
        read = Operation("memoryview slice", lambda: bytes(content[place]))
        write = Operation("memoryview slice", partial(content.__setitem__, place, data))
        read_device = Operation("its callback", partial(device.read, 0, 8))
        write_device = Operation("its callback", partial(device.write, 0, 8, 1))
        for name, call, raw in (
            ("read 8 bytes of RAM", partial(space.read, PAGE_SIZE, 8), read),
            ("write 8 bytes of RAM", partial(space.write, PAGE_SIZE, data), write),
            ("read 8 bytes of MMIO", partial(space.read, _DEVICE_ADDRESS, 8), read_device),
            ("write 8 bytes of MMIO", partial(space.write, _DEVICE_ADDRESS, data), write_device),
        ):
            yield compare(Operation(name, call), raw, runs, limit=ACCESS_LIMIT)
        memory.start_logging(TrackingReason.MIGRATION)
        logged = Operation("write 8 bytes of logged RAM", partial(space.write, PAGE_SIZE, data))
        yield compare(logged, write, runs, limit=ACCESS_LIMIT)
        yield _long_reads(memory, space, runs)


def _long_reads(memory: Memory, space: AddressSpace, runs: int) -> Figure:
    array, into = memory.blocks["ram"].array, np.empty(MIB, np.uint8)
    starts, others = cycle(range(0, _RAM_SIZE, MIB)), cycle(range(0, _RAM_SIZE, MIB))

    def copy() -> None:
        start = next(others)
        np.copyto(into, array[start : start + MIB])

    ours = Operation("read 1 MiB of RAM", lambda: space.read(next(starts), MIB))
    return compare(ours, Operation("memcpy", copy), runs, limit=READ_LIMIT, size=MIB)


@contextmanager
def _small_machine() -> Iterator[tuple[Memory, AddressSpace, _Device]]:
    memory, device = Memory(), _Device()
    try:
        root = memory.container("root")
        root.add(memory.ram("ram", _RAM_SIZE), 0)
        root.add(memory.mmio("device", PAGE_SIZE, device), _DEVICE_ADDRESS)
        memory.blocks["ram"].array[:] = 1  # all pages are there
        yield memory, memory.address_space("space", root), device
    finally:
        memory.close()

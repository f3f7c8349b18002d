"""A tree of regions rendered to what an address space shows: sorted, disjoint ranges."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.memory.dirty import Client

if TYPE_CHECKING:
    from dirtylog.memory.region import MemoryRegion

ADDRESS_SPACE_SIZE = 1 << 64


@dataclass(frozen=True, slots=True)
class FlatRange:
    """[start, start + size) shows ``region`` from ``offset``; two are equal if a listener could not tell them apart.

    ``readonly`` is the region's or that of anything it is shown through; ``direct`` tells whether its block may be read
    without a callback. ``logging``, the clients that log the region, is not part of equality: its changes are told by
    log_start and log_stop.
    """

    region: "MemoryRegion"
    offset: int
    start: int
    size: int
    readonly: bool
    direct: bool
    logging: Client = field(compare=False)

    @property
    def end(self) -> int:
        """The first address past the range."""
        return self.start + self.size


class FlatView:
    """Sorted, disjoint ranges. Immutable; a changed tree gets a new view, so readers take no lock."""

    __slots__ = ("_starts", "ranges")

    def __init__(self, ranges: Iterable[FlatRange] = ()) -> None:
        self.ranges = _simplify(ranges)
        self._starts = [flat.start for flat in self.ranges]

    def lookup(self, address: int) -> FlatRange | None:
        """The range that answers at an address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            flat = self.ranges[index]
            if address < flat.start + flat.size:
                return flat
        return None


@dataclass(frozen=True, slots=True)
class ViewDiff:
    """How one view became another.

    Attributes:
        removed: ranges that went, ascending.
        shown: what is there now, ascending, each with the range that it was, or None if it is new.
    """

    removed: tuple[FlatRange, ...]
    shown: tuple[tuple[FlatRange | None, FlatRange], ...]


def diff(old: FlatView, new: FlatView) -> ViewDiff:
    """Compare two views. A range that grows, shrinks or changes in any way but logging is removed and added."""
    before = {flat.start: flat for flat in old.ranges}
    shown: list[tuple[FlatRange | None, FlatRange]] = []
    for flat in new.ranges:
        known = before.get(flat.start)
        if known is not None and known == flat:
            del before[flat.start]
            shown.append((known, flat))
        else:
            shown.append((None, flat))
    return ViewDiff(tuple(before.values()), tuple(shown))


def flat_root(region: "MemoryRegion") -> "MemoryRegion | None":
    """The region whose rendering is that of ``region``; None if it shows nothing.

    Address spaces with equal roots share one view. An alias of a whole region and a container whose only enabled child
    starts at 0 and covers it show just what these show.
    """
    while region.enabled:
        if region.terminates or region.readonly:
            return region
        if region.target is not None:
            if region.target_offset or region.target.size > region.size:
                return region
            inner = region.target
        else:
            enabled = [child for child in region.children if child.enabled]
            if not enabled:
                return None
            if len(enabled) > 1 or enabled[0].address or enabled[0].size > region.size:
                return region
            inner = enabled[0]
        region = inner
    return None


def render(root: "MemoryRegion | None") -> FlatView:
    """The view of a tree, with its root at address 0."""
    layers: list[_Layer] = []
    if root is not None:
        _stack(layers, root, -root.address, 0, ADDRESS_SPACE_SIZE, readonly=False)
    return FlatView(_visible(layers))


class _Layer(NamedTuple):
    """[low, high) shows a region whose first byte is at ``base``, which may be negative."""

    low: int
    high: int
    region: "MemoryRegion"
    base: int
    readonly: bool


def _stack(layers: list[_Layer], region: "MemoryRegion", base: int, low: int, high: int, *, readonly: bool) -> None:
    """Add what a region whose container is at ``base`` shows of [low, high); what comes first hides what comes later.

    See `MemoryRegion.children`.
    """
    if not region.enabled:
        return
    base += region.address
    readonly = readonly or region.readonly
    low, high = max(low, base), min(high, base + region.size)
    if low >= high:
        return
    if region.target is not None:
        # Where the target is mapped itself does not matter.
        target_base = base - region.target.address - region.target_offset
        _stack(layers, region.target, target_base, low, high, readonly=readonly)
    for child in region.children:
        _stack(layers, child, base, low, high, readonly=readonly)
    if region.terminates:
        layers.append(_Layer(low, high, region, base, readonly))


def _visible(layers: list[_Layer]) -> Iterator[FlatRange]:
    """What is seen of layers, ascending. A walk through the addresses: n layers take n log n steps."""
    coming = sorted(range(len(layers)), key=lambda index: layers[index].low, reverse=True)
    here: list[int] = []  # a heap; layers that end while they are hidden stay in it until they come first
    address = 0
    while True:
        while here and layers[here[0]].high <= address:
            heappop(here)
        if not here:
            if not coming:
                return
            address = layers[coming[-1]].low
        while coming and layers[coming[-1]].low == address:
            heappush(here, coming.pop())
        front = here[0]
        _, until, region, base, readonly = layers[front]
        while coming and layers[coming[-1]].low < until:
            if coming[-1] < front:
                until = layers[coming[-1]].low
            else:
                heappush(here, coming.pop())
        yield FlatRange(region, address - base, address, until - address, readonly, region.direct, region.logging)
        address = until


def _simplify(ranges: Iterable[FlatRange]) -> tuple[FlatRange, ...]:
    """Join neighbours that show consecutive bytes of one region in the same way."""
    joined: list[FlatRange] = []
    for flat in ranges:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.region is flat.region
            and (last.end, last.offset + last.size) == (flat.start, flat.offset)
            and (last.readonly, last.direct, last.logging) == (flat.readonly, flat.direct, flat.logging)
        ):
            joined[-1] = replace(last, size=last.size + flat.size)
        else:
            joined.append(flat)
    return tuple(joined)

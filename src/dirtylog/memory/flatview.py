"""A tree of regions rendered to what an address space shows: sorted, disjoint ranges."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dirtylog.memory.dirty import Client

if TYPE_CHECKING:
    from dirtylog.memory.region import MemoryRegion

ADDRESS_SPACE_SIZE = 1 << 64


@dataclass(frozen=True, slots=True)
class FlatRange:
    """[start, start + size) shows ``region`` from ``offset``; two are equal if a listener could not tell them apart.

    ``logging``, the clients that log the region, is not part of that: its changes are told by log_start and log_stop.
    """

    region: "MemoryRegion"
    offset: int
    start: int
    size: int
    logging: Client = field(compare=False)

    @property
    def end(self) -> int:
        """The first address past the range."""
        return self.start + self.size


class FlatView:
    """Sorted, disjoint ranges. Immutable; a changed tree gets a new view, so readers take no lock."""

    def __init__(self, ranges: Iterable[FlatRange] = ()) -> None:
        self.ranges = _simplify(ranges)
        self._starts = [flat.start for flat in self.ranges]

    def lookup(self, address: int) -> FlatRange | None:
        """The range that answers at an address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.ranges[index].end:
            return self.ranges[index]
        return None


@dataclass(frozen=True, slots=True)
class ViewDiff:
    """How one view became another: `removed` and `added` in ascending order, `kept` as pairs of old and new."""

    removed: tuple[FlatRange, ...]
    added: tuple[FlatRange, ...]
    kept: tuple[tuple[FlatRange, FlatRange], ...]


def diff(old: FlatView, new: FlatView) -> ViewDiff:
    """Compare two views. A range that grows, shrinks or changes in any way but logging is removed and added."""
    before = {flat.start: flat for flat in old.ranges}
    kept = [(before[flat.start], flat) for flat in new.ranges if before.get(flat.start) == flat]
    stayed = {flat.start for _, flat in kept}
    return ViewDiff(
        removed=tuple(flat for flat in old.ranges if flat.start not in stayed),
        added=tuple(flat for flat in new.ranges if flat.start not in stayed),
        kept=tuple(kept),
    )


def render(root: "MemoryRegion") -> FlatView:
    """The view of a tree. Where regions overlap, what is rendered first wins: see `MemoryRegion.children`."""
    taken: list[FlatRange] = []
    _render(root, 0, 0, ADDRESS_SPACE_SIZE, taken)
    return FlatView(taken)


def _render(region: "MemoryRegion", base: int, low: int, high: int, taken: list[FlatRange]) -> None:
    """Render a region whose container is at ``base``, clipped to [low, high), into the gaps of ``taken``."""
    base += region.address
    low, high = max(low, base), min(high, base + region.size)
    if low >= high:
        return
    if region.target is not None:
        # Where the target is mapped itself does not matter; the base may be negative.
        _render(region.target, base - region.target.address - region.target_offset, low, high, taken)
    for child in region.children:
        _render(child, base, low, high, taken)
    if region.block is not None:
        for start, end in _gaps(taken, low, high):
            taken.append(FlatRange(region, start - base, start, end - start, region.logging))
        taken.sort(key=lambda flat: flat.start)


def _gaps(taken: list[FlatRange], low: int, high: int) -> list[tuple[int, int]]:
    gaps = []
    for flat in taken:
        if flat.end <= low:
            continue
        if flat.start >= high:
            break
        if low < flat.start:
            gaps.append((low, flat.start))
        low = flat.end
    if low < high:
        gaps.append((low, high))
    return gaps


def _simplify(ranges: Iterable[FlatRange]) -> tuple[FlatRange, ...]:
    """Join neighbours that show consecutive bytes of one region in the same way."""
    joined: list[FlatRange] = []
    for flat in ranges:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.end, last.offset + last.size) == (flat.start, flat.offset)
            and (last.region, last.logging) == (flat.region, flat.logging)
        ):
            joined[-1] = replace(last, size=last.size + flat.size)
        else:
            joined.append(flat)
    return tuple(joined)

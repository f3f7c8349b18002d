"""Writes that signal an eventfd instead of reaching a device, and writes that may be delivered late."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dirtylog.memory.flatview import FlatRange, FlatView


class IOEventFD(NamedTuple):
    """Writes of ``size`` bytes (0: any length) at ``address``, of ``data`` if that has to match, signal ``fd``.

    ``fd`` stays its owner's, and open until the eventfd is removed from the region. The order of the fields is the
    order in which listeners are told. The address is an offset in a region, or, in an address space's list, an address
    there.
    """

    address: int
    size: int
    match_data: bool
    data: int
    fd: int


class CoalescedRange(NamedTuple):
    """Writes to ``size`` bytes at ``offset`` of a region may be delivered late, in order."""

    offset: int
    size: int


def visible_eventfds(view: "FlatView") -> tuple[tuple[IOEventFD, "FlatRange"], ...]:
    """The eventfds that a view shows, ascending, each with the range that shows it; not cropped to the range."""
    shown = []
    for flat in view.ranges:
        for eventfd in flat.region.eventfds:
            start = eventfd.address - flat.offset + flat.start
            if start < flat.end and start + max(eventfd.size, 1) > flat.start:
                shown.append((eventfd._replace(address=start), flat))
    return tuple(sorted(shown, key=lambda entry: entry[0]))


def visible_coalesced(flat: "FlatRange") -> tuple[tuple[int, int], ...]:
    """The coalesced parts of a range, cropped to it, as (address, size)."""
    shown = []
    for part in flat.region.coalesced:
        cropped = crop(flat, part)
        if cropped is not None:
            shown.append(cropped)
    return tuple(shown)


def crop(flat: "FlatRange", part: CoalescedRange) -> tuple[int, int] | None:
    """Where a range shows a coalesced part of its region, as (address, size); None if it does not."""
    low = max(part.offset, flat.offset)
    high = min(part.offset + part.size, flat.offset + flat.size)
    return (low - flat.offset + flat.start, high - low) if low < high else None

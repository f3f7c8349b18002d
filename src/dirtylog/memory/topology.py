"""What a commit tells listeners: the order is that of rules T1 to T6, and of E1 and E2 for eventfds."""

from dirtylog.memory.address_space import AddressSpace
from dirtylog.memory.dirty import Client
from dirtylog.memory.eventfd import CoalescedRange, IOEventFD, crop, visible_coalesced, visible_eventfds
from dirtylog.memory.flatview import FlatRange, FlatView, diff
from dirtylog.memory.listener import MemoryListener
from dirtylog.memory.listeners import Listeners
from dirtylog.memory.region import MemoryRegion


def tell_view(listeners: Listeners, space: AddressSpace, view: FlatView) -> None:
    """Tell an address space's listeners how its view changes, and replace it: all removals first, then the rest."""
    if view is space.view:
        return
    changes = diff(space.view, view)
    forward = listeners.forward(space)
    if forward:
        for flat in changes.removed:
            _tell_removed(listeners, space, flat, forward[::-1])
        for old, flat in changes.shown:
            if old is None:
                _tell_added(listeners, space, flat, forward)
            else:
                _tell_kept(listeners, space, old, flat, forward)
    space.view = view


def _tell_removed(listeners: Listeners, space: AddressSpace, flat: FlatRange, reverse: list[MemoryListener]) -> None:
    section = space.section(flat)
    for address, size in visible_coalesced(flat):
        for listener in reverse:
            listeners.tell(listener, listener.coalesced_io_del, section, address, size)
    for listener in reverse:
        listeners.tell(listener, listener.region_del, section)


def _tell_added(listeners: Listeners, space: AddressSpace, flat: FlatRange, forward: list[MemoryListener]) -> None:
    section = space.section(flat)
    for listener in forward:
        listeners.tell(listener, listener.region_add, section)
    for address, size in visible_coalesced(flat):
        for listener in forward:
            listeners.tell(listener, listener.coalesced_io_add, section, address, size)


def _tell_kept(
    listeners: Listeners, space: AddressSpace, old: FlatRange, new: FlatRange, forward: list[MemoryListener]
) -> None:
    section = space.section(new)
    for listener in forward:
        listeners.tell(listener, listener.region_nop, section)
    if new.logging == old.logging:
        return
    if new.logging & ~old.logging:
        for listener in forward:
            listeners.tell(listener, listener.log_start, section, old.logging, new.logging)
    if old.logging & ~new.logging:
        for listener in reversed(forward):
            listeners.tell(listener, listener.log_stop, section, old.logging, new.logging)


def tell_eventfds(listeners: Listeners, space: AddressSpace) -> None:
    """Tell which eventfds went and came since the last time: removals forward, additions in reverse, as QEMU does."""
    if not listeners.want_eventfds(space):
        space.eventfds = {}
        return
    forward = listeners.forward(space)
    now = dict(visible_eventfds(space.view))
    for eventfd, flat in space.eventfds.items():
        if eventfd not in now:
            for listener in forward:
                _tell_eventfd(listeners, listener, "eventfd_del", space, flat, eventfd)
    for eventfd, flat in now.items():
        if eventfd not in space.eventfds:
            for listener in reversed(forward):
                _tell_eventfd(listeners, listener, "eventfd_add", space, flat, eventfd)
    space.eventfds = now


def _tell_eventfd(
    listeners: Listeners,
    listener: MemoryListener,
    callback: str,
    space: AddressSpace,
    flat: FlatRange,
    eventfd: IOEventFD,
) -> None:
    section = space.piece(flat, eventfd.address, eventfd.size)
    listeners.tell(listener, getattr(listener, callback), section, eventfd.match_data, eventfd.data, eventfd.fd)


def tell_coalescing(
    listeners: Listeners, spaces: list[AddressSpace], region: MemoryRegion, part: CoalescedRange, *, added: bool
) -> None:
    """Tell of one coalesced part that came or went, wherever it can be seen."""
    for space in spaces:
        forward = listeners.forward(space)
        for flat in space.view.ranges:
            cropped = crop(flat, part) if flat.region is region else None
            if cropped is None:
                continue
            section = space.section(flat)
            for listener in forward if added else reversed(forward):
                callback = listener.coalesced_io_add if added else listener.coalesced_io_del
                listeners.tell(listener, callback, section, *cropped)


def replay(listeners: Listeners, listener: MemoryListener, space: AddressSpace, *, tracking: bool) -> None:
    """Tell a new listener all that is there (T5)."""
    tell = listeners.tell
    tell(listener, listener.begin)
    if tracking:
        tell(listener, listener.log_global_start)
    for flat in space.view.ranges:
        section = space.section(flat)
        tell(listener, listener.region_add, section)
        for address, size in visible_coalesced(flat):
            tell(listener, listener.coalesced_io_add, section, address, size)
        if flat.logging:
            tell(listener, listener.log_start, section, Client(0), flat.logging)
    for eventfd, flat in space.eventfds.items():
        _tell_eventfd(listeners, listener, "eventfd_add", space, flat, eventfd)
    tell(listener, listener.commit)


def replay_removal(listeners: Listeners, listener: MemoryListener, space: AddressSpace) -> None:
    """Tell a listener that leaves that all is gone (T5)."""
    tell = listeners.tell
    tell(listener, listener.begin)
    for flat in space.view.ranges:
        section = space.section(flat)
        if flat.logging:
            tell(listener, listener.log_stop, section, flat.logging, Client(0))
        for address, size in visible_coalesced(flat):
            tell(listener, listener.coalesced_io_del, section, address, size)
        tell(listener, listener.region_del, section)
    for eventfd, flat in space.eventfds.items():
        _tell_eventfd(listeners, listener, "eventfd_del", space, flat, eventfd)
    tell(listener, listener.commit)

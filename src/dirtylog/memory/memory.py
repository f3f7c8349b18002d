"""One machine's memory: its address spaces, its listeners, and why writes are logged."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntFlag

from dirtylog.errors import UsageError
from dirtylog.memory.address_space import AddressSpace
from dirtylog.memory.block import RAMBlock
from dirtylog.memory.flatview import ADDRESS_SPACE_SIZE, FlatRange, FlatView, diff
from dirtylog.memory.listener import MemoryListener, offers
from dirtylog.memory.region import MemoryRegion
from dirtylog.memory.section import MemoryRegionSection


class TrackingReason(IntFlag):
    """Why all migratable RAM is logged."""

    MIGRATION = 1
    DIRTY_RATE = 2
    DIRTY_LIMIT = 4


class Memory:
    """The blocks, regions, address spaces and listeners of one machine. Two of them never meet.

    Changes happen in transactions; the outermost one, when it ends, compares each address space with what it was and
    tells the listeners. One re-entrant lock covers topology and every callback; page contents are read and written
    without it.

    Attributes:
        blocks: the RAM blocks by name, in the order they were made.
        tracking: why all RAM is logged; empty when it is not.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, RAMBlock] = {}
        self.tracking = TrackingReason(0)
        self._regions: list[MemoryRegion] = []
        self._address_spaces: list[AddressSpace] = []
        self._listeners: list[tuple[MemoryListener, AddressSpace]] = []
        self._lock = threading.RLock()
        self._depth = 0
        self._pending = False

    def close(self) -> None:
        """Give up all blocks; idempotent. Machines that use them are closed first."""
        with self._lock:
            for block in self.blocks.values():
                block.close()

    def ram(self, name: str, size: int) -> MemoryRegion:
        """A RAM region with a new block of the same name.

        Raises:
            UsageError: the name is taken, or the size is not a positive whole number of pages.
            HostError: the host cannot map that much.
        """
        with self._lock:
            if name in self.blocks:
                raise UsageError(f"there is a RAM block named {name!r} already")
            block = RAMBlock(name, size)
            region = MemoryRegion(self, name, size, block=block)
            self.blocks[name] = block
            self._regions.append(region)
            return region

    def container(self, name: str, size: int = ADDRESS_SPACE_SIZE) -> MemoryRegion:
        """A region that only holds others."""
        if not 0 < size <= ADDRESS_SPACE_SIZE:
            raise UsageError(f"a container of {size} bytes")
        return MemoryRegion(self, name, size)

    def alias(self, name: str, target: MemoryRegion, offset: int, size: int) -> MemoryRegion:
        """A region that shows ``size`` bytes of another from ``offset``."""
        if target.memory is not self:
            raise UsageError(f"{target!r} belongs to another memory")
        if not 0 <= offset < ADDRESS_SPACE_SIZE or not 0 < size <= ADDRESS_SPACE_SIZE:
            raise UsageError(f"an alias of {size} bytes at {offset:#x} of {target!r}")
        return MemoryRegion(self, name, size, target=target, target_offset=offset)

    def address_space(self, name: str, root: MemoryRegion) -> AddressSpace:
        """A new address space that shows ``root``."""
        if root.memory is not self:
            raise UsageError(f"{root!r} belongs to another memory")
        with self.transaction():
            space = AddressSpace(self, name, root)
            self._address_spaces.append(space)
            self.topology_changed()
            return space

    @property
    def ram_regions(self) -> tuple[MemoryRegion, ...]:
        """All RAM regions, in the order they were made."""
        return tuple(self._regions)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group changes. Listeners hear of them once, when the outermost transaction ends."""
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._pending:
                    self._commit()

    def topology_changed(self) -> None:
        """Have the current transaction end with a commit. For regions; others have no use for it."""
        if not self._depth:
            raise UsageError("topology changes outside a transaction")
        self._pending = True

    def _commit(self) -> None:
        views = [(space, space.render()) for space in self._address_spaces]
        for listener in self._forward():
            listener.begin()
        for space, view in views:
            self._update(space, view)
        # Cleared before the commit callbacks: one of them may end a transaction of its own.
        self._pending = False
        for listener in self._forward():
            listener.commit()

    def _update(self, space: AddressSpace, view: FlatView) -> None:
        """Tell one address space's listeners how its view changes: all removals first, then the rest, ascending."""
        changes = diff(space.view, view)
        forward, reverse = self._forward(space), self._forward(space)[::-1]
        for flat in changes.removed:
            for listener in reverse:
                listener.region_del(space.section(flat))
        told: list[tuple[FlatRange, FlatRange | None]] = [(new, old) for old, new in changes.kept]
        told += [(flat, None) for flat in changes.added]
        for flat, old in sorted(told, key=lambda pair: pair[0].start):
            section = space.section(flat)
            for listener in forward:
                if old is None:
                    listener.region_add(section)
                else:
                    listener.region_nop(section)
            if old is not None:
                self._tell_logging(section, old, flat, forward)
        space.view = view

    @staticmethod
    def _tell_logging(
        section: MemoryRegionSection, old: FlatRange, new: FlatRange, forward: list[MemoryListener]
    ) -> None:
        if new.logging & ~old.logging:
            for listener in forward:
                listener.log_start(section, old.logging, new.logging)
        if old.logging & ~new.logging:
            for listener in reversed(forward):
                listener.log_stop(section, old.logging, new.logging)

    def register(self, listener: MemoryListener, space: AddressSpace) -> None:
        """Have a listener follow an address space, starting with all that is there now.

        Raises:
            UsageError: it follows one already, overrides both `log_sync` and `log_sync_global`, or the address space
                belongs to another memory.
        """
        if space.memory is not self:
            raise UsageError(f"the address space {space.name!r} belongs to another memory")
        if offers(listener, "log_sync") and offers(listener, "log_sync_global"):
            raise UsageError(f"{type(listener).__name__} offers both log_sync and log_sync_global")
        with self._lock:
            if any(known is listener for known, _ in self._listeners):
                raise UsageError(f"{type(listener).__name__} is registered already")
            listener.begin()
            if self.tracking:
                listener.log_global_start()
            for flat in space.view.ranges:
                section = space.section(flat)
                listener.region_add(section)
                if flat.logging:
                    listener.log_start(section, type(flat.logging)(0), flat.logging)
            listener.commit()
            place = (n for n, (known, _) in enumerate(self._listeners) if known.priority > listener.priority)
            self._listeners.insert(next(place, len(self._listeners)), (listener, space))

    def unregister(self, listener: MemoryListener) -> None:
        """Let a listener go, after telling it that all is gone; idempotent."""
        with self._lock:
            entry = next((entry for entry in self._listeners if entry[0] is listener), None)
            if entry is None:
                return
            space = entry[1]
            listener.begin()
            for flat in space.view.ranges:
                section = space.section(flat)
                if flat.logging:
                    listener.log_stop(section, flat.logging, type(flat.logging)(0))
                listener.region_del(section)
            listener.commit()
            self._listeners.remove(entry)

    def start_logging(self, reason: TrackingReason) -> None:
        """Log writes to all migratable RAM; each reason counts once.

        If a listener cannot, those told before it are told to stop, and its error is raised.

        Raises:
            UsageError: no reason was given.
        """
        if not reason:
            raise UsageError("memory cannot be logged without a reason")
        with self._lock:
            if not self.tracking:
                started: list[MemoryListener] = []
                for listener in self._forward():
                    try:
                        listener.log_global_start()
                    except BaseException:
                        for earlier in reversed(started):
                            earlier.log_global_stop()
                        raise
                    started.append(listener)
            self._set_tracking(self.tracking | reason)

    def stop_logging(self, reason: TrackingReason) -> None:
        """Take a reason back; writes are logged until the last one is gone.

        Raises:
            UsageError: that reason was not given.
        """
        if not reason:
            raise UsageError("logging cannot be stopped without a reason to take back")
        with self._lock:
            if reason & ~self.tracking:
                raise UsageError(f"memory is not logged for {reason!r}")
            self._set_tracking(self.tracking & ~reason)
            if not self.tracking:
                for listener in reversed(self._forward()):
                    listener.log_global_stop()

    def _set_tracking(self, tracking: TrackingReason) -> None:
        with self.transaction():
            changed = bool(tracking) != bool(self.tracking)
            self.tracking = tracking
            if changed:
                self.topology_changed()

    def sync_dirty_log(self, region: MemoryRegion | None = None, *, last_stage: bool = False) -> None:
        """Have every tracker merge what was written into the bitmaps of all clients that log; of one region, or all."""
        with self._lock:
            for listener, space in self._listeners:
                if offers(listener, "log_sync_global"):
                    listener.log_sync_global(last_stage)
                elif offers(listener, "log_sync"):
                    self._each_logged(space, region, listener.log_sync)

    def after_sync(self) -> None:
        """Tell all that bits were copied out and page contents are read next."""
        with self._lock:
            for listener in self._forward():
                listener.log_global_after_sync()

    def clear_dirty_bitmap(self, region: MemoryRegion, offset: int, size: int) -> None:
        """See `MemoryRegion.clear_dirty_bitmap`."""
        with self._lock:
            for listener, space in self._listeners:
                if offers(listener, "log_clear"):
                    self._each_logged(space, region, listener.log_clear, offset, offset + size)

    @staticmethod
    def _each_logged(
        space: AddressSpace,
        region: MemoryRegion | None,
        tell: Callable[[MemoryRegionSection], None],
        low: int = 0,
        high: int = ADDRESS_SPACE_SIZE,
    ) -> None:
        """Tell of each visible, logged piece of [low, high) of a region; of every region if None."""
        for flat in space.view.ranges:
            if not flat.logging or (region is not None and flat.region is not region):
                continue
            start, end = max(flat.offset, low), min(flat.offset + flat.size, high)
            if start < end:
                tell(MemoryRegionSection(flat.region, space, start, flat.start + start - flat.offset, end - start))

    def _forward(self, space: AddressSpace | None = None) -> list[MemoryListener]:
        return [listener for listener, followed in self._listeners if space is None or followed is space]

"""One machine's memory: its address spaces, its listeners, and why writes are logged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import STRICT, IntFlag

from dirtylog.errors import UsageError
from dirtylog.memory.access import MemoryRegionOps
from dirtylog.memory.address_space import AddressSpace
from dirtylog.memory.block import RAMBlock
from dirtylog.memory.description import MemoryDescription, describe
from dirtylog.memory.dirty import NOBODY, Client
from dirtylog.memory.eventfd import CoalescedRange, visible_eventfds
from dirtylog.memory.flatview import ADDRESS_SPACE_SIZE, FlatView, flat_root, render
from dirtylog.memory.listener import MemoryListener, offers
from dirtylog.memory.listeners import Listeners
from dirtylog.memory.lock import TopologyLock
from dirtylog.memory.region import MemoryRegion, check_offset, check_size
from dirtylog.memory.section import MemoryRegionSection
from dirtylog.memory.topology import replay, replay_removal, tell_coalescing, tell_eventfds, tell_view
from dirtylog.units import PAGE_SIZE, align_up


class TrackingReason(IntFlag, boundary=STRICT):
    """Why all migratable RAM is logged: for the dirty rate, by `Client.WATCH`; else by `Client.MIGRATION`."""

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
        code_client: whether translated code is kept of this memory, so that the code client logs all of it.
        flush: delivers coalesced writes; called before changes and before what else must see them delivered.
        code_written: for whoever keeps translations: told of pages of a region that the host wrote, the first and how
            many, once they are dirty for the code client. Whoever drops a page's translations clears its bit, so that
            a clear one says that there may be some.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, RAMBlock] = {}
        self.tracking = TrackingReason(0)
        self.flush: Callable[[], None] | None = None
        self.code_written: Callable[[MemoryRegion, int, int], None] | None = None
        self._code_client = False
        self._global_clients = NOBODY
        self._regions: list[MemoryRegion] = []
        self._address_spaces: list[AddressSpace] = []
        self._listeners = Listeners()
        self._lock = TopologyLock()
        self._depth = 0
        self._topology_pending = False
        self._eventfds_pending = False
        self._running = True
        self._postponed = TrackingReason(0)

    def close(self) -> None:
        """Give up all blocks; idempotent. Machines that use them are closed first."""
        with self._lock:
            for block in self.blocks.values():
                block.close()

    def ram(self, name: str, size: int, *, buffer: memoryview | None = None) -> MemoryRegion:
        """A RAM region with a new block of the same name: memory of its own, or a caller's buffer.

        Raises:
            UsageError: the name is taken, the size is not a positive whole number of pages, or the buffer is not
                writable, contiguous, page-aligned memory of that size.
            HostError: the host cannot map that much.
        """
        return self._with_block(name, RAMBlock(name, size, buffer), readonly=False, ops=None)

    def rom(self, name: str, content: bytes) -> MemoryRegion:
        """A region of memory that is not to be written; its last page is filled up with zeros."""
        return self._with_block(name, _filled(name, content), readonly=True, ops=None)

    def rom_device(self, name: str, content: bytes, ops: MemoryRegionOps) -> MemoryRegion:
        """A region that reads as memory, and whose writes go to callbacks; reads too while it is trapped."""
        return self._with_block(name, _filled(name, content), readonly=False, ops=ops)

    def mmio(self, name: str, size: int, ops: MemoryRegionOps) -> MemoryRegion:
        """A region whose accesses go to callbacks."""
        check_size(name, size)
        return MemoryRegion(self, name, size, ops=ops)

    def reservation(self, name: str, size: int) -> MemoryRegion:
        """A region that claims its addresses, and answers nothing."""
        check_size(name, size)
        return MemoryRegion(self, name, size, reserved=True)

    def container(self, name: str, size: int = ADDRESS_SPACE_SIZE) -> MemoryRegion:
        """A region that only holds others."""
        check_size(name, size)
        return MemoryRegion(self, name, size)

    def alias(self, name: str, target: MemoryRegion, offset: int, size: int) -> MemoryRegion:
        """A region that shows ``size`` bytes of another from ``offset``; past the other's end it shows nothing.

        Raises:
            UsageError: the target belongs to another memory, or a number is out of range.
        """
        if target.memory is not self:
            raise UsageError(f"{target!r} belongs to another memory")
        check_size(name, size)
        check_offset(name, offset)
        return MemoryRegion(self, name, size, target=target, target_offset=offset)

    def _with_block(self, name: str, block: RAMBlock, *, readonly: bool, ops: MemoryRegionOps | None) -> MemoryRegion:
        with self._lock:
            if name in self.blocks:
                block.close()
                raise UsageError(f"there is a RAM block named {name!r} already")
            region = MemoryRegion(self, name, block.size, block=block, readonly=readonly, ops=ops)
            self.blocks[name] = block
            self._regions.append(region)
            return region

    def discard(self, region: MemoryRegion) -> None:
        """Give a region's block up, and its name free.

        Raises:
            UsageError: the region has no block here, is shown somewhere, or is logged.
        """
        with self._lock:
            self._listeners.check_may_change()
            block = region.block
            if block is None or region not in self._regions:
                raise UsageError(f"{region!r} has no block in this memory")
            if any(flat.region is region for space in self._address_spaces for flat in space.view.ranges):
                raise UsageError(f"{region!r} is still shown", remedy="remove it, and what shows it, first")
            if region.logging:
                raise UsageError(
                    f"{region!r} is logged: {region.logging!r}",
                    remedy="end the migration or the display's logging first",
                )
            self._regions.remove(region)
            del self.blocks[block.name]
            block.close()

    def address_space(self, name: str, root: MemoryRegion) -> AddressSpace:
        """A new address space that shows ``root`` at address 0."""
        if root.memory is not self:
            raise UsageError(f"{root!r} belongs to another memory")
        with self.transaction():
            space = AddressSpace(self, name, root)
            self._address_spaces.append(space)
            self.topology_changed()
            return space

    def remove_address_space(self, space: AddressSpace) -> None:
        """Show nothing there any more: its listeners hear that all is gone, and are let go. Idempotent."""
        if space not in self._address_spaces:
            return
        try:
            with self.transaction():
                space.root = None
                self.topology_changed()
        finally:
            with self._lock:
                self._listeners.check_may_change()
                self._forget(space)

    def _forget(self, space: AddressSpace) -> None:
        with self._listeners.telling():
            for listener in self._listeners.forward(space):
                self._listeners.remove(listener)
                replay_removal(self._listeners, listener, space)
            self._address_spaces.remove(space)
            space.view = FlatView()

    @property
    def address_spaces(self) -> tuple[AddressSpace, ...]:
        """All address spaces, in the order they were made."""
        return tuple(self._address_spaces)

    @property
    def ram_regions(self) -> tuple[MemoryRegion, ...]:
        """All regions with a block, in the order they were made."""
        return tuple(self._regions)

    def is_wanted(self, reason: TrackingReason) -> bool:
        """Whether logging was started for a reason and not stopped, not even a stop that is postponed."""
        return reason in self.tracking & ~self._postponed

    @property
    def global_clients(self) -> Client:
        """The clients that log every region with a block."""
        return self._global_clients

    def _find_global_clients(self) -> None:
        # Kept, since each write by the host asks for them, and operations on flags take as long as the write.
        clients = Client.MIGRATION if self.tracking & ~TrackingReason.DIRTY_RATE else NOBODY
        if TrackingReason.DIRTY_RATE in self.tracking:
            clients |= Client.WATCH
        self._global_clients = clients | Client.CODE if self._code_client else clients

    def describe(self) -> MemoryDescription:
        """What there is, where it is shown, what is logged and how much of it is dirty."""
        with self._lock:
            return describe(self)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group changes. Listeners hear of them once, when the outermost transaction ends.

        Raises:
            UsageError: inside a listener's callback.
            Exception: what a listener's callback raised; the change was made, and the others heard of it.
        """
        self.flush_coalesced()
        with self._lock:
            self._listeners.check_may_change()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._commit()

    def flush_coalesced(self) -> None:
        """Have coalesced writes delivered, unless this thread is in the midst of a change.

        Delivery waits for devices' callbacks, and these may wait to change the memory: nobody may hold its lock then.
        """
        flush = self.flush
        if flush is not None and not self._lock.mine:
            flush()

    def topology_changed(self) -> None:
        """Have the current transaction end with a commit. For regions; others have no use for it."""
        self._check_in_transaction()
        self._topology_pending = True

    def eventfds_changed(self) -> None:
        """Have the current transaction end with telling of eventfds. For regions."""
        self._check_in_transaction()
        self._eventfds_pending = True

    def coalescing_changed(self, region: MemoryRegion, parts: tuple[CoalescedRange, ...], *, added: bool) -> None:
        """Tell of coalesced parts that came or went. For regions."""
        self._check_in_transaction()
        with self._listeners.telling():
            for part in parts:
                tell_coalescing(self._listeners, self._address_spaces, region, part, added=added)

    def _check_in_transaction(self) -> None:
        if not self._depth:
            raise UsageError("memory is changed outside a transaction", remedy="use 'with memory.transaction():'")

    def _commit(self) -> None:
        topology, eventfds = self._topology_pending, self._eventfds_pending
        self._topology_pending = self._eventfds_pending = False
        with self._listeners.telling():
            if topology:
                self._commit_topology()
            elif eventfds:
                for space in self._address_spaces:
                    tell_eventfds(self._listeners, space)

    def _commit_topology(self) -> None:
        views = self._render()
        for listener in self._listeners.forward():
            self._listeners.tell(listener, listener.begin)
        for space, view in views:
            tell_view(self._listeners, space, view)
            tell_eventfds(self._listeners, space)
        for listener in self._listeners.forward():
            self._listeners.tell(listener, listener.commit)

    def _render(self) -> list[tuple[AddressSpace, FlatView]]:
        """The view of each address space now. Those that show the same share one."""
        shared: dict[int, FlatView] = {}
        views = []
        for space in self._address_spaces:
            root = None if space.root is None else flat_root(space.root)
            if id(root) not in shared:
                shared[id(root)] = render(root)
            views.append((space, shared[id(root)]))
        return views

    def register(self, listener: MemoryListener, space: AddressSpace) -> None:
        """Have a listener follow an address space, starting with all that is there now.

        Raises:
            UsageError: it follows one already, overrides both `log_sync` and `log_sync_global`, or the address space
                belongs to another memory.
            Exception: a callback raised it; the listener is not registered, and was told that all is gone again.
        """
        if space.memory is not self or space not in self._address_spaces:
            raise UsageError(f"{space!r} belongs to another memory, or was removed")
        if offers(listener, "log_sync") and offers(listener, "log_sync_global"):
            raise UsageError(f"{type(listener).__name__} offers both log_sync and log_sync_global")
        with self._lock:
            self._listeners.check_may_change()
            if listener in self._listeners:
                raise UsageError(f"{type(listener).__name__} is registered already")
            if not self._listeners.want_eventfds(space):
                space.eventfds = dict(visible_eventfds(space.view))
            with self._listeners.telling():
                replay(self._listeners, listener, space, tracking=bool(self.tracking))
                if self._listeners.failed:
                    replay_removal(self._listeners, listener, space)
            self._listeners.add(listener, space)

    def unregister(self, listener: MemoryListener) -> None:
        """Let a listener go, after telling it that all is gone; idempotent."""
        with self._lock:
            self._listeners.check_may_change()
            space = self._listeners.space_of(listener)
            if space is None:
                return
            self._listeners.remove(listener)
            with self._listeners.telling():
                replay_removal(self._listeners, listener, space)

    def set_code_client(self, on: bool) -> None:
        """Log all memory for the code client: for machines that keep translations of what they run."""
        with self.transaction():
            if on is not self._code_client:
                self._code_client = on
                self._find_global_clients()
                self.topology_changed()

    def check_complete(self) -> None:
        """Refuse what would touch memory, or have a watch on it, while some of it is still to come.

        Raises:
            UsageError: it is, see `RAMBlock.fetch`.
        """
        if any(block.fetch is not None for block in self.blocks.values()):
            raise UsageError(
                "some of the memory has not arrived here yet", remedy="wait until its migration has completed"
            )

    def start_logging(self, reason: TrackingReason) -> None:
        """Log writes to all migratable RAM; each reason counts once.

        If a listener cannot, those told before it are told to stop, its error is raised, and nothing is logged for
        this reason.

        Raises:
            UsageError: no reason was given, a transaction is open, or some of the memory is still to come.
        """
        if not reason:
            raise UsageError("memory cannot be logged without a reason")
        self.check_complete()
        self.flush_coalesced()
        with self._lock:
            self._check_no_transaction()
            self._stop_postponed(keep=reason)
            before = self.tracking
            if not before:
                self._start_globally()
            try:
                self._set_tracking(before | reason)
            except BaseException:
                self._reduce_tracking(before)
                raise

    def _start_globally(self) -> None:
        started: list[MemoryListener] = []
        with self._listeners.telling():
            for listener in self._listeners.forward():
                try:
                    listener.log_global_start()
                except BaseException:
                    for earlier in reversed(started):
                        self._listeners.tell(earlier, earlier.log_global_stop)
                    raise
                started.append(listener)

    def stop_logging(self, reason: TrackingReason) -> None:
        """Take a reason back; writes are logged until the last one is gone.

        While the machine stands still, that waits until it runs again or logging is started anew: nothing is written
        meanwhile, and stopping costs time that a switchover does not have.

        Raises:
            UsageError: that reason was not given, or a transaction is open.
        """
        if not reason:
            raise UsageError("logging cannot be stopped without a reason to take back")
        self.flush_coalesced()
        with self._lock:
            self._check_no_transaction()
            if reason & ~self.tracking or reason & self._postponed:
                raise UsageError(f"memory is not logged for {reason!r}")
            self._postponed |= reason
            if self._running:
                self._stop_postponed()

    def set_running(self, running: bool) -> None:
        """Say whether the machine runs. For machines."""
        with self._lock:
            self._running = running
            if running:
                self._stop_postponed()

    def _stop_postponed(self, keep: TrackingReason | None = None) -> None:
        reason, self._postponed = self._postponed, TrackingReason(0)
        if keep is not None:
            reason &= ~keep
        if reason:
            self._reduce_tracking(self.tracking & ~reason)

    def _reduce_tracking(self, tracking: TrackingReason) -> None:
        try:
            self._set_tracking(tracking)
        finally:
            if not self.tracking:
                self._stop_globally()

    def _stop_globally(self) -> None:
        with self._listeners.telling():
            for listener in reversed(self._listeners.forward()):
                self._listeners.tell(listener, listener.log_global_stop)

    def _check_no_transaction(self) -> None:
        """Sections' log_start and log_stop come with a commit, in between what is told of the whole (T6)."""
        self._listeners.check_may_change()
        if self._depth:
            raise UsageError("logging cannot be started or stopped inside a transaction", remedy="end it first")

    def _set_tracking(self, tracking: TrackingReason) -> None:
        with self.transaction():
            clients = self.global_clients
            self.tracking = tracking
            self._find_global_clients()
            if self.global_clients != clients:
                self.topology_changed()

    def sync_dirty_log(self, region: MemoryRegion | None = None, *, last_stage: bool = False) -> None:
        """Have every tracker merge what was written into the bitmaps of all clients that log; of one region, or all."""
        with self._lock, self._listeners.telling():
            for listener, space in self._listeners.offering("log_sync", "log_sync_global"):
                if offers(listener, "log_sync_global"):
                    listener.log_sync_global(last_stage)
                    continue
                for section in _logged(space, region):
                    listener.log_sync(section)

    def after_sync(self) -> None:
        """Tell all that bits were copied out and page contents are read next."""
        with self._lock, self._listeners.telling():
            for listener in self._listeners.forward():
                listener.log_global_after_sync()

    def clear_dirty_bitmap(self, region: MemoryRegion, offset: int, size: int) -> None:
        """See `MemoryRegion.clear_dirty_bitmap`."""
        with self._lock, self._listeners.telling():
            for listener, space in self._listeners.offering("log_clear"):
                for section in _logged(space, region, offset, offset + size):
                    listener.log_clear(section)


def _logged(
    space: AddressSpace, region: MemoryRegion | None, low: int = 0, high: int = ADDRESS_SPACE_SIZE
) -> Iterator[MemoryRegionSection]:
    """Each visible, logged piece of [low, high) of a region; of every region if None."""
    for flat in space.view.ranges:
        if not flat.logging or (region is not None and flat.region is not region):
            continue
        start, end = max(flat.offset, low), min(flat.offset + flat.size, high)
        if start < end:
            yield space.piece(flat, flat.start + start - flat.offset, end - start)


def _filled(name: str, content: bytes) -> RAMBlock:
    if not content:
        raise UsageError(f"the ROM {name!r} is empty")
    block = RAMBlock(name, align_up(len(content), PAGE_SIZE))
    block.memory[: len(content)] = content
    return block

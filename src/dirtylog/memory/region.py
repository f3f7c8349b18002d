"""The tree that says what memory there is, and the only places where dirty bits are cleared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dirtylog.errors import UsageError
from dirtylog.memory.access import MemoryRegionOps
from dirtylog.memory.bitmap import PageBitmap, Words
from dirtylog.memory.block import RAMBlock
from dirtylog.memory.chunks import ClearChunks
from dirtylog.memory.dirty import NOBODY, Client, DirtySnapshot
from dirtylog.memory.eventfd import CoalescedRange, IOEventFD
from dirtylog.memory.flatview import ADDRESS_SPACE_SIZE
from dirtylog.units import PAGE_SIZE, page_span

if TYPE_CHECKING:
    from dirtylog.memory.memory import Memory

MAX_PRIORITY = (1 << 31) - 1


class MemoryRegion:
    """A node of the tree. `Memory` makes them.

    What it is follows from what it has: a block (RAM; ROM if read-only), a block and callbacks (ROM device), callbacks
    (MMIO), neither callbacks nor block but a claim (reservation), a target (alias), nothing (container).

    Attributes:
        memory: what it belongs to.
        name: for people, and for migration where there is a block.
        size: bytes, at most 2**64.
        block: the memory behind it, or None.
        ops: the callbacks of a device, or None.
        target: the region that it shows a part of, from ``target_offset``, if it is an alias.
        reserved: whether it claims its addresses without answering there.
        readonly: whether writes are refused, here and in all that is shown through it.
        enabled: whether it is shown at all.
        container: the region it is mapped in, or None.
        address: where in its container.
        priority: higher hides lower where siblings overlap; among equals, the one added last.
        eventfds: writes that signal instead of reaching the callbacks, ascending.
        coalesced: writes that may be delivered late.
    """

    def __init__(
        self,
        memory: "Memory",
        name: str,
        size: int,
        *,
        block: RAMBlock | None = None,
        ops: MemoryRegionOps | None = None,
        target: "MemoryRegion | None" = None,
        target_offset: int = 0,
        reserved: bool = False,
        readonly: bool = False,
    ) -> None:
        self.memory = memory
        self.name = name
        self.size = size
        self.block = block
        self.ops = ops
        self.target = target
        self.target_offset = target_offset
        self.reserved = reserved
        self.readonly = readonly
        self.enabled = True
        self.container: MemoryRegion | None = None
        self.address = 0
        self.priority = 0
        self.eventfds: tuple[IOEventFD, ...] = ()
        self.coalesced: tuple[CoalescedRange, ...] = ()
        self._trapped = False
        self._children: list[MemoryRegion] = []
        self._display_users = 0

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.name!r}, {self.kind} of {self.size:#x} bytes>"

    @property
    def kind(self) -> str:
        """What it is, for people."""
        if self.target is not None:
            return "alias"
        if self.block is not None:
            return "rom-device" if self.ops is not None else "rom" if self.readonly else "ram"
        return "mmio" if self.ops is not None else "reservation" if self.reserved else "container"

    @property
    def terminates(self) -> bool:
        """Whether it answers, or refuses to, where none of its children is."""
        return self.block is not None or self.ops is not None or self.reserved

    @property
    def direct(self) -> bool:
        """Whether its block may be read without a callback."""
        return self.block is not None and not self._trapped

    @property
    def children(self) -> tuple["MemoryRegion", ...]:
        """The regions mapped in this one, those that hide others first."""
        return tuple(self._children)

    def add(self, child: "MemoryRegion", address: int, *, priority: int = 0) -> None:
        """Map a region in this one.

        Raises:
            UsageError: it is mapped already, belongs to another memory, would contain itself, this is an alias, or the
                address is not in [0, 2**64).
        """
        if child.memory is not self.memory:
            raise UsageError(f"{child!r} belongs to another memory than {self!r}")
        if self.target is not None:
            raise UsageError(f"{self!r} is an alias and cannot contain others")
        _check_place(child, address, priority)
        with self.memory.transaction():
            if child.container is not None:
                raise UsageError(f"{child!r} is mapped in {child.container!r} already", remedy="remove it there first")
            if child.shows(self):
                raise UsageError(f"{child!r} would contain itself")
            self._changed(child)
            child.container, child.address, child.priority = self, address, priority
            self._insert(child)

    def remove(self, child: "MemoryRegion") -> None:
        """Take a region out of this one. What was written to it is collected first (D6), whoever logs it.

        Raises:
            UsageError: it is not mapped here.
        """
        with self.memory.transaction():
            if child.container is not self:
                raise UsageError(f"{child!r} is not mapped in {self!r}")
            self._changed(child)
            self._children.remove(child)
            child.container, child.address, child.priority = None, 0, 0

    def move(self, address: int, *, priority: int | None = None) -> None:
        """Map it elsewhere in its container; it comes before its siblings of equal priority then.

        Raises:
            UsageError: it is not mapped, or the address is not in [0, 2**64).
        """
        with self.memory.transaction():
            container = self.container
            if container is None:
                raise UsageError(f"{self!r} is not mapped anywhere", remedy="add it to a container")
            priority = self.priority if priority is None else priority
            _check_place(self, address, priority)
            if (address, priority) == (self.address, self.priority):
                return
            container._changed(self)
            self.address, self.priority = address, priority
            container._children.remove(self)
            container._insert(self)

    def set_enabled(self, enabled: bool) -> None:
        """Show it, or hide it and all that is shown through it."""
        if enabled is not self.enabled:
            with self._changing():
                self.enabled = enabled

    def set_readonly(self, readonly: bool) -> None:
        """Refuse writes, here and in all that is shown through it, or no longer."""
        if readonly is not self.readonly:
            with self._changing(only_if_enabled=True):
                self.readonly = readonly

    def set_size(self, size: int) -> None:
        """Show more or less. Not for regions with a block, whose size is the block's.

        Raises:
            UsageError: it has a block, or the size is not in (0, 2**64].
        """
        check_size(self.name, size)
        if self.block is not None:
            raise UsageError(f"{self!r} has the size of its block", remedy="show a part of it through an alias")
        if size != self.size:
            with self._changing():
                self.size = size

    def set_target_offset(self, offset: int) -> None:
        """Have an alias show its target from another offset.

        Raises:
            UsageError: it is no alias, or the offset is not in [0, 2**64).
        """
        if self.target is None:
            raise UsageError(f"{self!r} is not an alias")
        check_offset(self.name, offset)
        if offset != self.target_offset:
            with self._changing(only_if_enabled=True):
                self.target_offset = offset

    def set_trapped(self, trapped: bool) -> None:
        """Have reads of a ROM device go to its callbacks too, or to its block, as they do at first.

        Raises:
            UsageError: it is no ROM device.
        """
        if self.block is None or self.ops is None:
            raise UsageError(f"{self!r} is not a ROM device")
        if trapped is not self._trapped:
            with self._changing(only_if_enabled=True):
                self._trapped = trapped

    def add_eventfd(self, eventfd: IOEventFD) -> None:
        """Signal an eventfd at writes; ``eventfd.address`` is an offset here.

        Raises:
            UsageError: it is outside the region, of an impossible size, or there already.
        """
        fits = eventfd.address >= 0 and eventfd.address + max(eventfd.size, 1) <= self.size
        if not fits or eventfd.size not in (0, 1, 2, 4, 8) or eventfd.fd < 0:
            raise UsageError(f"an eventfd for {eventfd.size} bytes at {eventfd.address:#x} of {self!r}")
        if eventfd.match_data and not eventfd.size:
            raise UsageError("an eventfd for writes of any length cannot match data")
        if eventfd.match_data and not 0 <= eventfd.data < 1 << 8 * eventfd.size:
            raise UsageError(f"no write of {eventfd.size} bytes has the value {eventfd.data:#x}")
        with self.memory.transaction():
            if eventfd in self.eventfds:
                raise UsageError(f"{self!r} has that eventfd already")
            self.eventfds = tuple(sorted((*self.eventfds, eventfd)))
            self.memory.eventfds_changed()

    def remove_eventfd(self, eventfd: IOEventFD) -> None:
        """The reverse of `add_eventfd`.

        Raises:
            UsageError: it is not there.
        """
        with self.memory.transaction():
            if eventfd not in self.eventfds:
                raise UsageError(f"{self!r} has no such eventfd")
            self.eventfds = tuple(other for other in self.eventfds if other != eventfd)
            self.memory.eventfds_changed()

    def add_coalescing(self, offset: int, size: int) -> None:
        """Allow writes to a range to be delivered late, in order.

        Raises:
            UsageError: the range is empty or not in the region.
        """
        if size <= 0 or offset < 0 or offset + size > self.size:
            raise UsageError(f"[{offset:#x}, {offset + size:#x}) of {self!r} cannot be coalesced")
        part = CoalescedRange(offset, size)
        with self.memory.transaction():
            self.coalesced += (part,)
            self.memory.coalescing_changed(self, (part,), added=True)

    def clear_coalescing(self) -> None:
        """Have all writes delivered at once again; those under way are delivered first."""
        with self.memory.transaction():
            gone, self.coalesced = self.coalesced, ()
            self.memory.coalescing_changed(self, gone, added=False)

    def shows(self, other: "MemoryRegion") -> bool:
        """Whether another region is this one, or is reached from it through children and aliases."""
        left, seen = [self], {self}
        while left:
            region = left.pop()
            if region is other:
                return True
            inner = region._children if region.target is None else [region.target]
            left += [found for found in inner if found not in seen]
            seen.update(inner)
        return False

    def _insert(self, child: "MemoryRegion") -> None:
        place = (n for n, sibling in enumerate(self._children) if sibling.priority <= child.priority)
        self._children.insert(next(place, len(self._children)), child)

    def _changed(self, child: "MemoryRegion") -> None:
        """Have the transaction end with a commit, if a change of a child can be seen."""
        if self.enabled and child.enabled:
            self.memory.topology_changed()

    @contextmanager
    def _changing(self, *, only_if_enabled: bool = False) -> Iterator[None]:
        """A transaction that ends with a commit, if the change can be seen."""
        with self.memory.transaction():
            yield
            if self.enabled or not only_if_enabled:
                self.memory.topology_changed()

    @property
    def logging(self) -> Client:
        """The clients for which writes to this region are logged now."""
        if self.block is None:
            return NOBODY
        clients = self.memory.global_clients
        return clients | Client.DISPLAY if self._display_users else clients

    def start_logging_display(self) -> None:
        """Log writes for the display; counted, so two framebuffers in one region do not switch each other off."""
        self._ram()
        self.memory.check_complete()
        with self.memory.transaction():
            self._display_users += 1
            if self._display_users == 1:
                self.memory.topology_changed()

    def stop_logging_display(self) -> None:
        """The reverse of `start_logging_display`.

        Raises:
            UsageError: it was not started.
        """
        with self.memory.transaction():
            if not self._display_users:
                raise UsageError(f"the display does not log {self!r}")
            self._display_users -= 1
            if not self._display_users:
                self.memory.topology_changed()

    def set_dirty(self, offset: int, size: int) -> None:
        """Note a write by the host itself. Call it after the bytes are in place: a sync in between would miss them."""
        clients = self.logging
        if clients:
            block, first, count = self._pages(offset, size)
            block.dirty.mark(first, count, clients)
            told = self.memory.code_written
            if told is not None and Client.CODE in clients:
                told(self, first, count)
        else:
            self._ram()

    def merge_dirty(self, words: Words, first: int, count: int) -> None:
        """Note writes that a tracker collected: bit 0 of ``words`` is page ``first``; for all who log (D4)."""
        self._ram().dirty.merge(words, first, count, self.logging)

    def is_dirty(self, offset: int, size: int, client: Client) -> bool:
        """Whether any page touched by a range is dirty for a client, as far as it was synced."""
        block, first, count = self._pages(offset, size)
        return block.dirty.any(first, count, client)

    def count_dirty(self, offset: int, size: int, client: Client) -> int:
        """How many of the pages touched by a range are dirty for a client, as far as it was synced."""
        block, first, count = self._pages(offset, size)
        return block.dirty.count(client, first, count)

    def test_and_clear_dirty(self, offset: int, size: int, client: Client) -> bool:
        """Whether any page touched by a range was dirty for a client, clearing them. The first clear point."""
        _, first, count = self._pages(offset, size)
        if not count:
            return False
        with self._taking(first, count, client) as words:
            self.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)
        return bool(words.any())

    def snapshot_and_clear_dirty(self, offset: int, size: int, client: Client) -> DirtySnapshot:
        """Sync, then take the dirty pages touched by a range from a client. The second clear point."""
        _, first, count = self._pages(offset, size)
        self.memory.sync_dirty_log(self)
        with self._taking(first, count, client) as words:
            if count:
                self.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)
            self.memory.after_sync()
        return DirtySnapshot(first, PageBitmap(count, words))

    def harvest_dirty(
        self, into: PageBitmap, chunks: ClearChunks | None = None, *, client: Client = Client.MIGRATION
    ) -> int:
        """Move a client's dirty pages into its own bitmap of the block. The third clear point.

        With ``chunks`` the clear is postponed: whoever reads a page must first clear the chunks due for it.

        Returns:
            How many pages were not in ``into`` before.
        """
        block = self._ram()
        words = block.dirty.fetch_and_clear(0, block.pages, client)
        fresh = into.merge(words)
        # A chunk is due whether or not a bit was found: a page found dirty by an earlier sync may be unprotected still.
        if chunks is None:
            self.clear_dirty_bitmap(0, block.size)
        else:
            chunks.postpone(0, block.pages)
        return fresh

    def clear_dirty_bitmap(self, offset: int, size: int) -> None:
        """Tell every listener that has a ``log_clear``, once for each visible piece of a range of this region."""
        self.memory.clear_dirty_bitmap(self, offset, size)

    @contextmanager
    def _taking(self, first: int, count: int, client: Client) -> Iterator[Words]:
        """A client's dirty pages, cleared; put back if what follows fails."""
        dirty = self._ram().dirty
        words = dirty.fetch_and_clear(first, count, client)
        try:
            yield words
        except BaseException:
            dirty.merge(words, first, count, client)
            raise

    def _ram(self) -> RAMBlock:
        if self.block is None:
            raise UsageError(f"{self!r} is not RAM")
        return self.block

    def _pages(self, offset: int, size: int) -> tuple[RAMBlock, int, int]:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UsageError(f"[{offset:#x}, {offset + size:#x}) is not in {self!r}")
        return self._ram(), *page_span(offset, size)


def check_size(name: str, size: int) -> None:
    """Refuse a region size that is not in (0, 2**64]."""
    if not 0 < size <= ADDRESS_SPACE_SIZE:
        raise UsageError(f"the region {name!r} of {size} bytes", remedy="sizes are 1 to 2**64 bytes")


def check_offset(name: str, offset: int) -> None:
    """Refuse an offset that is not in [0, 2**64)."""
    if not 0 <= offset < ADDRESS_SPACE_SIZE:
        raise UsageError(f"the offset {offset:#x} in {name!r}", remedy="offsets are 0 to 2**64 - 1")


def _check_place(region: MemoryRegion, address: int, priority: int) -> None:
    if not 0 <= address < ADDRESS_SPACE_SIZE:
        raise UsageError(f"{region!r} cannot be mapped at {address:#x}")
    if not -MAX_PRIORITY - 1 <= priority <= MAX_PRIORITY:
        raise UsageError(f"the priority {priority} of {region!r}", remedy="priorities are signed 32-bit numbers")

"""The tree that says what memory there is, and the only places where dirty bits are cleared."""

from typing import TYPE_CHECKING

from dirtylog.errors import UsageError
from dirtylog.memory.bitmap import PageBitmap, Words
from dirtylog.memory.block import RAMBlock
from dirtylog.memory.chunks import ClearChunks
from dirtylog.memory.dirty import Client, DirtySnapshot
from dirtylog.units import PAGE_SIZE, page_span

if TYPE_CHECKING:
    from dirtylog.memory.memory import Memory


class MemoryRegion:
    """A node of the tree: RAM, an alias or a container. `Memory.ram`, `alias` and `container` make them.

    Attributes:
        memory: what it belongs to.
        name: for people, and for migration where there is a block.
        size: bytes, at most 2**64.
        block: the memory behind it, if it is RAM.
        target: the region that it shows a part of, from ``target_offset``, if it is an alias.
        container: the region it is mapped in, or None.
        address: where in its container.
        priority: higher hides lower where siblings overlap; among equals, the one added last.
    """

    def __init__(
        self,
        memory: "Memory",
        name: str,
        size: int,
        *,
        block: RAMBlock | None = None,
        target: "MemoryRegion | None" = None,
        target_offset: int = 0,
    ) -> None:
        self.memory = memory
        self.name = name
        self.size = size
        self.block = block
        self.target = target
        self.target_offset = target_offset
        self.container: MemoryRegion | None = None
        self.address = 0
        self.priority = 0
        self._children: list[MemoryRegion] = []
        self._display_users = 0

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.name!r} of {self.size:#x} bytes>"

    @property
    def children(self) -> tuple["MemoryRegion", ...]:
        """The regions mapped in this one, those that hide others first."""
        return tuple(self._children)

    def add(self, child: "MemoryRegion", address: int, *, priority: int = 0) -> None:
        """Map a region in this one.

        Raises:
            UsageError: it is mapped already, belongs to another memory, would contain itself, or the address is not
                in [0, 2**64).
        """
        if child.memory is not self.memory:
            raise UsageError(f"{child!r} belongs to another memory than {self!r}")
        if child.container is not None:
            raise UsageError(f"{child!r} is mapped in {child.container!r} already", remedy="remove it there first")
        if self.target is not None:
            raise UsageError(f"{self!r} is an alias and cannot contain others")
        if child.shows(self):
            raise UsageError(f"{child!r} would contain itself")
        if not 0 <= address < 1 << 64:
            raise UsageError(f"{child!r} cannot be mapped at {address:#x}")
        with self.memory.transaction():
            child.container, child.address, child.priority = self, address, priority
            place = (n for n, sibling in enumerate(self._children) if sibling.priority <= priority)
            self._children.insert(next(place, len(self._children)), child)
            self.memory.topology_changed()

    def remove(self, child: "MemoryRegion") -> None:
        """Take a region out of this one.

        Raises:
            UsageError: it is not mapped here.
        """
        if child.container is not self:
            raise UsageError(f"{child!r} is not mapped in {self!r}")
        with self.memory.transaction():
            self._children.remove(child)
            child.container, child.address, child.priority = None, 0, 0
            self.memory.topology_changed()

    def shows(self, other: "MemoryRegion") -> bool:
        """Whether another region is this one, or is reached from it through children and aliases."""
        if self is other or (self.target is not None and self.target.shows(other)):
            return True
        return any(child.shows(other) for child in self._children)

    @property
    def logging(self) -> Client:
        """The clients for which writes to this region are logged now."""
        clients = Client(0)
        if self.block is not None:
            if self._display_users:
                clients |= Client.DISPLAY
            if self.memory.tracking:
                clients |= Client.MIGRATION
        return clients

    def start_logging_display(self) -> None:
        """Log writes for the display; counted, so two framebuffers in one region do not switch each other off."""
        with self.memory.transaction():
            self._display_users += 1
            if self._display_users == 1:
                self.memory.topology_changed()

    def stop_logging_display(self) -> None:
        """The reverse of `start_logging_display`.

        Raises:
            UsageError: it was not started.
        """
        if not self._display_users:
            raise UsageError(f"the display does not log {self!r}")
        with self.memory.transaction():
            self._display_users -= 1
            if not self._display_users:
                self.memory.topology_changed()

    def set_dirty(self, offset: int, size: int) -> None:
        """Note a write by the host itself. Call it after the bytes are in place: a sync in between would miss them."""
        block, first, count = self._pages(offset, size)
        block.dirty.mark(first, count, self.logging)

    def merge_dirty(self, words: Words, first: int, count: int) -> None:
        """Note writes that a tracker collected: bit 0 of ``words`` is page ``first``; for all who log (D4)."""
        self._ram().dirty.merge(words, first, count, self.logging)

    def is_dirty(self, offset: int, size: int, client: Client) -> bool:
        """Whether any page touched by a range is dirty for a client, as far as it was synced."""
        block, first, count = self._pages(offset, size)
        return block.dirty.any(first, count, client)

    def test_and_clear_dirty(self, offset: int, size: int, client: Client) -> bool:
        """Whether any page touched by a range was dirty for a client, clearing them. The first clear point."""
        block, first, count = self._pages(offset, size)
        if not count:
            return False
        words = block.dirty.fetch_and_clear(first, count, client)
        self.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)
        return bool(words.any())

    def snapshot_and_clear_dirty(self, offset: int, size: int, client: Client) -> DirtySnapshot:
        """Sync, then take the dirty pages touched by a range from a client. The second clear point."""
        block, first, count = self._pages(offset, size)
        self.memory.sync_dirty_log(self)
        words = block.dirty.fetch_and_clear(first, count, client)
        if count:
            self.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)
        self.memory.after_sync()
        return DirtySnapshot(first, PageBitmap(count, words))

    def harvest_dirty(self, into: PageBitmap, chunks: ClearChunks | None = None) -> int:
        """Move migration's dirty pages into its own bitmap of the block. The third clear point.

        With ``chunks`` the clear is postponed: whoever reads a page must first clear the chunks due for it.

        Returns:
            How many pages were not in ``into`` before.
        """
        block = self._ram()
        words = block.dirty.fetch_and_clear(0, block.pages, Client.MIGRATION)
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

    def _ram(self) -> RAMBlock:
        if self.block is None:
            raise UsageError(f"{self!r} is not RAM")
        return self.block

    def _pages(self, offset: int, size: int) -> tuple[RAMBlock, int, int]:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UsageError(f"[{offset:#x}, {offset + size:#x}) is not in {self!r}")
        return self._ram(), *page_span(offset, size)

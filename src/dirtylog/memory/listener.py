"""How others follow what happens to an address space."""

from dirtylog.memory.dirty import Client
from dirtylog.memory.section import MemoryRegionSection


class MemoryListener:
    """Told what changes in one address space, and asked for its dirty log. Override what you need.

    Callbacks run under the memory's topology lock. ``priority`` orders listeners: starts and additions reach low
    numbers first, stops and removals reach them last. A listener overrides at most one of `log_sync` and
    `log_sync_global`. One that offers no `log_clear` clears what it reports, as kernels without manual protection do.
    """

    priority: int = 0

    def begin(self) -> None:
        """A change of topology is about to be told."""

    def commit(self) -> None:
        """The change was told in full."""

    def region_add(self, section: MemoryRegionSection) -> None:
        """A section appeared. Its region may be logged already: no `log_start` follows for that."""

    def region_del(self, section: MemoryRegionSection) -> None:
        """A section disappears. Dirt that was not collected yet is to be merged now."""

    def region_nop(self, section: MemoryRegionSection) -> None:
        """A section stayed as it was."""

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """The clients that log a section grew from ``old`` to ``new``."""

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """The clients that log a section shrank from ``old`` to ``new``."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        """Merge what was written to a section, since it was last cleared, into the clients' bitmaps."""

    def log_sync_global(self, last_stage: bool) -> None:
        """Do what `log_sync` does for the whole address space at once.

        ``last_stage``: whether writers stand still and this is the last chance to hear of their writes.
        """

    def log_clear(self, section: MemoryRegionSection) -> None:
        """Have further writes to these pages, whose log was collected and is about to be acted on, reported anew."""

    def log_global_start(self) -> None:
        """All migratable RAM is to be logged. May raise: then logging does not start."""

    def log_global_stop(self) -> None:
        """The reason for `log_global_start` is gone."""

    def log_global_after_sync(self) -> None:
        """Collected bits were copied out; page contents are read next."""

    def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        """Writes to the section (of ``data``, if it has to match) are to signal ``eventfd``."""

    def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        """The reverse of `eventfd_add`."""

    def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
        """Writes to [address, address + size) may be delivered late, in order."""

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        """The reverse of `coalesced_io_add`."""


def offers(listener: MemoryListener, callback: str) -> bool:
    """Whether a listener overrides a callback."""
    return getattr(type(listener), callback) is not getattr(MemoryListener, callback)

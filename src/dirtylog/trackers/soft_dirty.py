"""Writes to this process's memory, noted in the soft-dirty bits of its page tables (CONFIG_MEM_SOFT_DIRTY).

The bits are cleared for the whole process at once, and by anybody in it. So one log serves a process: whenever one
watcher collects, what all others have yet to hear is put aside for them before the bits are cleared.

Between the reading of the bits and their clearing the kernel has no lock to offer: what another thread writes then, for
the first time since the last clearing, is forgotten. So each watcher says how its writers are held meanwhile, as
machines can be; the caller's own threads hold still of themselves, or another mechanism must be used.

Private memory that the kernel merges with a mapping made next to it counts as written whole, as new mappings do.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Final

from dirtylog.errors import HostError, LostMappingError, UsageError
from dirtylog.linux.mapping import is_mapped
from dirtylog.linux.pagemap import Pagemap, clear_soft_dirty, has_soft_dirty
from dirtylog.linux.process import MadeBy
from dirtylog.memory import PageBitmap, Words
from dirtylog.units import PAGE_SIZE

Hold = Callable[[], AbstractContextManager[object]]
"""Keeps the writers of some memory still while the context is entered."""


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    address: int
    pending: PageBitmap
    hold: Hold


class SoftDirtyLog:
    """The soft-dirty bits of this process. There must be one only: ask `soft_dirty_log`.

    Raises:
        HostError: the kernel keeps no such bits.
    """

    def __init__(self) -> None:
        if not has_soft_dirty():
            raise HostError(
                "this kernel keeps no soft-dirty bits, or does not let this process clear them",
                remedy="use a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's are, or write-watch",
            )
        self._made_by = MadeBy()
        self._lock = threading.Lock()
        self._watched: dict[object, _Watched] = {}

    def watch(self, key: object, address: int, pages: int, hold: Hold) -> None:
        """Note what is written to a range from here on. Ranges may overlap; ``key`` names this one."""
        self._made_by.check("a soft-dirty log")
        with self._lock:
            self._put_aside(hold)
            self._watched[key] = _Watched(address, PageBitmap(pages), hold)

    def fetch(self, key: object) -> Words:
        """The pages of a range that were written since the last fetch, or since `watch`.

        Raises:
            LostMappingError: some of it is not mapped any more. What replaces it counts as written.
            ForkedError: this is a child of the process whose log it is.
        """
        self._made_by.check("a soft-dirty log")
        with self._lock:
            self._put_aside()
            watched = self._watched[key]
            if not is_mapped(watched.address, watched.pending.pages * PAGE_SIZE):
                raise LostMappingError(
                    f"some of the {watched.pending.pages} pages at {watched.address:#x} were unmapped or moved",
                    remedy="close the watch first, and watch the memory anew where it is then",
                )
            return watched.pending.fetch_and_clear()

    def unwatch(self, key: object) -> None:
        """Forget a range; idempotent. Takes no lock: garbage collection may call it while this thread holds that."""
        self._watched.pop(key, None)

    def _put_aside(self, *more: Hold) -> None:
        everything = list(self._watched.values())
        with ExitStack() as held, Pagemap() as pagemap:
            for hold in (*more, *(watched.hold for watched in everything)):
                held.enter_context(hold())
            for watched in everything:
                watched.pending.merge(pagemap.soft_dirty(watched.address, watched.pending.pages))
            clear_soft_dirty()


def soft_dirty_log() -> SoftDirtyLog:
    """The log of the calling process, made when it is first asked for.

    Raises:
        HostError: the kernel keeps no such bits.
    """
    this = MadeBy()
    log = _LOGS.get(this)
    return _LOGS.setdefault(this, SoftDirtyLog()) if log is None else log


_LOGS: Final[dict[MadeBy, SoftDirtyLog]] = {}
"""By process, since a child of fork inherits its parent's. State of the process, because the bits are: two logs in one
would lose each other's pages. Of threads that make one at the same time all get that which was entered first."""


class SoftDirtyTracker:
    """Watches memory of the own process; clears when it collects.

    Args:
        address: where the memory is, on a page boundary.
        pages: how many.
        hold: keeps its writers still.
    """

    def __init__(self, address: int, pages: int, hold: Hold = nullcontext) -> None:
        self._address = address
        self._pages = pages
        self._hold = hold
        self._log: SoftDirtyLog | None = None

    @property
    def pages(self) -> int:
        """The length of the range."""
        return self._pages

    def arm(self) -> None:
        """Join the process's log.

        Raises:
            HostError: the kernel keeps no such bits.
        """
        log = soft_dirty_log()
        log.watch(self, self._address, self._pages, self._hold)
        self._log = log

    def collect(self, words: Words) -> None:
        """Read the bits of all that is watched in this process, and clear them."""
        if self._log is None:
            raise UsageError("the tracker is not armed")
        words[:] = self._log.fetch(self)

    def clear(self, first: int, count: int, words: Words) -> None:
        """Nothing to do: collecting clears."""

    def disarm(self) -> None:
        """Leave the process's log."""
        log, self._log = self._log, None
        if log is not None:
            log.unwatch(self)

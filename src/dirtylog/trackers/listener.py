"""Any tracker as a memory listener."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Final

from dirtylog.errors import DirtylogError
from dirtylog.memory import Client, MemoryListener, MemoryRegionSection, PageBitmap
from dirtylog.memory.dirty import NOBODY
from dirtylog.trackers.tracked import TrackedRange
from dirtylog.trackers.tracker import Tracker
from dirtylog.units import PAGE_SIZE, page_span

EVERYBODY: Final = ~NOBODY

Attach = Callable[[MemoryRegionSection], Tracker | None]
"""Makes a section's memory accessible to whoever writes it, and gives its tracker; None for what is not tracked."""
Detach = Callable[[Tracker], None]
"""The reverse; the tracker is disarmed already."""
Hold = Callable[[], AbstractContextManager[object]]
"""Keeps writers from what is being changed while the context is entered."""


class _Section:
    """What one tracker watches: a section, or a whole block that ``shown`` sections show."""

    def __init__(self, section: MemoryRegionSection, tracker: Tracker, clients: Client) -> None:
        self._clients = clients
        self.region = section.region
        self.first = section.offset_within_region // PAGE_SIZE
        self.tracked = TrackedRange(tracker)
        self.shown = 1

    @property
    def logged(self) -> bool:
        return bool(self.region.logging & self._clients)

    def arm(self) -> None:
        if self.tracked.armed:
            # Another client joins. Writes to pages collected before and not cleared yet go unnoticed, so that the
            # next clear, made for a client that knows of those pages, would cost the new one its writes.
            self._report(self.tracked.collected)
        else:
            self.tracked.arm()

    def disarm(self) -> None:
        if not self.tracked.armed:
            return
        try:
            if self.logged:  # it is the mapping that goes away
                self.sync()
        except BaseException:
            self._report_all()
            raise
        finally:
            self.tracked.disarm()

    def sync(self) -> None:
        if self.tracked.armed:
            self._report(self.tracked.collect())
        elif self.logged:  # arming failed: any page may have been written
            self._report_all()

    def clear(self, first: int, count: int) -> None:
        """Clear a range of the region's pages, as far as it lies here."""
        self.tracked.clear(first - self.first, count)

    def _report_all(self) -> None:
        everything = PageBitmap(self.tracked.pages)
        everything.set()
        self._report(everything)

    def _report(self, found: PageBitmap) -> None:
        self.region.merge_dirty(found.words, self.first, found.pages)


class TrackerListener(MemoryListener):
    """Gives each section a tracker, and merges what it collects when a subclass says so.

    Its lock covers each tracker call together with the cache and the merge, so that a clear never comes between a
    collect and its bookkeeping.

    What a commit removes and adds is done at its end, removals first. Writers are held meanwhile where an address is in
    both, since they would find nothing there in between, and where something logged goes or comes, since what they
    wrote between its last collect and its end, or before its tracker was armed, would be known to nobody.

    Args:
        attach: see `Attach`. Sections are cut to whole pages before.
        detach: see `Detach`.
        hold: keeps writers out while it is entered.
        whole_blocks: one tracker for each region's whole block, however many sections show how much of it: for
            mechanisms that watch the memory itself. What `attach` is given then is all of the region.
        clients: for whom to track; others hear of it when these log.
    """

    priority = 10

    def __init__(
        self,
        attach: Attach,
        detach: Detach,
        hold: Hold = nullcontext,
        *,
        whole_blocks: bool = False,
        clients: Client = EVERYBODY,
    ) -> None:
        self._clients = clients
        self._attach = attach
        self._detach = detach
        self._hold = hold
        self._whole_blocks = whole_blocks
        self._lock = threading.Lock()
        self._watched: dict[int, _Section] = {}
        self._going: list[MemoryRegionSection] = []
        self._coming: list[MemoryRegionSection] = []

    def region_add(self, section: MemoryRegionSection) -> None:
        """Note it for the end of the commit."""
        self._coming.append(section)

    def region_del(self, section: MemoryRegionSection) -> None:
        """Note it for the end of the commit."""
        self._going.append(section)

    def commit(self) -> None:
        """Collect from what goes for the last time (D6) and detach it, then attach what comes.

        Raises:
            Exception: what went wrong first; all other sections were detached and attached.
        """
        going, self._going = self._going, []
        coming, self._coming = self._coming, []
        logged = any(section.region.logging & self._clients for section in (*going, *coming))
        errors: list[Exception] = []
        with ExitStack() as held:
            if logged or _overlap(going, coming):
                try:
                    held.enter_context(self._hold())
                except DirtylogError as failure:  # what was told must be done all the same: it is not told again
                    errors.append(failure)
            errors += [error for section in going if (error := self._try(self._remove, section)) is not None]
            errors += [error for section in coming if (error := self._try(self._add, section)) is not None]
        if errors:
            raise errors[0]

    def _try(self, action: Callable[[MemoryRegionSection], None], section: MemoryRegionSection) -> Exception | None:
        try:
            action(section)
        except Exception as error:  # noqa: BLE001 - raised at the end, so that the other sections are seen to first
            return error
        return None

    def _key(self, section: MemoryRegionSection) -> int:
        return id(section.region) if self._whole_blocks else section.offset_within_address_space

    def _remove(self, section: MemoryRegionSection) -> None:
        key = self._key(section)
        with self._lock:
            going = self._watched.get(key)
            if going is None:
                return
            going.shown -= 1
            if not going.shown:
                del self._watched[key]
                try:
                    going.disarm()
                finally:
                    self._detach(going.tracked.tracker)

    def _add(self, section: MemoryRegionSection) -> None:
        key = self._key(section)
        if self._whole_blocks and key in self._watched:
            self._watched[key].shown += 1
            return
        pages = _whole_region(section) if self._whole_blocks else section.whole_pages()
        tracker = None if pages is None else self._attach(pages)
        if pages is not None and tracker is not None:
            with self._lock:
                added = self._watched[key] = _Section(pages, tracker, self._clients)
                if added.logged:
                    added.arm()

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """Arm, if nobody logged before; else tell those who join of what was collected and not cleared."""
        del old
        if new & self._clients:
            self._with(section, _Section.arm)

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """Disarm, if nobody logs any more. If it is this listener that leaves, that waits for `commit`."""
        del old
        if not (new | section.region.logging) & self._clients:
            self._with(section, _Section.disarm)

    def _with(self, section: MemoryRegionSection, action: Callable[[_Section], None]) -> None:
        with self._lock:
            watched = self._watched.get(self._key(section))
            if watched is not None:
                action(watched)


class ClearingTrackerListener(TrackerListener):
    """For trackers that clear when they collect: offers `log_sync` only."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        """Collect a whole tracked range, and merge it."""
        self._with(section, _Section.sync)


class SplitTrackerListener(ClearingTrackerListener):
    """For trackers whose collect leaves pages unprotected until they are cleared."""

    def log_clear(self, section: MemoryRegionSection) -> None:
        """Clear those pages of a section that were collected."""
        first, count = page_span(section.offset_within_region, section.size)
        with self._lock:
            for watched in self._watched.values():
                if watched.region is section.region:
                    watched.clear(first, count)


class GlobalTrackerListener(TrackerListener):
    """For trackers that share a log, which is collected for all of them at once: offers `log_sync_global`.

    Writers are held for a moment before, so that what the hardware has noted but not logged yet is in the log.
    """

    def log_sync_global(self, last_stage: bool) -> None:
        """Collect everything that is tracked, and merge it."""
        del last_stage
        with self._hold():
            pass
        with self._lock:
            for watched in self._watched.values():
                watched.sync()


def tracker_listener(
    attach: Attach,
    detach: Detach,
    hold: Hold = nullcontext,
    *,
    clears_on_collect: bool,
    whole_blocks: bool = False,
    clients: Client = EVERYBODY,
) -> TrackerListener:
    """The listener that suits a mechanism whose ranges are collected one by one."""
    kind = ClearingTrackerListener if clears_on_collect else SplitTrackerListener
    return kind(attach, detach, hold, whole_blocks=whole_blocks, clients=clients)


def _whole_region(section: MemoryRegionSection) -> MemoryRegionSection | None:
    """All of the region that a section shows, if that is memory."""
    if section.region.block is None or not section.direct:
        return None
    return replace(section, offset_within_region=0, offset_within_address_space=0, size=section.region.size)


def _overlap(going: list[MemoryRegionSection], coming: list[MemoryRegionSection]) -> bool:
    """Whether any address is in both; each list ascends and has no overlaps of its own."""
    left, right = iter(going), iter(coming)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        if one.offset_within_address_space + one.size <= other.offset_within_address_space:
            one = next(left, None)
        elif other.offset_within_address_space + other.size <= one.offset_within_address_space:
            other = next(right, None)
        else:
            return True
    return False

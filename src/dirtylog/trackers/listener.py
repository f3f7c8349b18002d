"""Any tracker as a memory listener: keeps what was collected, so that only that is ever cleared.

A tracker's clear must never name a page that its last collect did not report: that page may have been written after
the collect, the clear would protect it again, and the write would be known to nobody. So each range has a cached
bitmap, the pages collected and not yet cleared. A clear passes on the bits that are 1 in the cache and lie in the
asked range, with the rest of the first and last word masked out, and then zeroes them in the cache: were they kept,
a second clear of the range would name pages again that may have been written since the first.

Pages that are collected but never cleared are reported again by every collect, and sent twice at worst.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import numpy as np

from dirtylog.errors import DirtylogError
from dirtylog.memory import Client, MemoryListener, MemoryRegionSection, PageBitmap
from dirtylog.trackers.tracker import Tracker, clear_window
from dirtylog.units import PAGE_SIZE, page_span

Attach = Callable[[MemoryRegionSection], Tracker | None]
"""Makes a section's memory accessible to whoever writes it, and gives its tracker; None for what is not tracked."""
Detach = Callable[[Tracker], None]
"""The reverse; the tracker is disarmed already."""
Hold = Callable[[], AbstractContextManager[object]]
"""Keeps writers from what is being changed while the context is entered."""


class _Range:
    """One tracked section: its tracker, the pages collected and not cleared yet, and whether it is armed."""

    def __init__(self, section: MemoryRegionSection, tracker: Tracker) -> None:
        self.region = section.region
        self.address = section.offset_within_address_space
        self.first = section.offset_within_region // PAGE_SIZE
        self.tracker = tracker
        self.collected = PageBitmap(tracker.pages)
        self.armed = False

    def arm(self) -> None:
        if self.armed:
            # Another client joins. Writes to pages collected before and not cleared yet go unnoticed, so that the
            # next clear, made for a client that knows of those pages, would cost the new one its writes.
            self._report(self.collected)
        else:
            self.tracker.arm()
            self.collected.clear()
            self.armed = True

    def disarm(self) -> None:
        if self.armed:
            try:
                if self.region.logging:  # it is the mapping that goes away
                    self.sync()
            except BaseException:
                self._report_all()
                raise
            finally:
                self.armed = False
                self.tracker.disarm()

    def sync(self) -> None:
        if self.armed:
            words = np.zeros_like(self.collected.words)
            self.tracker.collect(words)
            fresh = PageBitmap(self.collected.pages, words)  # masks the tail
            self.collected.merge(fresh.words)
            self._report(fresh)
        elif self.region.logging:  # arming failed: any page may have been written
            self._report_all()

    def _report_all(self) -> None:
        everything = PageBitmap(self.tracker.pages)
        everything.set(0, everything.pages)
        self._report(everything)

    def _report(self, found: PageBitmap) -> None:
        self.region.merge_dirty(found.words, self.first, found.pages)

    def clear(self, first: int, count: int) -> None:
        """Clear a range of the region's pages, as far as it lies here."""
        start = max(first - self.first, 0)
        end = min(first + count - self.first, self.collected.pages)
        if not self.armed or start >= end:
            return
        window = clear_window(self.collected.pages, start, end - start)
        wanted = PageBitmap(window.length)
        wanted.merge(self.collected.extract(start, end - start), window.skip, end - start)
        self.tracker.clear(window.first, window.length, wanted.words)
        self.collected.clear(start, end - start)


class TrackerListener(MemoryListener):
    """Gives each section a tracker and merges what it collects. Offers only `log_sync`: for trackers that clear then.

    Its lock covers each tracker call together with the cache and the merge, so that a clear never comes between a
    collect and its bookkeeping.

    What a commit removes and adds is done at its end, removals first. Writers are held meanwhile where an address is in
    both, since they would find nothing there in between, and where something logged goes, since what they wrote between
    its last collect and its end would be known to nobody.

    Args:
        attach: see `Attach`. Sections are cut to whole pages before.
        detach: see `Detach`.
        hold: keeps writers out while it is entered.
    """

    priority = 10

    def __init__(self, attach: Attach, detach: Detach, hold: Hold = nullcontext) -> None:
        self._attach = attach
        self._detach = detach
        self._hold = hold
        self._lock = threading.Lock()
        self._ranges: dict[int, _Range] = {}
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
        logged = any(section.region.logging for section in going)
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

    def _remove(self, section: MemoryRegionSection) -> None:
        with self._lock:
            gone = self._ranges.pop(section.offset_within_address_space, None)
            if gone is not None:
                try:
                    gone.disarm()
                finally:
                    self._detach(gone.tracker)

    def _add(self, section: MemoryRegionSection) -> None:
        pages = section.whole_pages()
        tracker = None if pages is None else self._attach(pages)
        if pages is not None and tracker is not None:
            with self._lock:
                added = self._ranges[section.offset_within_address_space] = _Range(pages, tracker)
                if section.region.logging:
                    added.arm()

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """Arm, if nobody logged before; else tell those who join of what was collected and not cleared."""
        del old, new
        self._with(section, _Range.arm)

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        """Disarm, if nobody logs any more. If it is this listener that leaves, that waits for `commit`."""
        del old
        if not new and not section.region.logging:
            self._with(section, _Range.disarm)

    def log_sync(self, section: MemoryRegionSection) -> None:
        """Collect a whole tracked range, and merge it."""
        self._with(section, _Range.sync)

    def _with(self, section: MemoryRegionSection, action: Callable[[_Range], None]) -> None:
        with self._lock:
            tracked = self._ranges.get(section.offset_within_address_space)
            if tracked is not None:
                action(tracked)


class SplitTrackerListener(TrackerListener):
    """For trackers whose collect leaves pages unprotected until they are cleared."""

    def log_clear(self, section: MemoryRegionSection) -> None:
        """Clear those pages of a section that were collected."""
        first, count = page_span(section.offset_within_region, section.size)
        address = section.offset_within_address_space
        with self._lock:
            for tracked in self._ranges.values():
                end = tracked.address + tracked.collected.pages * PAGE_SIZE
                if tracked.address < address + section.size and address < end:
                    tracked.clear(first, count)


def tracker_listener(
    attach: Attach, detach: Detach, hold: Hold = nullcontext, *, clears_on_collect: bool
) -> TrackerListener:
    """The listener that suits a mechanism."""
    return (TrackerListener if clears_on_collect else SplitTrackerListener)(attach, detach, hold)


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

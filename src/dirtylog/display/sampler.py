"""Which pages are written between one sample and the next, while the machine runs and perhaps migrates."""

import threading
import time
from typing import Self

from dirtylog.display.sample import Sample
from dirtylog.errors import ClosedError, UsageError
from dirtylog.memory import Client, Memory, PageBitmap, TrackingReason


class WriteSampler:
    """Tells any number of watchers of one memory which pages were written.

    They share one client of the dirty log, so that a migration and they do not take pages from each other (D4): whoever
    samples harvests for all, and each keeps the pages that it has not told of yet. All memory is logged from the first
    watcher to the last. One of these serves a memory.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._watchers: list[Watcher] = []

    def watch(self) -> "Watcher":
        """Begin to watch.

        Raises:
            UsageError: somebody else logs the memory for its dirty rate, whose pages this would take.
            DirtylogError: writes cannot be logged.
        """
        with self._lock:
            if not self._watchers:
                if self._memory.is_wanted(TrackingReason.DIRTY_RATE):
                    raise UsageError(
                        "the memory is watched by another sampler", remedy="share one, or wait for its end"
                    )
                self._memory.start_logging(TrackingReason.DIRTY_RATE)
            try:
                began = self._harvest()  # what is known already was written before this watcher's time
            except BaseException:
                self._stop_if_idle()
                raise
            blocks = {block.name: block.pages for block in self._memory.blocks.values()}
            watcher = Watcher(self, blocks, began)
            self._watchers.append(watcher)
            return watcher

    def sample(self, watcher: "Watcher") -> Sample:
        """See `Watcher.sample`."""
        with self._lock:
            if watcher not in self._watchers:
                raise ClosedError("the watch was closed")
            return watcher.take(self._harvest())

    def end(self, watcher: "Watcher") -> None:
        """See `Watcher.close`."""
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)
                self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if not self._watchers:
            self._memory.stop_logging(TrackingReason.DIRTY_RATE)

    def _harvest(self) -> float:
        """Give each watcher what was written since the last harvest; when this one began, by the monotonic clock."""
        now = time.monotonic()
        self._memory.sync_dirty_log()
        for region in self._memory.ram_regions:
            if region.block is None:
                continue
            found = PageBitmap(region.block.pages)
            try:
                region.harvest_dirty(found, client=Client.WATCH)
            finally:  # if the clear fails, the pages are nowhere else any more
                for watcher in self._watchers:
                    watcher.note(region.block.name, found)
        return now


class Watcher:
    """One watch of a memory; `WriteSampler.watch` makes them. Its methods may be called from any thread.

    Attributes:
        blocks: the RAM blocks it tells of, those there are when it begins: how many pages each name has.
    """

    def __init__(self, sampler: WriteSampler, blocks: dict[str, int], began: float) -> None:
        self.blocks = blocks
        self._sampler = sampler
        self._began = self._last = began
        self._pending = self._nothing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def sample(self) -> Sample:
        """Which pages were written since the last sample, or since the start.

        A page that is written between the collection of the log and its clear counts to the interval that ends then.

        Raises:
            ClosedError: it was closed.
            DirtylogError: the log cannot be read; nothing is lost, and the next sample has it.
        """
        return self._sampler.sample(self)

    def close(self) -> None:
        """End the watch; idempotent."""
        self._sampler.end(self)

    def note(self, name: str, found: PageBitmap) -> None:
        """Keep what was harvested. For `WriteSampler`."""
        if name in self._pending:
            self._pending[name].merge(found.words)

    def take(self, now: float) -> Sample:
        """What was kept, up to a moment. For `WriteSampler`."""
        written, self._pending = self._pending, self._nothing()
        last, self._last = self._last, now
        return Sample(now - self._began, now - last, written)

    def _nothing(self) -> dict[str, PageBitmap]:
        return {name: PageBitmap(pages) for name, pages in self.blocks.items()}

"""The code client: which pages the host wrote, whose translations must be forgotten before the guest runs on."""

import threading
from collections.abc import Iterable, Iterator

from dirtylog.machine.unicorn.engine import MappedRAM
from dirtylog.memory import Client, MemoryRegion, PageBitmap
from dirtylog.units import PAGE_SIZE


class HostWrites:
    """Pages noted as the host writes them, and taken out before the guest runs.

    Taking them clears their bits of the code client. So such a bit, where it is clear, says that there may be
    translations of the page as it is now. The guest's own writes need no note: Unicorn sees them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: dict[MemoryRegion, PageBitmap] = {}

    def note(self, region: MemoryRegion, first: int, count: int) -> None:
        """The host wrote these pages of a region."""
        with self._lock:
            if region not in self._written:
                self._written[region] = PageBitmap(region.size // PAGE_SIZE)
            self._written[region].set(first, count)

    def take(self, ram: Iterable[MappedRAM]) -> list[tuple[int, int]]:
        """Where the guest sees what was written since the last call, as (start, end) of its addresses."""
        with self._lock:
            written, self._written = self._written, {}
        for region, pages in written.items():
            for first, count in pages.runs().tolist():
                region.test_and_clear_dirty(first * PAGE_SIZE, count * PAGE_SIZE, Client.CODE)
        return [piece for part in ram if part.region in written for piece in _shown(part, written[part.region])]


def _shown(part: MappedRAM, pages: PageBitmap) -> Iterator[tuple[int, int]]:
    """The pieces of what is mapped whose pages are set."""
    for first, count in pages.runs().tolist():
        low = max(first * PAGE_SIZE, part.offset)
        high = min((first + count) * PAGE_SIZE, part.offset + part.size)
        if low < high:
            yield part.start + low - part.offset, part.start + high - part.offset

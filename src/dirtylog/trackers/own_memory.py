"""Blocks of this process's memory, for machines whose writers are threads of this process."""

from collections.abc import Callable
from typing import Final

from dirtylog.memory import Client, MemoryRegionSection, RAMBlock
from dirtylog.trackers.comparison import Bytes
from dirtylog.trackers.listener import EVERYBODY, Hold, TrackerListener, tracker_listener
from dirtylog.trackers.soft_dirty import SoftDirtyTracker
from dirtylog.trackers.tracker import Tracker
from dirtylog.trackers.watch import TRACKERS as WATCH_TRACKERS

BlockTracker = Callable[[RAMBlock, Hold], Tracker]
"""Makes the tracker of a block; what it is given besides keeps the block's writers still while it is entered."""

_CLEARS_ON_COLLECT: Final = frozenset({"soft-dirty"})


def _of_memory(make: Callable[[Bytes], Tracker]) -> BlockTracker:
    return lambda block, _: make(block.array)


TRACKERS: Final[dict[str, BlockTracker]] = {
    **{name: _of_memory(make) for name, make in WATCH_TRACKERS.items()},
    "soft-dirty": lambda block, hold: SoftDirtyTracker(block.mapping.address, block.pages, hold),
}
"""The mechanisms, by the names that `dirtylog.watch` takes."""


def own_memory_listener(name: str, hold: Hold, *, clients: Client = EVERYBODY) -> TrackerListener:
    """The listener that watches all RAM blocks that are shown.

    Args:
        name: one of `TRACKERS`.
        hold: keeps whoever writes them still while it is entered, also more than once at a time: for each block.
        clients: see `TrackerListener`.
    """

    def attach(section: MemoryRegionSection) -> Tracker | None:
        block = section.region.block
        return None if block is None else TRACKERS[name](block, hold)

    return tracker_listener(
        attach,
        _let_go,
        hold,
        clears_on_collect=name in _CLEARS_ON_COLLECT,
        whole_blocks=True,
        clients=clients,
    )


def _let_go(tracker: Tracker) -> None:
    del tracker

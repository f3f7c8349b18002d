"""Which mechanism tells what an emulated guest writes: it writes memory of this process, as any other thread does."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

from dirtylog.errors import HostError, UntrackableError, UsageError
from dirtylog.memory import Client, MemoryRegionSection, RAMBlock
from dirtylog.trackers import Tracker, TrackerListener, tracker_listener
from dirtylog.trackers.comparison import CopyTracker
from dirtylog.trackers.listener import Hold
from dirtylog.trackers.null import NullTracker
from dirtylog.trackers.soft_dirty import SoftDirtyTracker
from dirtylog.trackers.write_watch import WriteWatchTracker
from dirtylog.units import PAGE_SIZE

TRACKERS: Final[dict[str, Callable[[RAMBlock, Hold], Tracker]]] = {
    "write-watch": lambda block, _: WriteWatchTracker(block.mapping.address, block.pages),
    "soft-dirty": lambda block, hold: SoftDirtyTracker(block.mapping.address, block.pages, hold),
    "comparison": lambda block, _: CopyTracker(block.array),
    "null": lambda block, _: NullTracker(block.pages),
}
"""The mechanisms by name, the best first."""

_CLEARS_ON_COLLECT: Final = frozenset({"soft-dirty"})


def choose_tracker(wanted: str | None) -> str:
    """The wanted mechanism, or the best that this host has.

    Raises:
        UsageError: there is none of that name.
        HostError: this host does not have it.
    """
    if wanted is None:
        return next(name for name in TRACKERS if _failure(name) is None)
    if wanted not in TRACKERS:
        raise UsageError(f"there is no tracker {wanted!r}", remedy=f"choose from {', '.join(TRACKERS)}")
    failure = _failure(wanted)
    if failure is not None:
        raise failure
    return wanted


def guest_tracker_listener(name: str, hold: Hold) -> TrackerListener:
    """The listener that watches all RAM blocks that are shown; ``hold`` keeps the guest from running."""

    def attach(section: MemoryRegionSection) -> Tracker | None:
        block = section.region.block
        return None if block is None else TRACKERS[name](block, hold)

    return tracker_listener(
        attach,
        _let_go,
        hold,
        clears_on_collect=name in _CLEARS_ON_COLLECT,
        whole_blocks=True,
        clients=~Client.CODE,  # what the guest writes into its own code, Unicorn sees by itself
    )


def _failure(name: str) -> HostError | UntrackableError | None:
    """Why a mechanism does not work here; found out by using it."""
    block = RAMBlock("probe", PAGE_SIZE)
    try:
        tracker = TRACKERS[name](block, nullcontext)
        tracker.arm()
        tracker.disarm()
    except (HostError, UntrackableError) as failure:
        return failure
    finally:
        block.close()
    return None


def _let_go(tracker: Tracker) -> None:
    del tracker

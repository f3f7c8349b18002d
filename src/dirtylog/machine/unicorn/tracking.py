"""Which mechanism tells what an emulated guest writes: it writes memory of this process, as any other thread does."""

from contextlib import nullcontext
from typing import Final

from dirtylog.errors import HostError, UntrackableError, UsageError
from dirtylog.memory import RAMBlock
from dirtylog.trackers import own_memory
from dirtylog.units import PAGE_SIZE

TRACKERS: Final = ("write-watch", "soft-dirty", "comparison", "null")
"""The mechanisms by name, the best first."""


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


def _failure(name: str) -> HostError | UntrackableError | None:
    """Why a mechanism does not work here; found out by using it."""
    block = RAMBlock("probe", PAGE_SIZE)
    try:
        tracker = own_memory.TRACKERS[name](block, nullcontext)
        tracker.arm()
        tracker.disarm()
    except (HostError, UntrackableError) as failure:
        return failure
    finally:
        block.close()
    return None

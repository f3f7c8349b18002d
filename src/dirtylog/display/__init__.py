"""Showing memory while it is in use: which pages are written, when, and how many; live, and from a recorded trace."""

from dirtylog.display.dirty_rate import DirtyRate, DirtyRateMeter, RateMode, RateStatus
from dirtylog.display.history import WorkingSet, WriteHistory
from dirtylog.display.sample import Sample, pack, packed_bound, unpack
from dirtylog.display.sampler import Watcher, WriteSampler
from dirtylog.display.trace import TraceReader, TraceWriter

__all__ = [
    "DirtyRate",
    "DirtyRateMeter",
    "RateMode",
    "RateStatus",
    "Sample",
    "TraceReader",
    "TraceWriter",
    "Watcher",
    "WorkingSet",
    "WriteHistory",
    "WriteSampler",
    "pack",
    "packed_bound",
    "unpack",
]

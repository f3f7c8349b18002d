"""How Linux tells which pages were written: one module per mechanism, and one listener that adapts any of them."""

from dirtylog.trackers.comparison import ComparisonTracker, CopyTracker, HashTracker
from dirtylog.trackers.joined import JoinedTracker
from dirtylog.trackers.kvm_log import KVMLogMode, KVMLogTracker
from dirtylog.trackers.kvm_ring import DirtyRings, KVMRingTracker
from dirtylog.trackers.kvm_slot import MemorySlot
from dirtylog.trackers.listener import (
    ClearingTrackerListener,
    GlobalTrackerListener,
    SplitTrackerListener,
    TrackerListener,
    tracker_listener,
)
from dirtylog.trackers.null import NullTracker
from dirtylog.trackers.soft_dirty import SoftDirtyTracker
from dirtylog.trackers.tracked import TrackedRange
from dirtylog.trackers.tracker import ClearWindow, Tracker, clear_window
from dirtylog.trackers.write_watch import WriteWatchTracker

__all__ = [
    "ClearWindow",
    "ClearingTrackerListener",
    "ComparisonTracker",
    "CopyTracker",
    "DirtyRings",
    "GlobalTrackerListener",
    "HashTracker",
    "JoinedTracker",
    "KVMLogMode",
    "KVMLogTracker",
    "KVMRingTracker",
    "MemorySlot",
    "NullTracker",
    "SoftDirtyTracker",
    "SplitTrackerListener",
    "TrackedRange",
    "Tracker",
    "TrackerListener",
    "WriteWatchTracker",
    "clear_window",
    "tracker_listener",
]

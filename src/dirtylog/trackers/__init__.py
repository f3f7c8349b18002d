"""How Linux tells which pages were written: one module per mechanism, and one listener that adapts any of them."""

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
from dirtylog.trackers.tracked import TrackedRange
from dirtylog.trackers.tracker import ClearWindow, Tracker, clear_window

__all__ = [
    "ClearWindow",
    "ClearingTrackerListener",
    "DirtyRings",
    "GlobalTrackerListener",
    "JoinedTracker",
    "KVMLogMode",
    "KVMLogTracker",
    "KVMRingTracker",
    "MemorySlot",
    "SplitTrackerListener",
    "TrackedRange",
    "Tracker",
    "TrackerListener",
    "clear_window",
    "tracker_listener",
]

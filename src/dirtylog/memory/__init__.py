"""What memory is, where it is mapped, and what was written: QEMU's memory API."""

from dirtylog.memory.access import AccessSizes, MemoryRegionOps
from dirtylog.memory.address_space import AddressSpace
from dirtylog.memory.bitmap import Numbers, PageBitmap, Words
from dirtylog.memory.block import RAMBlock
from dirtylog.memory.chunks import ClearChunks
from dirtylog.memory.dirty import Client, DirtyMemory, DirtySnapshot
from dirtylog.memory.eventfd import CoalescedRange, IOEventFD
from dirtylog.memory.flatview import FlatRange, FlatView
from dirtylog.memory.listener import MemoryListener
from dirtylog.memory.memory import Memory, TrackingReason
from dirtylog.memory.region import MemoryRegion
from dirtylog.memory.section import MemoryRegionSection

__all__ = [
    "AccessSizes",
    "AddressSpace",
    "ClearChunks",
    "Client",
    "CoalescedRange",
    "DirtyMemory",
    "DirtySnapshot",
    "FlatRange",
    "FlatView",
    "IOEventFD",
    "Memory",
    "MemoryListener",
    "MemoryRegion",
    "MemoryRegionOps",
    "MemoryRegionSection",
    "Numbers",
    "PageBitmap",
    "RAMBlock",
    "TrackingReason",
    "Words",
]

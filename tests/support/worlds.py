"""What the tests of trackers run in: a memory, a listener under test, and a guest that writes."""

from collections.abc import Sequence
from typing import Protocol

from dirtylog.memory import AddressSpace, Memory, MemoryRegion
from dirtylog.trackers import KVMLogMode, TrackerListener


class World(Protocol):
    """See `support.model_tracker.ModelWorld` and `support.kvm.KVMWorld`."""

    mode: KVMLogMode
    memory: Memory
    ram: MemoryRegion
    root: MemoryRegion
    system: AddressSpace
    listener: TrackerListener

    def write(self, addresses: Sequence[int]) -> None:
        """Add 1 to the byte at each address, one after the other, as a guest does."""

    def close(self) -> None:
        """Take everything apart."""

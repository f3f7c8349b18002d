"""Dirty rings without KVM: the kernel's side of them, an entry at a time."""

from collections.abc import Callable
from typing import Final

import numpy as np

from dirtylog.errors import KernelError
from dirtylog.linux.kvm import VCPU, VM
from dirtylog.linux.kvm_abi import Capability, DirtyGFNFlag
from dirtylog.linux.kvm_ring import DIRTY_GFN, MIN_RING_ENTRIES

LIMIT: Final = 1 << 16
"""Entries that the kernel allows in a ring."""
RESERVED: Final = 64
"""Entries that should be left when a vCPU leaves the guest."""


class KernelRing:
    """What fills one ring, and empties it again. It does not care whether it overflows, as the kernel's does not.

    Attributes:
        dirty: how many entries it filled.
        reset: how many it emptied.
    """

    def __init__(self, size: int = MIN_RING_ENTRIES) -> None:
        self.entries = np.zeros(size, DIRTY_GFN)
        self.dirty = self.reset = 0

    @property
    def full(self) -> bool:
        """Whether its vCPU does not enter the guest."""
        assert self.reset <= self.dirty, "emptied what was never filled"
        return self.dirty - self.reset >= self.entries.size - min(RESERVED, self.entries.size // 4)

    def push(self, slot: int, *pages: int) -> None:
        """A vCPU writes."""
        for page in pages:
            self.entries[self.dirty % self.entries.size] = DirtyGFNFlag.DIRTY, slot, page
            self.dirty += 1

    def reset_some(self, most: int = LIMIT) -> int:
        """Empty entries that are marked, from the oldest up to the first that is not."""
        count = 0
        while count < most and self.entries[self.reset % self.entries.size]["flags"] == DirtyGFNFlag.RESET:
            self.entries[self.reset % self.entries.size]["flags"] = 0
            self.reset += 1
            count += 1
        return count


class RingVCPU(VCPU):
    """A vCPU that shares its ring, and has nothing else."""

    def __init__(self, ring: KernelRing) -> None:
        self.fd = -1
        self.ring = ring

    def map(self, page: int, size: int) -> memoryview:
        assert (page, size) == (64, self.ring.entries.nbytes)
        return self.ring.entries.data


class RingVM(VM):
    """A VM of a kernel that offers rings of up to `LIMIT` entries, by some of the two capabilities.

    Attributes:
        enabled: what was turned on, in bytes.
        rings: its vCPUs' rings.
        resets: how often entries were reset.
        before_reset: called right before.
        cuts: how many entries the next resets are cut short at.
        flags: what slots' flags were set to, in order.
        refuses: whether slots cannot be changed.
    """

    def __init__(self, *offered: Capability) -> None:
        self.offered = offered or (Capability.DIRTY_LOG_RING, Capability.DIRTY_LOG_RING_ACQ_REL)
        self.enabled: list[tuple[Capability, tuple[int, ...]]] = []
        self.rings: list[KernelRing] = []
        self.resets = 0
        self.before_reset: Callable[[], None] = lambda: None
        self.cuts: list[int] = []
        self.flags: list[tuple[int, int]] = []
        self.refuses = False

    def check(self, capability: Capability) -> int:
        return LIMIT * DIRTY_GFN.itemsize if capability in self.offered else 0

    def enable(self, capability: Capability, *args: int) -> None:
        self.enabled.append((capability, args))

    def reset_dirty_rings(self) -> int:
        self.resets += 1
        self.before_reset()
        left = most = self.cuts.pop(0) if self.cuts else LIMIT * len(self.rings)
        for ring in self.rings:
            left -= ring.reset_some(left)
        return most - left

    def set_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        if self.refuses:
            raise KernelError("KVM_SET_USER_MEMORY_REGION", 12, "no memory")
        self.flags.append((slot, flags))

"""KVM's dirty rings: each vCPU leaves the pages it wrote in one, until whoever collects them makes room.

The kernel fills entries in turn and marks them dirty. Who collects takes them in the same order and marks them for
reset; KVM_RESET_DIRTY_RINGS then protects their pages again and empties them. Shortly before a ring is full, its vCPU
leaves the guest (KVM_EXIT_DIRTY_RING_FULL), and does not get back in before there is room.
(Documentation/virt/kvm/api.rst, 8.29; Linux 5.11, commit fb04a1eddb1a.)

The kernel writes an entry's page before its flags, and reads the page after them. So here flags are read before pages,
and written after. x86 keeps loads in order, and stores after earlier loads, so that plain accesses do. Other processors
need acquire and release (KVM_CAP_DIRTY_LOG_RING_ACQ_REL), which numpy does not have.
"""

import platform
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import HostError, UsageError
from dirtylog.linux import kvm_abi as abi
from dirtylog.linux.kvm import VCPU, VM
from dirtylog.linux.kvm_abi import Capability, DirtyGFNFlag

DIRTY_GFN: Final = np.dtype(abi.DirtyGFN)
MIN_RING_ENTRIES: Final = 1024
"""The smallest power of two that every kernel takes: it keeps 64 entries back, and 512 more where the processor itself
logs pages (Intel's PML)."""

_DIRTY: Final = int(DirtyGFNFlag.DIRTY)  # numpy compares with members of enumerations fifty times slower
_RESET: Final = int(DirtyGFNFlag.RESET)
_FIRST_STEP: Final = 256
_GROWTH: Final = 4

Entries = npt.NDArray[np.void]
"""Records of `DIRTY_GFN`."""


def enable_dirty_rings(vm: VM, entries: int) -> None:
    """Have a VM's vCPUs, none of which is created yet, log to rings of so many entries, and not to its slots.

    Raises:
        HostError: the host has no rings, or none that can be read from here.
        UsageError: not a size that rings can have.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise HostError(
            f"dirty rings cannot be read in the order that {platform.machine()} needs", remedy="use a dirty log"
        )
    capability = next(filter(vm.check, (Capability.DIRTY_LOG_RING, Capability.DIRTY_LOG_RING_ACQ_REL)), None)
    if capability is None:
        raise HostError("this kernel's KVM has no dirty rings", remedy="use Linux 5.11 or newer, or a dirty log")
    most = vm.check(capability) // DIRTY_GFN.itemsize
    if not MIN_RING_ENTRIES <= entries <= most or entries.bit_count() != 1:
        raise UsageError(
            f"a dirty ring of {entries} entries",
            remedy=f"give a power of two from {MIN_RING_ENTRIES} to {most}, such as {min(4096, most)}",
        )
    vm.enable(capability, entries * DIRTY_GFN.itemsize)


def map_dirty_ring(vcpu: VCPU, entries: int) -> Entries:
    """A vCPU's ring, shared with the kernel for as long as the array lives."""
    return np.frombuffer(vcpu.map(abi.DIRTY_RING_PAGE, entries * DIRTY_GFN.itemsize), DIRTY_GFN)


class DirtyRing:
    """The collecting side of one ring. Not locked, and only for when its vCPU is outside the guest.

    The kernel counts the entries that it fills and empties, and does not tell. It looks whether a ring is nearly full
    before it enters the guest, with 64 entries to spare; but one emulated ``rep stos`` may take a thousand, and some
    kernels emulate many instructions at a time. Then it overwrites entries that nobody has seen, and goes on somewhere
    in the ring: where, shows only with the next entries that it fills.

    Args:
        entries: the whole ring.

    Attributes:
        astray: whether it is not known where the kernel fills entries.
    """

    def __init__(self, entries: Entries) -> None:
        self._use(entries)

    def close(self) -> None:
        """Let go of the mapping; what is left is an empty ring. Idempotent."""
        self._use(np.zeros(1, DIRTY_GFN))

    def _use(self, entries: Entries) -> None:
        self._words = entries.view("<u8").reshape(-1, 2)  # which numpy copies many times faster than records
        self._flags = entries["flags"]
        self._next = 0
        self._seen = 0, 0
        self.astray = False

    @property
    def overflowed(self) -> bool:
        """Whether all entries were filled, and perhaps some more than once."""
        return bool(self._flags[self._next - 1] == _DIRTY)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take; may be asked at any time."""
        return not self.astray and bool(self._flags[self._next] != _DIRTY)

    @property
    def pending(self) -> int:
        """How many entries are dirty; may be asked at any time."""
        return int(np.count_nonzero(self._flags == _DIRTY))

    def peek(self) -> Entries:
        """A copy of the entries that are dirty, oldest first; of an overflowed ring, all entries."""
        self._seen = self._find()
        parts = [self._words[part] for part in self._parts(*self._seen)]
        return np.concatenate(parts).view(DIRTY_GFN).reshape(-1)

    def release(self) -> int:
        """Mark what the last `peek` gave for KVM_RESET_DIRTY_RINGS; the number of entries that it will count."""
        overflowed = self.overflowed
        gap, count = self._seen
        if not count:
            return 0
        self.pass_over(gap + count)
        self.astray = overflowed
        return gap + count

    def pass_over(self, count: int) -> None:
        """Mark that many entries as what the kernel filled next, whatever they are."""
        for part in self._parts(0, count):
            self._flags[part] = _RESET
        self._next = (self._next + count) % self._flags.size
        self._seen = 0, 0

    def _parts(self, gap: int, count: int) -> tuple[slice, slice]:
        """So many entries in a row, up to the ring's end and from its start."""
        size = self._flags.size
        first = (self._next + gap) % size
        return slice(first, min(first + count, size)), slice(0, max(first + count - size, 0))

    def _find(self) -> tuple[int, int]:
        """How many entries the kernel has gone past since it was lost sight of, and how many after these are dirty."""
        if self.is_empty:
            return 0, 0
        if self.overflowed:
            return 0, self._flags.size
        if self._flags[self._next] != _DIRTY:
            ahead = np.flatnonzero(np.roll(self._flags, -self._next) == _DIRTY)
            return (int(ahead[0]), ahead.size) if ahead.size else (0, 0)
        count = _leading(self._flags[self._next :])
        if self._next + count == self._flags.size:
            count += _leading(self._flags[: self._next])
        return 0, count


def _leading(flags: npt.NDArray[np.uint32]) -> int:
    """How many entries are dirty before the first that is not; in growing steps, since most often they are few."""
    start, step = 0, _FIRST_STEP
    while start < flags.size:
        others = flags[start : start + step] != _DIRTY
        first = int(others.argmax())
        if others[first]:
            return start + first
        start, step = start + step, step * _GROWTH
    return flags.size

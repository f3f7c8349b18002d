"""KVM's dirty rings, which all memory slots of a machine share.

A page that was taken from a ring is not noticed again before KVM_RESET_DIRTY_RINGS has protected it. Were its bit shown
before that, the page might be read, then written unnoticed, and that write be lost. So taking entries, protecting their
pages and showing their bits is one step under one lock. vCPUs are kept out of the guest meanwhile: what they overwrite
in a ring that overflows (see `DirtyRing`), and how far they got, could not be told otherwise.

Where pages were lost, or may not be protected, logging is stopped and started again, which protects all of them, and
all are reported. This happens after an overflow, and where a signal cut KVM_RESET_DIRTY_RINGS short: what it had
gathered to protect at that moment is counted and forgotten.
"""

import threading
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import HostError
from dirtylog.linux.kvm import VCPU, VM
from dirtylog.linux.kvm_ring import DirtyRing, Entries, enable_dirty_rings, map_dirty_ring
from dirtylog.memory import PageBitmap, Words
from dirtylog.trackers.kvm_slot import MemorySlot
from dirtylog.trackers.listener import Hold
from dirtylog.units import WORD_BITS, word_count

DEFAULT_RING_ENTRIES: Final = 1 << 16
"""As many as kernels allow, a MiB for each vCPU. A smaller ring makes its vCPU leave the guest, and overflows, more."""

_ATTEMPTS: Final = 100
"""How often KVM is asked to protect what was taken. Once is enough, unless the process is stopped meanwhile."""

_ONE: Final = np.uint64(1)
_LAST_BIT: Final = np.uint64(WORD_BITS - 1)
_WORD_SHIFT: Final = np.uint64(WORD_BITS.bit_length() - 1)
_DENSE: Final = 128
"""Up to so many pages for each that is named, setting bytes and packing them costs less than joining bits."""

Pages = npt.NDArray[np.uint64]


class _CPU:
    """A vCPU's ring, how many entries were taken from it, and whether it was full with nothing to take."""

    def __init__(self, vcpu: VCPU, ring: DirtyRing) -> None:
        self.vcpu = vcpu
        self.ring = ring
        self.taken = 0
        self.stuck = False


class _Log:
    """The pages of a slot that were written and not collected yet."""

    def __init__(self, slot: MemorySlot) -> None:
        self.slot = slot
        self.written = PageBitmap(slot.pages)

    def note(self, pages: Pages) -> None:
        """Add pages, but for those past the slot's end."""
        if pages.max() >= self.written.pages:
            pages = pages[pages < self.written.pages]
            if not pages.size:
                return
        first, end = int(pages.min()) // WORD_BITS, word_count(int(pages.max()) + 1)
        words = self.written.words[first:end]
        offsets = pages - np.uint64(first * WORD_BITS)
        if words.size * WORD_BITS <= offsets.size * _DENSE:
            written = np.zeros(words.size * WORD_BITS, np.bool_)
            written[offsets.view(np.int64)] = True
            words |= np.packbits(written, bitorder="little").view(np.uint64)
        else:
            np.bitwise_or.at(words, (offsets >> _WORD_SHIFT).view(np.int64), _ONE << (offsets & _LAST_BIT))

    def start_over(self) -> None:
        self.written.set()
        self.slot.log(False)
        self.slot.log(True)


class DirtyRings:
    """The rings of a VM's vCPUs, and what was taken from them. May be used by any thread, and by vCPUs that are out.

    Args:
        vm: the machine, which has no vCPU yet.
        hold: keeps vCPUs out of the guest while it is entered. Whoever waits for that must not hold what they need.
        entries: the size of each ring.

    Attributes:
        overflows: how often all pages had to be reported.

    Raises:
        HostError: the host has no rings.
        UsageError: not a size that rings can have.
    """

    def __init__(self, vm: VM, hold: Hold, entries: int = DEFAULT_RING_ENTRIES) -> None:
        enable_dirty_rings(vm, entries)
        self._vm = vm
        self._hold = hold
        self._entries = entries
        self._lock = threading.Lock()
        self._cpus: list[_CPU] = []
        self._logs: dict[int, _Log] = {}
        self._unprotected = 0
        self._lost = False
        self.overflows = 0

    def add(self, vcpu: VCPU) -> None:
        """Take over the ring of a new vCPU, before it runs."""
        ring = DirtyRing(map_dirty_ring(vcpu, self._entries))
        with self._lock:
            self._cpus.append(_CPU(vcpu, ring))

    def close(self) -> None:
        """Give the rings up, after the last slot; idempotent."""
        with self._lock:
            for cpu in self._cpus:
                cpu.ring.close()

    def watch(self, slot: MemorySlot) -> None:
        """Keep what is written to a slot from here on."""
        with self._lock:
            self._reap()  # what the slot's number meant before
            self._logs[slot.number] = _Log(slot)

    def forget(self, slot: MemorySlot) -> None:
        """The reverse of `watch`; idempotent. From here on the slot's log is not switched by others."""
        with self._lock:
            self._logs.pop(slot.number, None)

    def reap(self) -> None:
        """Make room in all rings.

        Raises:
            HostError: KVM does not protect the pages again.
        """
        with self._lock:
            self._reap()

    def make_room(self, vcpu: VCPU, *, alone: bool = False) -> None:
        """Serve a vCPU that left the guest because its ring is full.

        Args:
            vcpu: it.
            alone: leave the rings of others as they are, so that each is full in its own time.

        Raises:
            HostError: KVM does not protect the pages again.
        """
        with self._lock:
            self._reap(vcpu if alone else None)
            for cpu in self._cpus:
                if cpu.vcpu is vcpu:
                    self._free(cpu)

    def collect(self, slot: MemorySlot, words: Words) -> None:
        """Move what is known to be written to a slot to ``words``; nothing if it is not watched."""
        with self._lock:
            self._reap()
            log = self._logs.get(slot.number)
            if log is None:
                words[:] = 0
            else:
                words[:] = log.written.words
                log.written.clear()

    @property
    def dirty_pages(self) -> tuple[int, ...]:
        """For each vCPU, how many entries were taken from its ring since it was added.

        That is once for each page each time it was protected, but for stores that KVM emulates: it notes all of them.
        """
        with self._lock:
            return tuple(cpu.taken for cpu in self._cpus)

    @property
    def written(self) -> tuple[int, ...]:
        """`dirty_pages`, with the entries that still are in the rings. These stay there."""
        with self._lock:
            return tuple(cpu.taken + cpu.ring.pending for cpu in self._cpus)

    def _reap(self, only: VCPU | None = None) -> None:
        if all(cpu.ring.is_empty for cpu in self._cpus) and not self._unprotected and not self._lost:
            return
        with self._hold():
            for cpu in self._cpus:
                if only is None or cpu.vcpu is only:
                    self._take(cpu)
            self._protect()
            if self._lost:
                self.overflows += 1
                for log in self._logs.values():
                    log.start_over()
                self._lost = False

    def _take(self, cpu: _CPU) -> None:
        if cpu.ring.overflowed:
            self._lost = True
        entries = cpu.ring.peek()
        for log, pages in self._by_slot(entries):
            log.note(pages)
        self._unprotected += cpu.ring.release()
        if entries.size:
            cpu.taken += entries.size
            cpu.stuck = False

    def _by_slot(self, entries: Entries) -> Iterator[tuple[_Log, Pages]]:
        """The pages that entries name, by slot; without those of slots that are not watched."""
        slots, pages = entries["slot"], entries["offset"]
        while slots.size:
            same = slots == slots[0]
            only_one = bool(same.all())
            log = self._logs.get(int(slots[0]))
            if log is not None:
                yield log, pages if only_one else pages[same]
            if only_one:
                return
            slots, pages = slots[~same], pages[~same]

    def _protect(self) -> None:
        attempts = 0
        while self._unprotected > 0 and attempts < _ATTEMPTS:
            protected = self._vm.reset_dirty_rings()
            self._unprotected -= protected
            self._lost |= protected > 0 and self._unprotected > 0
            attempts += 1
        if self._unprotected:
            raise HostError(
                f"KVM does not protect again what was taken from dirty rings: {self._unprotected} entries are left",
                remedy="use another dirty log with --dirty-log",
            )

    def _free(self, cpu: _CPU) -> None:
        """Make room in a ring that went astray so far that it counts as full, and shows nothing.

        Half a ring at a time, until it does not any more: then it is less than a ring astray, and can find back. It is
        only certain to be so if the vCPU was in the guest since, and came back at once.
        """
        if cpu.ring.astray and cpu.stuck:
            cpu.ring.pass_over(self._entries // 2)
            self._unprotected += self._entries // 2
            self._protect()
        cpu.stuck = cpu.ring.astray


class KVMRingTracker:
    """One memory slot's share of the rings.

    Args:
        rings: the machine's.
        slot: the slot, which goes with the tracker.
    """

    def __init__(self, rings: DirtyRings, slot: MemorySlot) -> None:
        self._rings = rings
        self.slot = slot

    @property
    def pages(self) -> int:
        """The length of the slot."""
        return self.slot.pages

    def arm(self) -> None:
        """Have KVM put the slot's pages into rings."""
        self._rings.watch(self.slot)
        try:
            self.slot.log(True)
        except BaseException:
            self._rings.forget(self.slot)
            raise

    def collect(self, words: Words) -> None:
        """Take the rings' entries, and the slot's pages of these and of earlier ones."""
        self._rings.collect(self.slot, words)

    def clear(self, first: int, count: int, words: Words) -> None:
        """Nothing: what is collected is protected already."""

    def disarm(self) -> None:
        """Have KVM note no more."""
        self._rings.forget(self.slot)
        self.slot.log(False)

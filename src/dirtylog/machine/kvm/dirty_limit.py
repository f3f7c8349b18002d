"""Slowing vCPUs down that write more than they may, and no others: dirty-limit, as in QEMU (system/dirtylimit.c).

A vCPU that writes fills its dirty ring again and again. Whenever it is full, the vCPU has left the guest, and stands
still for a while before it goes back: its penalty, which is adjusted once a period to the rate at which it fills its
ring. Who only reads fills none. Rings are emptied when they are full, and not before that, as far as it is up to this
machine: whoever collects the dirty log empties them all.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from dirtylog.errors import DirtylogError, UsageError
from dirtylog.machine.kvm.ticker import Ticker
from dirtylog.machine.throttle import DEFAULT_PERIOD, DirtyLimit
from dirtylog.memory import Memory, TrackingReason
from dirtylog.trackers import DirtyRings
from dirtylog.units import MIB, PAGE_SIZE

TOLERANCE: Final = 25
"""MiB a second that a rate may be off its quota."""
_MOST_FULLS: Final = 99
"""A penalty is at most so many times as long as filling the ring takes."""


def ring_full_us(entries: int, rate: int) -> int:
    """Microseconds until a ring is full at a rate in MiB a second; 0 without one."""
    return entries * PAGE_SIZE // MIB * 1_000_000 // rate if rate else 0


def next_penalty_us(quota: int, rate: int, penalty: int, full: int) -> int:
    """The penalty of the next period.

    Args:
        quota: MiB a second that are allowed.
        rate: that were written.
        penalty: of the last period.
        full: see `ring_full_us`, for the highest rate so far.
    """
    difference, larger = abs(quota - rate), max(quota, rate)
    if difference <= TOLERANCE:
        return penalty
    if not rate:
        return 0
    percent = difference * 100 // larger
    # Far off, by what would make up for all of it if only the vCPU's own speed mattered; near it, step by step.
    step = full * percent // (100 - percent) if percent > 50 else full // 10
    return min(max(penalty + (step if rate > quota else -step), 0), _MOST_FULLS * full)


class _CPU:
    """What is known of one vCPU. ``told`` is replaced whole, for those who look at any time."""

    def __init__(self, number: int) -> None:
        self.told = DirtyLimit(number, 0)
        self._lock = threading.Lock()
        self._highest = self._penalty_us = 0

    def limit(self, quota: int) -> None:
        with self._lock:
            if quota != self.told.quota:
                self._highest = self._penalty_us = 0
                self.told = DirtyLimit(self.told.cpu, quota)

    def take(self, rate: int, entries: int) -> None:
        with self._lock:
            quota, self._highest = self.told.quota, max(rate, self._highest)
            full = ring_full_us(entries, self._highest)
            self._penalty_us = next_penalty_us(quota, rate, self._penalty_us, full) if quota else 0
            self.told = DirtyLimit(self.told.cpu, quota, rate, self._penalty_us / 1e6, full / 1e6)


class DirtyLimiter:
    """The quotas of a machine's vCPUs, and their penalties. May be used by any thread but theirs.

    Args:
        rings: of the vCPUs, all of which are there.
        entries: the size of each ring.
        memory: logged as long as there is a quota.
        failed: told what kept penalties from being adjusted.
    """

    def __init__(
        self, rings: DirtyRings, entries: int, memory: Memory, failed: Callable[[DirtylogError], None]
    ) -> None:
        self._rings = rings
        self._entries = entries
        self._memory = memory
        self._failed = failed
        self._lock = threading.Lock()
        self._cpus = [_CPU(number) for number in range(len(rings.written))]
        self._period = 0.0
        self._last: Sequence[int] = ()
        self._moment = 0.0
        self._ticker: Ticker | None = None

    @property
    def active(self) -> bool:
        """Whether any vCPU has a quota."""
        return self._ticker is not None

    @property
    def limits(self) -> tuple[DirtyLimit, ...]:
        """Of the vCPUs that have a quota."""
        return tuple(told for told in (cpu.told for cpu in self._cpus) if told.quota)

    def limit(self, quota: int, cpu: int | None, period: float) -> None:
        """See `Machine.limit_dirty_rate`."""
        if quota < 0:
            raise UsageError(f"a limit of {quota} MiB/s", remedy="0 ends a limit")
        if cpu is not None and not 0 <= cpu < len(self._cpus):
            raise UsageError(f"there is no vCPU {cpu}", remedy=f"vCPUs are 0 to {len(self._cpus) - 1}")
        with self._lock:
            for one in self._cpus if cpu is None else (self._cpus[cpu],):
                one.limit(quota)
            self._period = period
            wanted = any(one.told.quota for one in self._cpus)
            if wanted and self._ticker is None:
                self._start()
            elif not wanted and self._ticker is not None:
                self._stop(self._ticker)

    def penalty(self, cpu: int) -> float:
        """Seconds that a vCPU is to stand still whose ring was full."""
        return self._cpus[cpu].told.penalty

    def close(self) -> None:
        """End all limits; idempotent."""
        self.limit(0, None, DEFAULT_PERIOD)

    def _start(self) -> None:
        self._memory.start_logging(TrackingReason.DIRTY_LIMIT)
        self._last, self._moment = self._rings.written, time.monotonic()
        self._ticker = Ticker("dirty-limit", self._adjust, self._failed)

    def _stop(self, ticker: Ticker) -> None:
        self._ticker = None
        ticker.close()
        self._memory.stop_logging(TrackingReason.DIRTY_LIMIT)

    def _adjust(self) -> float:
        """Set penalties by what was written in the period that is over; seconds until the next one is."""
        left = self._moment + self._period - time.monotonic()
        if left > 0:
            return left
        now, written = time.monotonic(), self._rings.written
        for cpu, before, after in zip(self._cpus, self._last, written, strict=True):
            cpu.take(int((after - before) * PAGE_SIZE / (now - self._moment)) // MIB, self._entries)
        self._last, self._moment = written, now
        return self._period

"""Watching whether a migration will end, and slowing the guest down so that it does."""

import time
from typing import Final, Self

from dirtylog.machine import Machine
from dirtylog.migration.convergence import AutoConverge, Trigger, judge
from dirtylog.migration.parameters import Parameters, Slowdown
from dirtylog.migration.statistics import Statistics
from dirtylog.migration.switchover import Estimate
from dirtylog.units import PAGE_SIZE

PERIOD: Final = 1.0
"""Seconds between two decisions, at least; they come after a pass."""


class Governor:
    """One migration's. When it is left, in whatever way that ends, the guest is as fast as it can be.

    Args:
        machine: which is migrated.
        statistics: its verdict and its throttle are kept up to date.
        slowdown: what is done about a guest that dirties too much.

    Raises:
        UsageError: this machine cannot be slowed down in that way.
    """

    def __init__(self, machine: Machine, statistics: Statistics, slowdown: Slowdown) -> None:
        if slowdown is Slowdown.DIRTY_LIMIT:
            machine.check_dirty_limit()
        elif slowdown is Slowdown.AUTO_CONVERGE:
            machine.check_throttle()
        self._machine = machine
        self._statistics = statistics
        self._slowdown = slowdown
        self._auto_converge = AutoConverge()
        self._trigger = Trigger()
        self._limited = False
        self._limit: tuple[int, float] | None = None
        self._dirtied = 0
        self._sent = 0
        self._since = 0.0

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        self._statistics.throttle = 0
        if self._slowdown is Slowdown.AUTO_CONVERGE:
            self._machine.throttle(0)
        elif self._slowdown is Slowdown.DIRTY_LIMIT:
            self._machine.limit_dirty_rate(0)

    def judge(self, estimate: Estimate, parameters: Parameters) -> None:
        """After each pass: say what is to be expected."""
        self._dirtied += self._statistics.passes[-1].dirtied * PAGE_SIZE
        self._statistics.verdict = judge(
            self._statistics.passes, parameters.downtime_limit, estimate.fixed, estimate.bandwidth
        )

    def slow_down(self, parameters: Parameters) -> None:
        """After a pass that does not suffice: decide whether the guest is to be slowed down, if it is time to."""
        now = time.monotonic()
        if now - self._since <= PERIOD:
            return
        sent = self._statistics.bytes - self._sent
        if self._slowdown is Slowdown.AUTO_CONVERGE:
            self._statistics.throttle = self._auto_converge.observe(self._dirtied, sent, parameters.throttle)
            self._machine.throttle(self._statistics.throttle / 100)
        elif self._slowdown is Slowdown.DIRTY_LIMIT:
            if self._trigger.observe(self._dirtied, sent * parameters.throttle.trigger / 100):
                self._limited = True
            self._limit_writers(parameters)
        self._dirtied, self._sent, self._since = 0, self._statistics.bytes, now

    def _limit_writers(self, parameters: Parameters) -> None:
        limit = (parameters.vcpu_dirty_limit, parameters.dirty_limit_period)
        if self._limited and limit != self._limit:
            self._limit = limit
            self._machine.limit_dirty_rate(parameters.vcpu_dirty_limit, period=parameters.dirty_limit_period)

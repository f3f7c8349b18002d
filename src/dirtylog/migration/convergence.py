"""Will it converge, when, and what would help? And how much to slow the guest: pure functions of counters.

A pass that takes T seconds leaves behind what the guest wrote in them. While the working set is larger than what is
written in a pass, shorter passes leave less behind, and passes shrink by a ratio from one to the next. Once all of the
working set is written in every pass, they stay as they are, however many there are: then the rest fits into the
downtime limit, or never will.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log
from typing import Final

from dirtylog.errors import UsageError
from dirtylog.migration.statistics import PassStatistics, Verdict
from dirtylog.migration.switchover import MARGIN
from dirtylog.units import PAGE_SIZE

STANDS_STILL: Final = 0.9
"""A pass that leaves more than this share of what the one before left does not shrink."""
_PASSES_TO_TELL: Final = 2
_FARTHEST: Final = 1000
"""Passes beyond which a forecast is none."""


def judge(passes: Sequence[PassStatistics], limit: float, fixed: float, switchover: float = 0.0) -> Verdict:
    """Forecast from the passes so far, each of which knows what was dirtied in it.

    Args:
        passes: the last ones, in order; at least one.
        limit: of the downtime, in seconds.
        fixed: seconds that a switchover takes besides its pages.
        switchover: bytes of memory a second that these will get; what the last pass got if 0.
    """
    last = passes[-1]
    left = last.dirtied * PAGE_SIZE
    bandwidth = switchover or last.bandwidth
    downtime = fixed + (left / bandwidth if bandwidth else inf if left else 0.0)
    room = max(limit * MARGIN - fixed, 0.0)
    rate = left / last.seconds if last.seconds else 0.0
    needs = {
        "needed_limit": downtime / MARGIN,
        "needed_bandwidth": left / room if room else inf if left else 0.0,
        "needed_throttle": max(0.0, 1 - (1 - last.throttle / 100) * last.bandwidth / rate) if rate else 0.0,
    }
    if not left or downtime <= limit * MARGIN:
        return Verdict(True, 0.0, downtime, **needs)
    ratio = _ratio(passes)
    if ratio is None:
        return Verdict(None, inf, downtime, **needs)
    fits = room * bandwidth
    if ratio >= STANDS_STILL or not fits:
        return Verdict(False, inf, downtime, **needs)
    more = ceil(log(fits / left) / log(ratio))
    if more > _FARTHEST:
        return Verdict(False, inf, downtime, **needs)
    next_pass = left / last.bandwidth if last.bandwidth else 0.0
    seconds = next_pass * (1 - ratio**more) / (1 - ratio)
    return Verdict(True, seconds, fixed + left * ratio**more / bandwidth, **needs)


def _ratio(passes: Sequence[PassStatistics]) -> float | None:
    """By how much passes shrink, from what the last ones left behind; None if it is too early to tell."""
    known = [one.dirtied for one in passes if one.number > 1][-3:]
    if len(known) < _PASSES_TO_TELL:
        first = passes[0]
        if len(passes) == _PASSES_TO_TELL and first.dirtied:
            return passes[-1].dirtied / first.dirtied
        return None
    return float((known[-1] / known[0]) ** (1 / (len(known) - 1))) if known[0] else 0.0


@dataclass(frozen=True, slots=True)
class ThrottleParameters:
    """QEMU's, in percent; see qapi/migration.json. ``trigger``: of what is sent that may be dirtied meanwhile.

    Raises:
        UsageError: a value is out of range, or the guest would be throttled at once by more than the maximum.
    """

    trigger: int = 50
    initial: int = 20
    increment: int = 10
    maximum: int = 99
    tailslow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.trigger <= 100:
            raise UsageError(f"a throttle trigger of {self.trigger} %", remedy="it may be 1 to 100")
        for name, value in (("first throttle", self.initial), ("throttle increment", self.increment)):
            if not 1 <= value <= 99:
                raise UsageError(f"a {name} of {value} %", remedy="it may be 1 to 99")
        if not self.initial <= self.maximum <= 99:
            raise UsageError(
                f"a highest throttle of {self.maximum} %", remedy=f"it may be {self.initial}, the first one, to 99"
            )


@dataclass(slots=True)
class Trigger:
    """Says when a guest has dirtied too much for too long: in two periods, with others in between or not."""

    _strikes: int = 0

    def observe(self, dirtied: int, threshold: float) -> bool:
        """Take note of the bytes dirtied in a period, and of how many may be."""
        if dirtied <= threshold:
            return False
        self._strikes += 1
        if self._strikes < 2:
            return False
        self._strikes = 0
        return True


@dataclass(slots=True)
class AutoConverge:
    """How much of its time the guest is made to wait, step by step.

    Attributes:
        percent: now; 0 while it runs freely.
    """

    percent: int = 0
    _trigger: Trigger = field(default_factory=Trigger)

    def observe(self, dirtied: int, sent: int, parameters: ThrottleParameters) -> int:
        """Take note of the bytes dirtied and sent in a period, and say how much to throttle from now on.

        The guest is throttled, or throttled more, after two periods in which it dirtied more than the trigger allows.
        """
        threshold = sent * parameters.trigger / 100
        if self._trigger.observe(dirtied, threshold):
            self.percent = self._next(dirtied, threshold, parameters)
        self.percent = min(self.percent, parameters.maximum)
        return self.percent

    def _next(self, dirtied: int, threshold: float, parameters: ThrottleParameters) -> int:
        if not self.percent:
            return parameters.initial
        step = parameters.increment
        if parameters.tailslow:
            left = 100 - self.percent
            step = min(left - int(left * threshold / dirtied), step)
        return self.percent + step

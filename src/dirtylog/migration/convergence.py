"""Will it converge, when, and what would help? And how much to slow the guest: pure functions of counters.

A pass that takes T seconds leaves behind what the guest wrote in them. While the working set is larger than what is
written in a pass, shorter passes leave less behind, and passes shrink by a ratio from one to the next. Once all of the
working set is written in every pass, they stay as they are, however many there are: then the rest fits into the
downtime limit, or never will.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, log
from typing import Final

from dirtylog.migration.statistics import PassStatistics
from dirtylog.migration.switchover import MARGIN
from dirtylog.units import PAGE_SIZE

STANDS_STILL: Final = 0.9
"""A pass that leaves more than this share of what the one before left does not shrink."""
_PASSES_TO_TELL: Final = 2
_FARTHEST: Final = 1000
"""Passes beyond which a forecast is none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be expected if everything goes on as it does.

    Attributes:
        converges: None while it is too early to tell.
        seconds: until the guest is stopped; infinite if never.
        downtime: seconds that it will stand still.
        needed_limit: seconds of downtime that would be enough right now.
        needed_bandwidth: bytes of memory a second that would be enough for the limit.
        needed_throttle: the share of its time, 0 to 1, that would have to be taken from the guest so that it writes no
            faster than can be sent.
    """

    converges: bool | None
    seconds: float
    downtime: float
    needed_limit: float
    needed_bandwidth: float
    needed_throttle: float


def judge(passes: Sequence[PassStatistics], limit: float, fixed: float) -> Verdict:
    """Forecast from the passes so far, each of which knows what was dirtied in it.

    Args:
        passes: the last ones, in order; at least one.
        limit: of the downtime, in seconds.
        fixed: seconds that a switchover takes besides its pages.
    """
    last = passes[-1]
    left = last.dirtied * PAGE_SIZE
    downtime = fixed + (left / last.bandwidth if last.bandwidth else inf if left else 0.0)
    room = max(limit * MARGIN - fixed, 0.0)
    rate = left / last.seconds if last.seconds else 0.0
    needs = {
        "needed_limit": downtime / MARGIN,
        "needed_bandwidth": left / room if room else inf if left else 0.0,
        "needed_throttle": max(0.0, 1 - last.bandwidth / rate) if rate else 0.0,
    }
    if not left or downtime <= limit * MARGIN:
        return Verdict(True, 0.0, downtime, **needs)
    ratio = _ratio(passes)
    if ratio is None:
        return Verdict(None, inf, downtime, **needs)
    fits = room * last.bandwidth
    if ratio >= STANDS_STILL or not fits:
        return Verdict(False, inf, downtime, **needs)
    more = ceil(log(fits / left) / log(ratio))
    if more > _FARTHEST:
        return Verdict(False, inf, downtime, **needs)
    next_pass = left / last.bandwidth
    seconds = next_pass * (1 - ratio**more) / (1 - ratio)
    return Verdict(True, seconds, fixed + left * ratio**more / last.bandwidth, **needs)


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
    """QEMU's, in percent; see qapi/migration.json. ``trigger``: of what is sent that may be dirtied meanwhile."""

    trigger: int = 50
    initial: int = 20
    increment: int = 10
    maximum: int = 99
    tailslow: bool = False


@dataclass(slots=True)
class AutoConverge:
    """How much of its time the guest is made to wait, step by step.

    Attributes:
        percent: now; 0 while it runs freely.
    """

    percent: int = 0
    _strikes: int = 0

    def observe(self, dirtied: int, sent: int, parameters: ThrottleParameters) -> int:
        """Take note of the bytes dirtied and sent in a period, and say how much to throttle from now on.

        The guest is throttled, or throttled more, after two periods in which it dirtied more than the trigger allows.
        """
        threshold = sent * parameters.trigger / 100
        if dirtied <= threshold:
            return self.percent
        self._strikes += 1
        if self._strikes >= 2:
            self._strikes = 0
            self.percent = min(self._next(dirtied, threshold, parameters), parameters.maximum)
        return self.percent

    def _next(self, dirtied: int, threshold: float, parameters: ThrottleParameters) -> int:
        if not self.percent:
            return parameters.initial
        step = parameters.increment
        if parameters.tailslow:
            left = 100 - self.percent
            step = min(left - int(left * threshold / dirtied), step)
        return self.percent + step

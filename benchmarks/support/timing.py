"""Two ways to do one thing, timed in turn."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from msgspec import Struct

Samples = list[float]
"""Seconds for one operation, a number a run."""

_RUN_SECONDS: Final = 0.02
"""Quick operations are repeated until a run takes about as long."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is timed.

    Attributes:
        name: for people.
        call: does it once, or ``count`` times.
        count: how often.
        before: makes ready for it each time, unmeasured; then a run is one call.
    """

    name: str
    call: Callable[[], object]
    count: int = 1
    before: Callable[[], object] | None = None


class Figure(Struct, frozen=True):
    """What was measured of one operation. Times in seconds.

    Attributes:
        name: what it is.
        samples: of dirtylog.
        raw_name: what it is compared with, or None.
        raw: samples of that.
        limit: the most that dirtylog's median may be, or None.
        size: bytes that one operation moves, if its speed is what matters.
    """

    name: str
    samples: Samples
    raw_name: str | None = None
    raw: Samples = []
    limit: float | None = None
    size: int | None = None


def compare(
    ours: Operation, raw: Operation, runs: int, *, limit: float | None = None, size: int | None = None
) -> Figure:
    """Time an operation and its raw counterpart in turn, so that what else the host does strikes both."""
    calls = _calibrate(ours), _calibrate(raw)
    samples: tuple[Samples, Samples] = [], []
    for _ in range(runs):
        for operation, number, kept in zip((ours, raw), calls, samples, strict=True):
            kept.append(_time(operation, number))
    return Figure(ours.name, samples[0], raw.name, samples[1], limit, size)


def time_alone(operation: Operation, runs: int) -> Samples:
    """Time what has no counterpart that could take turns with it."""
    number = _calibrate(operation)
    return [_time(operation, number) for _ in range(runs)]


def _calibrate(operation: Operation) -> int:
    """How many calls make a run; warms up too."""
    if operation.before is not None:
        _time(operation, 1)
        return 1
    number = 1
    while (taken := _time(operation, number) * number * operation.count) < _RUN_SECONDS / 2:
        number = max(2 * number, min(int(number * _RUN_SECONDS / max(taken, 1e-9)), 100 * number))
    return number


def _time(operation: Operation, number: int) -> float:
    """Seconds for one operation; without the garbage collector, as it would strike at random."""
    if operation.before is not None:
        operation.before()
    call, was_enabled = operation.call, gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(number):
            call()
        taken = time.perf_counter() - began
    finally:
        if was_enabled:
            gc.enable()
    return taken / (number * operation.count)

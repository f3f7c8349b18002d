"""What was to be expected of a migration from watching its guest before."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.support.guest import Guest
from benchmarks.support.peers import Terms
from benchmarks.support.usage import busiest_thread, thread_times
from dirtylog.cli.predict import build_workload
from dirtylog.control.commands import PassInfo
from dirtylog.control.watch import RemoteWatch
from dirtylog.display import Sample
from dirtylog.migration.prediction import Scenario, Workload
from dirtylog.migration.switchover import MARGIN
from dirtylog.units import PAGE_SIZE

INTERVAL: Final = 0.05
_SLOWEST: Final = 0.01
_TELLING_PAGES: Final = 256  # passes of fewer say more about latency than about bandwidth


@dataclass(frozen=True, slots=True)
class Observation:
    """What a guest was seen to write.

    Attributes:
        workload: that.
        running: the share of the time in which its vCPU had a CPU.
        thread: the vCPU's; None if the guest to be migrated is another.
    """

    workload: Workload
    running: float
    thread: int | None

    def guest_speed(self, before: Mapping[int, float], after: Mapping[int, float], seconds: float) -> float:
        """How fast the guest went in some time, with its threads' times before and after, as a multiple of before.

        On a host with few CPUs it shares them with the migration. 1 of another guest.
        """
        if self.thread is None or not self.running:
            return 1.0
        share = (after.get(self.thread, 0.0) - before.get(self.thread, 0.0)) / seconds
        return max(share / self.running, _SLOWEST)


def observe(guest: Guest, seconds: float) -> Observation:
    """Watch a guest that dirtylog runs, for some time."""
    before, began = thread_times(guest.pid), time.monotonic()
    with RemoteWatch(guest.qmp) as watch:
        workload = build_workload(watch.blocks, watch.stored, _samples(watch, seconds))
    after, taken = thread_times(guest.pid), time.monotonic() - began
    thread = busiest_thread(before, after)
    running = 0.0 if thread is None else (after[thread] - before.get(thread, 0.0)) / taken
    return Observation(workload, running, thread)


def scenario_of(terms: Terms, passes: Sequence[PassInfo], clear_chunk: int, guest_speed: float) -> Scenario:
    """What is to be known for a forecast besides the workload.

    The link's speed is that allowed by the terms. If they allow any, it is that of the migration's own passes, which
    then is no part of the forecast: how many passes there are, and how long each is, is.
    """
    if terms.bandwidth:
        first = later = standing = float(terms.bandwidth)
    else:
        first = _bandwidth(passes[:1])
        standing = _bandwidth(passes[-1:]) if _tells(passes[-1:]) else first
        later = _bandwidth(passes[1:-1]) if _tells(passes[1:-1]) else standing
    return Scenario(
        bandwidth=later,
        first_bandwidth=first,
        downtime_limit=terms.limit,
        clear_chunk=clear_chunk or PAGE_SIZE,
        split=clear_chunk > 0,
        switchover_bandwidth=standing,
        guest_speed=guest_speed,
    )


def shortest_total(memory: int, hot: int, rate: float, terms: Terms) -> float:
    """Seconds that no order of sending can be faster than, if part of memory is written at random for ever.

    Cold memory is best sent first, while all that is hot is dirty anyway. From then on the best that can be done is to
    send nothing but dirty pages: of ``hot`` bytes D are dirty, and dD/dt = rate (1 - D / hot) - bandwidth, from D = hot
    to what fits into the downtime limit.

    Args:
        memory: bytes with contents.
        hot: how many of them are written.
        rate: bytes a second that are written, be they dirty or not.
        terms: with a bandwidth.
    """
    bandwidth = terms.bandwidth
    rest = min(max(bandwidth * (terms.limit * MARGIN - Scenario(bandwidth).fixed_downtime), 0.0), hot)
    slowest = bandwidth - rate * (1 - rest / hot)
    if slowest <= 0:
        return math.inf
    return (memory - hot) / bandwidth + hot / rate * math.log(bandwidth / slowest) + terms.limit * MARGIN


def _tells(passes: Sequence[PassInfo]) -> bool:
    return sum(one.pages for one in passes) >= _TELLING_PAGES


def _bandwidth(passes: Sequence[PassInfo]) -> float:
    """Bytes of memory a second."""
    seconds = sum(one.seconds for one in passes)
    return max(sum(one.pages for one in passes), 1) * PAGE_SIZE / max(seconds, 1e-6)


def _samples(watch: RemoteWatch, seconds: float) -> Iterator[Sample]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(INTERVAL)
        yield watch.sample()

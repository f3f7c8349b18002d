"""What was to be expected of a migration from watching its guest before."""

import time
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.support.guest import Guest
from benchmarks.support.peers import Terms
from dirtylog.cli.predict import build_workload
from dirtylog.cli.prediction_report import PredictionInfo, info
from dirtylog.control.commands import PassInfo
from dirtylog.control.watch import RemoteWatch
from dirtylog.display import Sample
from dirtylog.migration.prediction import Scenario, Workload, predict
from dirtylog.units import PAGE_SIZE

INTERVAL: Final = 0.05
_TELLING_PAGES: Final = 256  # passes of fewer say more about latency than about bandwidth


def observe(guest: Guest, seconds: float) -> Workload:
    """Watch a guest that dirtylog runs, for some time."""
    with RemoteWatch(guest.qmp) as watch:
        return build_workload(watch.blocks, watch.stored, _samples(watch, seconds))


def forecast(
    workload: Workload, terms: Terms, passes: Sequence[PassInfo], clear_chunk: int, give_up: float
) -> PredictionInfo:
    """Predict a migration that has been made.

    The link's speed is that allowed by the terms. If they allow any, it is that of the migration's own passes, which
    then is no part of the forecast: how many passes there are, and how long each is, is.
    """
    running, last = passes[:-1], passes[-1]
    bandwidth = float(terms.bandwidth) or _bandwidth(running or passes)
    standing = _bandwidth([last]) if last.pages >= _TELLING_PAGES and not terms.bandwidth else bandwidth
    scenario = Scenario(
        bandwidth=bandwidth,
        downtime_limit=terms.limit,
        clear_chunk=clear_chunk or PAGE_SIZE,
        split=clear_chunk > 0,
        switchover_bandwidth=standing,
    )
    return info(scenario, predict(workload, scenario, give_up=give_up))


def _bandwidth(passes: Sequence[PassInfo]) -> float:
    """Bytes of memory a second."""
    seconds = sum(one.seconds for one in passes)
    return max(sum(one.pages for one in passes), 1) * PAGE_SIZE / max(seconds, 1e-6)


def _samples(watch: RemoteWatch, seconds: float) -> Iterator[Sample]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(INTERVAL)
        yield watch.sample()

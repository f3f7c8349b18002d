"""How a migration of a recorded workload would go: precopy replayed, without a machine.

Nothing here measures: the same passes, clears and decisions are made as in a migration, in a time that is computed. A
page that is sent takes its bytes' time on the link. A page that a sample of the workload names was written once, at a
moment of the sample that is fixed but evenly spread over the pages; so short samples predict well, long ones think
pages cooler than they are. After its last sample a workload starts anew.

With the split, a page counts as dirty again if it was written after the clear of its chunk, which comes right before
the first of the chunk's pages is sent. Without, if it was written after the sync before the pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.memory import Numbers
from dirtylog.migration.switchover import Estimate, should_switch_over
from dirtylog.units import PAGE_SIZE, align_up

Times = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MOST_PASSES: Final = 1000
_SPREAD: Final = 0.6180339887498949
"""Multiples of the golden ratio, less their whole parts, are spread evenly (Knuth, volume 3, section 6.4)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was written in some time.

    Attributes:
        seconds: how long.
        pages: their numbers, ascending.
    """

    seconds: float
    pages: Numbers


@dataclass(frozen=True, slots=True)
class Workload:
    """A machine's memory as it is written, over and over.

    Attributes:
        pages: of the memory.
        stored: how many of them have contents; the others are sent as zero pages.
        samples: consecutive, at least one.
    """

    pages: int
    stored: int
    samples: Sequence[Sample]

    def __post_init__(self) -> None:
        if not self.samples or any(sample.seconds <= 0 for sample in self.samples):
            raise UsageError("a workload without samples says nothing", remedy="record for some seconds")
        if not 0 <= self.stored <= self.pages:
            raise UsageError(f"{self.stored} of {self.pages} pages have contents")
        edges = [number for sample in self.samples if sample.pages.size for number in sample.pages[[0, -1]].tolist()]
        if edges and not 0 <= min(edges) <= max(edges) < self.pages:
            raise UsageError(f"the workload names pages that a memory of {self.pages} pages does not have")

    def weights(self) -> Times:
        """How much of a page each page is to the link in the first pass.

        What is written has contents. The rest of what is stored is spread evenly over the others, as nobody knows where
        it lies.
        """
        written = np.zeros(self.pages, np.bool_)
        for sample in self.samples:
            written[sample.pages] = True
        count = int(written.sum())
        known, others = min(self.stored, count), self.pages - count
        return np.where(written, known / max(count, 1), (self.stored - known) / max(others, 1))

    def writes(self, start: float, end: float) -> Iterator[tuple[Numbers, Times]]:
        """The pages written in [start, end), and when, sample by sample."""
        lengths = np.array([sample.seconds for sample in self.samples])
        period = float(lengths.sum())
        begins = np.concatenate(([0.0], np.cumsum(lengths)))
        base = start // period * period
        index = min(int(np.searchsorted(begins, start - base, side="right")) - 1, len(self.samples) - 1)
        while base + begins[index] < end:
            sample = self.samples[index]
            times = base + begins[index] + sample.seconds * (sample.pages * _SPREAD % 1.0)
            inside = (times >= start) & (times < end)
            yield sample.pages[inside], times[inside]
            index += 1
            if index == len(self.samples):
                index, base = 0, base + period


@dataclass(frozen=True, slots=True)
class Scenario:
    """How it is migrated.

    Attributes:
        bandwidth: bytes of memory a second that the link moves.
        downtime_limit: seconds.
        clear_chunk: bytes whose log is cleared at once.
        split: whether the log is cleared chunk by chunk, right before pages are read, or all at once at the sync.
        first_bandwidth: bytes a second in the first pass, in which the destination gets its memory; the same if None.
        switchover_bandwidth: bytes a second when the guest stands still; the same if None.
        fixed_downtime: seconds that a switchover takes besides its pages.
        guest_speed: how fast the guest writes meanwhile, as a multiple of its speed in the samples: on a small host a
            migration takes CPU time from it.
    """

    bandwidth: float
    downtime_limit: float = 0.3
    clear_chunk: int = 128 << 20
    split: bool = True
    first_bandwidth: float | None = None
    switchover_bandwidth: float | None = None
    fixed_downtime: float = 0.01
    guest_speed: float = 1.0

    def __post_init__(self) -> None:
        bandwidths = self.bandwidth, self.first_bandwidth, self.switchover_bandwidth
        if any(one is not None and one <= 0 for one in bandwidths):
            raise UsageError("nothing can be migrated without bandwidth")
        if self.clear_chunk < 1:
            raise UsageError(f"a clear chunk of {self.clear_chunk} bytes")
        if not self.guest_speed > 0:
            raise UsageError(f"a guest's speed of {self.guest_speed:g}", remedy="1 is that at which it was watched")


@dataclass(frozen=True, slots=True)
class PredictedPass:
    """One pass: pages sent with contents, seconds, and the pages dirty after it."""

    pages: int
    seconds: float
    dirtied: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """What would come of it.

    Attributes:
        converges: whether the guest would be moved within `MOST_PASSES` and the time asked for.
        total: seconds, downtime included; of what was simulated if it does not converge.
        downtime: seconds; 0 if it does not converge.
        bytes: of memory sent.
        passes: with the guest running.
    """

    converges: bool
    total: float
    downtime: float
    bytes: int
    passes: tuple[PredictedPass, ...]


def predict(workload: Workload, scenario: Scenario, *, give_up: float = float("inf")) -> Prediction:
    """Migrate a workload in computed time.

    Args:
        workload: what is written.
        scenario: how it is migrated.
        give_up: seconds after which a migration does not converge.
    """
    replay = _Replay(workload, scenario)
    passes: list[PredictedPass] = []
    while len(passes) < MOST_PASSES and replay.now < give_up:
        passes.append(replay.run_pass())
        speed = scenario.switchover_bandwidth or scenario.bandwidth
        estimate = Estimate(passes[-1].dirtied, speed, scenario.fixed_downtime)
        if should_switch_over(estimate, scenario.downtime_limit):
            sent = sum(one.pages for one in passes) + estimate.pages
            total = replay.now + estimate.downtime
            return Prediction(True, total, estimate.downtime, sent * PAGE_SIZE, tuple(passes))
    return Prediction(False, replay.now, 0.0, sum(one.pages for one in passes) * PAGE_SIZE, tuple(passes))


class _Replay:
    """Memory and its log in computed time.

    A page is reported if it was written after it was last cleared; `_cleared` says when that was, for each page.
    """

    def __init__(self, workload: Workload, scenario: Scenario) -> None:
        self._workload = workload
        self._page_seconds = PAGE_SIZE / (scenario.first_bandwidth or scenario.bandwidth)
        self._later_page_seconds = PAGE_SIZE / scenario.bandwidth
        self._chunk = align_up(scenario.clear_chunk, 64 * PAGE_SIZE) // PAGE_SIZE
        self._split = scenario.split
        self._speed = scenario.guest_speed
        self._to_send = np.ones(workload.pages, np.bool_)
        self._weights = workload.weights()
        self.now = 0.0

    def run_pass(self) -> PredictedPass:
        began = self.now
        pages = np.flatnonzero(self._to_send)
        sent = np.cumsum(self._weights[pages] if began == 0.0 else np.ones(pages.size))
        sent_at: Times = began + sent * self._page_seconds
        self.now = float(sent_at[-1]) if pages.size else began + self._page_seconds
        dirty = self._written_after(self._clears(pages, sent_at, began), began)
        self._to_send = dirty
        self._page_seconds = self._later_page_seconds
        return PredictedPass(round(float(sent[-1])) if pages.size else 0, self.now - began, int(dirty.sum()))

    def _clears(self, pages: Numbers, sent_at: Times, began: float) -> Times:
        """When each page was last cleared. What the sync did not report is not cleared in the pass either."""
        cleared = np.full(self._workload.pages, began)
        if self._split and pages.size:
            chunks = pages // self._chunk
            first = np.flatnonzero(np.concatenate(([True], chunks[1:] != chunks[:-1])))
            lengths = np.diff(first, append=pages.size)
            cleared[pages] = np.repeat(sent_at[first] - self._page_seconds, lengths)
        return cleared

    def _written_after(self, cleared: Times, began: float) -> Flags:
        dirty = np.zeros(self._workload.pages, np.bool_)
        for pages, times in self._workload.writes(began * self._speed, self.now * self._speed):
            dirty[pages[times >= cleared[pages] * self._speed]] = True
        return dirty

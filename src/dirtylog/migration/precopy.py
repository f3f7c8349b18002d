"""Sending memory while the guest writes it."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from dirtylog.errors import UsageError
from dirtylog.memory import Memory, TrackingReason
from dirtylog.migration.batch import Batch
from dirtylog.migration.lanes import Lanes
from dirtylog.migration.pacer import Pacer
from dirtylog.migration.parameters import Parameters
from dirtylog.migration.ram import DirtyRAM
from dirtylog.migration.sender import Sent
from dirtylog.migration.statistics import PassStatistics, Statistics, sum_ways
from dirtylog.migration.switchover import Estimate, link_bandwidth
from dirtylog.units import MIB, PAGE_SIZE

_FIXED_DOWNTIME: Final = 0.01
"""What a switchover takes besides the pages: stopping vCPUs, saving, sending and loading state. A few milliseconds."""
_TELLING_SIZE: Final = MIB
"""Passes of fewer bytes say more about latency than about bandwidth."""


class Precopy:
    """Sends what is dirty, pass by pass, and knows what is left.

    Args:
        memory: of the machine.
        lanes: to the destination, which has agreed.
        statistics: kept up to date.
        parameters: asked anew for each decision.
        cancelled: ends a pass with CancelledError.
    """

    def __init__(
        self,
        memory: Memory,
        lanes: Lanes,
        statistics: Statistics,
        parameters: Callable[[], Parameters],
        cancelled: threading.Event,
    ) -> None:
        self._memory = memory
        self._lanes = lanes
        self._statistics = statistics
        self._parameters = parameters
        self._paced = True
        self._pacer = Pacer(cancelled.wait, self._limit)
        self._bandwidth = 0.0
        self._logging = False
        chunk = parameters().clear_chunk
        regions = [(region, region.block) for region in memory.ram_regions if region.block is not None]
        self._blocks = [DirtyRAM(index, region, block, chunk) for index, (region, block) in enumerate(regions)]

    def start(self) -> None:
        """Log writes from here on; every page is to be sent.

        Raises:
            UsageError: the memory is logged for a migration already, whose pages this one would take.
        """
        if self._memory.is_wanted(TrackingReason.MIGRATION):
            raise UsageError("the memory is logged for another migration", remedy="wait for its end, or cancel it")
        self._memory.start_logging(TrackingReason.MIGRATION)
        self._logging = True
        self.sync()

    def stop(self) -> None:
        """Log no more; idempotent."""
        if self._logging:
            self._logging = False
            self._memory.stop_logging(TrackingReason.MIGRATION)

    def sync(self, *, last_stage: bool = False) -> int:
        """Find out what was written; how many pages that were not to be sent already."""
        self._memory.sync_dirty_log(last_stage=last_stage)
        fresh = sum(block.harvest() for block in self._blocks)
        self._memory.after_sync()
        self._statistics.remaining_pages = sum(block.pages for block in self._blocks)
        return fresh

    @property
    def blocks(self) -> Sequence[DirtyRAM]:
        """What is left, block by block."""
        return self._blocks

    def send_pass(self, *, paced: bool, stop: Callable[[], bool] = lambda: False) -> None:
        """Send everything that is dirty, or what comes before ``stop`` says so; the destination has it then."""
        current = self._statistics.begin_pass()
        began = time.monotonic()
        self._paced = paced
        self._lanes.begin_pass()
        self._pacer.begin()
        if not paced:
            self._lanes.lift_limit()
        for block in self._blocks:
            for batch in block.batches(stop):
                if paced:
                    self._lanes.limit(self._limit())
                self._count(batch, current)
                self._pacer.pace(self._note(self._lanes.send(batch), current))
                current.seconds = time.monotonic() - began
        sent, current.starved = self._lanes.end_pass(current.number)
        self._pacer.pace(self._note(sent, current))
        current.seconds = time.monotonic() - began
        # Under a limit, threads that get their CPU late only wait less for the limit.
        contents = current.pages * PAGE_SIZE
        bandwidth = link_bandwidth(contents, current.seconds, 0 if self._limit() else current.starved)
        telling = contents >= _TELLING_SIZE
        self._bandwidth = current.bandwidth = bandwidth if telling else max(bandwidth, self._bandwidth)

    def _limit(self) -> int:
        """Bytes a second; 0 for no limit."""
        return self._parameters().max_bandwidth if self._paced else 0

    def _count(self, batch: Batch, current: PassStatistics) -> None:
        zeros, pages = (0 if table is None else table.pages for table in (batch.zeros, batch.pages))
        current.zero_pages += zeros
        current.pages += pages
        self._statistics.remaining_pages -= zeros + pages

    def _note(self, sent: Sent, current: PassStatistics) -> int:
        current.bytes += sent.bytes
        current.ways = sum_ways(current.ways, sent.ways)
        self._statistics.found += sent.found
        self._statistics.missed += sent.missed
        self._statistics.overflowed += sent.overflowed
        return sent.bytes

    def estimate(self) -> Estimate:
        """Find out what was written during the last pass, and what stopping now would mean."""
        current = self._statistics.passes[-1]
        current.dirtied = self.sync()
        self._statistics.dirty_rate = current.dirtied / current.seconds if current.seconds else 0.0
        bandwidth = self._parameters().switchover_bandwidth or self._bandwidth
        estimate = Estimate(self._statistics.remaining_pages, bandwidth, _FIXED_DOWNTIME)
        current.expected_downtime = estimate.downtime
        return estimate

"""What a migration has done so far."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from dirtylog.migration.economy import Way

Ways = dict[Way, tuple[int, int]]
"""Pages with contents, and bytes they took on the wire, by the way they were sent. Never changed, but replaced."""


class Status(Enum):
    """How a migration stands, in QEMU's words."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class DowntimeParts:
    """What the guest stood still for at the switchover, in seconds and in this order.

    Attributes:
        stop: until its vCPUs stood still.
        final_pass: finding and sending the pages that were dirty then.
        state: saving, sending and loading all but memory.
        handover: until the destination said that it starts the guest.
    """

    stop: float
    final_pass: float
    state: float
    handover: float


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


MOST_PASSES: Final = 100
ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


@dataclass(slots=True)
class PassStatistics:
    """One sweep over the pages that were dirty when it began. Times in seconds, the rest in pages and bytes.

    Attributes:
        number: from 1.
        pages: sent with contents.
        zero_pages: sent without.
        bytes: on the wire.
        seconds: until the destination had it all; so far, while it lasts.
        starved: for how much of that one side had work but no CPU.
        dirtied: pages found dirty afterwards.
        ways: pages with contents, and bytes they took on the wire, by the way they were sent.
        bandwidth: bytes of memory a second that the last pass would get, see `switchover.link_bandwidth`.
        expected_downtime: had the guest been stopped after it.
        throttle: percent of its time that was taken from the guest.
    """

    number: int
    pages: int = 0
    zero_pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    starved: float = 0.0
    dirtied: int = 0
    bandwidth: float = 0.0
    expected_downtime: float = 0.0
    throttle: int = 0
    ways: Ways = field(default_factory=dict)


@dataclass(slots=True)
class Statistics:
    """Written by the migration's thread only; others may look at any time.

    Attributes:
        total_bytes: RAM of the machine.
        remaining_pages: to be sent in the current pass.
        passes: the last `MOST_PASSES`, with the current one.
        forgotten: sums of the passes before.
        dirty_rate: pages a second, newly dirtied during the last pass.
        setup_seconds: until the destination agreed.
        total_seconds: from start to end; 0 until then.
        downtime: the guest stood still for this long at the switchover; 0 if it never did. Without `verify_seconds`.
        downtime_parts: what it stood still for; None if it never did.
        downtime_bytes: sent meanwhile, as far as memory goes.
        postcopy_bytes: sent after the guest was handed over.
        postcopy_requests: pages that were asked for then.
        found: pages of which the destination's copy was known, where copies are kept.
        missed: pages of which it was not.
        overflowed: pages whose differences were no shorter than their contents.
        verdict: what is to be expected, after the first pass.
        throttle: percent of its time that is taken from the guest by auto-converge.
        verify_seconds: computing digests took both sides this long in sequence.
        digests: block name → digest, equal on both sides; empty unless asked for.
    """

    total_bytes: int = 0
    remaining_pages: int = 0
    passes: list[PassStatistics] = field(default_factory=list)
    forgotten: PassStatistics = field(default_factory=lambda: PassStatistics(0))
    dirty_rate: float = 0.0
    setup_seconds: float = 0.0
    total_seconds: float = 0.0
    downtime: float = 0.0
    downtime_parts: DowntimeParts | None = None
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    postcopy_requests: int = 0
    found: int = 0
    missed: int = 0
    overflowed: int = 0
    verdict: Verdict | None = None
    throttle: int = 0
    verify_seconds: float = 0.0
    digests: dict[str, bytes] = field(default_factory=dict)

    def begin_pass(self) -> PassStatistics:
        """A new pass, the last one from now on. A migration that does not converge has many: old ones are summed up."""
        current = PassStatistics(self.pass_count + 1, throttle=self.throttle)
        if len(self.passes) >= MOST_PASSES:
            oldest = self.passes.pop(0)
            self.forgotten.pages += oldest.pages
            self.forgotten.zero_pages += oldest.zero_pages
            self.forgotten.bytes += oldest.bytes
            self.forgotten.ways = sum_ways(self.forgotten.ways, oldest.ways)
        self.passes.append(current)
        return current

    @property
    def pass_count(self) -> int:
        """How many passes were begun."""
        return self.passes[-1].number if self.passes else 0

    @property
    def pages(self) -> int:
        """Pages sent with contents."""
        return self.forgotten.pages + sum(one.pages for one in self.passes)

    @property
    def zero_pages(self) -> int:
        """Pages sent without."""
        return self.forgotten.zero_pages + sum(one.zero_pages for one in self.passes)

    @property
    def bytes(self) -> int:
        """Bytes sent."""
        return self.forgotten.bytes + sum(one.bytes for one in self.passes)

    @property
    def ways(self) -> Ways:
        """Pages with contents, and bytes they took, by the way they were sent."""
        return sum_ways(*(one.ways for one in (self.forgotten, *self.passes)))


def sum_ways(*parts: Ways) -> Ways:
    """What was sent in each way, in all."""
    total: Ways = {}
    for part in parts:
        for way, (pages, size) in part.items():
            old_pages, old_size = total.get(way, (0, 0))
            total[way] = old_pages + pages, old_size + size
    return total

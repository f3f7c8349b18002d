"""When to stop the guest: pure functions of counters."""

from dataclasses import dataclass
from typing import Final

from dirtylog.units import PAGE_SIZE

MARGIN: Final = 0.9
"""The share of the limit that the estimate may take; the rest is for what it cannot know."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What stopping now would mean.

    Attributes:
        pages: left to send with the guest stopped.
        bandwidth: bytes a second that they would get; 0 if nothing is known.
        fixed: seconds that the switchover takes besides.
    """

    pages: int
    bandwidth: float
    fixed: float = 0.0

    @property
    def downtime(self) -> float:
        """Seconds; infinite if nothing is known of the link."""
        if not self.pages:
            return self.fixed
        return self.fixed + self.pages * PAGE_SIZE / self.bandwidth if self.bandwidth else float("inf")


def should_switch_over(estimate: Estimate, limit: float) -> bool:
    """Whether the guest would stand still no longer than ``limit`` seconds. With nothing left to send, always."""
    return not estimate.pages or estimate.downtime <= limit * MARGIN


def link_bandwidth(size: int, seconds: float, starved: float) -> float:
    """Bytes a second of a pass as it would be with the guest stopped.

    A pass on a busy host is slower than the one at the switchover: the guest's vCPUs take CPU from the threads that
    send and receive. The kernel says for how long a thread was ready to run but had no CPU (schedstat, run delay). That
    time falls away when the guest stands still; waiting for the link does not.

    Args:
        size: bytes of the pass.
        seconds: it took, until all was received.
        starved: seconds without CPU on the side that had more of them.
    """
    if size <= 0 or seconds <= 0:
        return 0.0
    return size / max(seconds - starved, seconds * 0.1)

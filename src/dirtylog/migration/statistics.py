"""What a migration has done so far."""

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """How a migration stands, in QEMU's words."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


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
        bandwidth: bytes a second that the last pass would get, see `switchover.link_bandwidth`.
        expected_downtime: had the guest been stopped after it.
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


@dataclass(slots=True)
class Statistics:
    """Written by the migration's thread only; others may look at any time.

    Attributes:
        total_bytes: RAM of the machine.
        remaining_pages: to be sent in the current pass.
        passes: finished ones and the current one.
        dirty_rate: pages a second, newly dirtied during the last pass.
        setup_seconds: until the destination agreed.
        total_seconds: from start to end, or to now.
        downtime: the guest stood still for this long at the switchover; 0 if it never did. Without `verify_seconds`.
        verify_seconds: computing digests took both sides this long in sequence.
        digests: block name → digest, equal on both sides; empty unless asked for.
    """

    total_bytes: int = 0
    remaining_pages: int = 0
    passes: list[PassStatistics] = field(default_factory=list)
    dirty_rate: float = 0.0
    setup_seconds: float = 0.0
    total_seconds: float = 0.0
    downtime: float = 0.0
    verify_seconds: float = 0.0
    digests: dict[str, bytes] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Pages sent with contents."""
        return sum(one.pages for one in self.passes)

    @property
    def zero_pages(self) -> int:
        """Pages sent without."""
        return sum(one.zero_pages for one in self.passes)

    @property
    def bytes(self) -> int:
        """Bytes sent."""
        return sum(one.bytes for one in self.passes)

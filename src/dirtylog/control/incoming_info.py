"""What query-migrate tells, on the destination, of a guest that ran before all of its memory had arrived.

Names are QEMU's (qapi/migration.json); what it does not have starts with ``x-``.
"""

from typing import Final

from msgspec import Struct

from dirtylog.migration import IncomingMigration
from dirtylog.units import PAGE_SIZE

_MILLISECONDS: Final = 1e3
_MICROSECONDS: Final = 1e6
_NANOSECONDS: Final = 1e9


class IncomingInfo(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """How the destination of a postcopy migration stands.

    postcopy-blocktime: milliseconds that all vCPUs waited at the same time. postcopy-vcpu-blocktime: that each waited.
    postcopy-latency: nanoseconds that a page was waited for, on average; x-postcopy-latency-median and -99 are
    microseconds, and not exceeded by half and by 99 % of those who waited. x-postcopy-requests: how many waited.
    x-remaining: bytes that the guest lacks.
    """

    status: str
    postcopy_blocktime: int
    postcopy_vcpu_blocktime: list[int]
    postcopy_latency: int
    x_postcopy_latency_median: float
    x_postcopy_latency_99: float
    x_postcopy_requests: int
    x_remaining: int
    error_desc: str | None = None


def describe_incoming(incoming: IncomingMigration) -> IncomingInfo | None:
    """A migration to here as query-migrate shows it; None if it cannot be postcopy."""
    blocktime = incoming.blocktime
    if blocktime is None:
        return None
    return IncomingInfo(
        status=incoming.status.value,
        postcopy_blocktime=round(blocktime.blocked * _MILLISECONDS),
        postcopy_vcpu_blocktime=[round(seconds * _MILLISECONDS) for seconds in blocktime.vcpu_blocked],
        postcopy_latency=round(blocktime.mean * _NANOSECONDS),
        x_postcopy_latency_median=blocktime.quantile(0.5) * _MICROSECONDS,
        x_postcopy_latency_99=blocktime.quantile(0.99) * _MICROSECONDS,
        x_postcopy_requests=blocktime.requests,
        x_remaining=incoming.owed * PAGE_SIZE,
        error_desc=None if incoming.lost is None else str(incoming.lost),
    )

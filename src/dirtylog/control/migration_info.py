"""What query-migrate tells of a migration, in QEMU's words (qapi/migration.json).

What QEMU does not have starts with ``x-``.
"""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct, field

from dirtylog.machine import DirtyLimit
from dirtylog.migration import DowntimeParts, OutgoingMigration, PassStatistics, Statistics, Status, Verdict
from dirtylog.migration.economy import Way
from dirtylog.migration.statistics import Ways
from dirtylog.units import PAGE_SIZE

_MILLISECONDS: Final = 1e3
_MICROSECONDS: Final = 1e6
_MEGABIT: Final = 1e6


class RAMInfo(Struct, frozen=True, rename="kebab"):
    """MigrationStats: bytes, pages where the name says so, rates a second.

    What was sent while the guest ran here (precopy-bytes), while it stood still (downtime-bytes), and while it ran
    there (postcopy-bytes) add up to transferred. postcopy-requests: pages that it waited for there.
    multifd-bytes is how much of that went through several channels: all or nothing.
    """

    transferred: int
    remaining: int
    total: int
    duplicate: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    page_size: int
    pages_per_second: int
    multifd_bytes: int
    precopy_bytes: int
    downtime_bytes: int
    postcopy_bytes: int = 0
    postcopy_requests: int = 0


class XBZRLECacheInfo(Struct, frozen=True, rename="kebab"):
    """XBZRLECacheStats, of pages sent as differences; they are encoded by zstd here.

    cache-miss: pages of which no copy was kept. overflow: pages whose difference was no shorter than their contents.
    """

    cache_size: int
    bytes: int
    pages: int
    cache_miss: int
    cache_miss_rate: float
    encoding_rate: float
    overflow: int


class WayInfo(Struct, frozen=True, rename="kebab"):
    """Pages that were sent in one way, the bytes they took, and how many less that is than their contents have."""

    pages: int
    bytes: int
    saved: int


class PassInfo(Struct, frozen=True, rename="kebab", omit_defaults=True):
    """One pass, for x-passes: see `migration.PassStatistics`. Times in seconds; expected-downtime may be unknown."""

    number: int
    pages: int
    zero_pages: int
    bytes: int
    seconds: float
    starved: float
    dirtied: int
    bandwidth: float
    expected_downtime: float | None
    throttle: int = 0
    ways: dict[str, WayInfo] = field(default_factory=dict)


class DowntimePartsInfo(Struct, frozen=True, rename="kebab"):
    """What the guest stood still for, in this order, in microseconds: see `migration.DowntimeParts`."""

    stop: int
    final_pass: int
    state: int
    handover: int


class VerdictInfo(Struct, frozen=True, kw_only=True, rename="kebab"):
    """What is to be expected if all goes on as it does, for x-verdict: see `migration.Verdict`.

    converges: null while it is too early to tell. seconds, downtime and what would be needed: null for never, or for
    more than can be had. needed-throttle in percent.
    """

    converges: bool | None
    seconds: float | None
    downtime: float | None
    needed_limit: float | None
    needed_bandwidth: float | None
    needed_throttle: float


class MigrationInfo(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """Result of query-migrate if there was a migration. Times in milliseconds where the name does not say else.

    cpu-throttle-percentage is there while auto-converge throttles, the two about dirty-limit while that limits.
    xbzrle-cache is there if differences are allowed. x-passes has the last `MOST_PASSES` passes, in order; x-ways what
    became of all pages with contents; x-digests is there after a migration that compared memory.
    """

    status: str
    total_time: int
    setup_time: int
    ram: RAMInfo
    xbzrle_cache: XBZRLECacheInfo | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    cpu_throttle_percentage: int | None = None
    dirty_limit_throttle_time_per_round: int | None = None
    dirty_limit_ring_full_time: int | None = None
    error_desc: str | None = None
    x_verdict: VerdictInfo | None = None
    x_passes: list[PassInfo]
    x_ways: dict[str, WayInfo] = field(default_factory=dict)
    x_downtime_us: int | None = None
    x_downtime_parts: DowntimePartsInfo | None = None
    x_verify_us: int | None = None
    x_digests: dict[str, str] | None = None


def describe(outgoing: OutgoingMigration) -> MigrationInfo:
    """A migration as query-migrate shows it."""
    status = outgoing.status  # first: what it stands for was in place before it
    statistics, completed = outgoing.statistics, status is Status.COMPLETED
    passes, limits = list(statistics.passes), outgoing.dirty_limits
    expected = None if outgoing.ended else next(filter(None, map(_expected_downtime, reversed(passes))), None)
    return MigrationInfo(
        status=status.value,
        total_time=ms(outgoing.elapsed),
        setup_time=ms(statistics.setup_seconds),
        expected_downtime=None if expected is None else ms(expected),
        downtime=ms(statistics.downtime) if completed else None,
        cpu_throttle_percentage=statistics.throttle or None,
        dirty_limit_throttle_time_per_round=_us(max(limit.penalty for limit in limits)) if limits else None,
        dirty_limit_ring_full_time=_ring_full_us(limits) if limits else None,
        x_verdict=_verdict_info(statistics.verdict),
        error_desc=_error(outgoing, status),
        ram=_ram_info(outgoing, passes),
        xbzrle_cache=_cache_info(outgoing.agreed.delta_cache, statistics),
        x_passes=[_pass_info(one) for one in passes],
        x_ways=_ways_info(statistics.ways),
        x_downtime_us=_us(statistics.downtime) if completed else None,
        x_downtime_parts=_parts_info(statistics.downtime_parts) if completed else None,
        x_verify_us=_us(statistics.verify_seconds) if statistics.digests else None,
        x_digests={name: digest.hex() for name, digest in statistics.digests.items()} or None,
    )


def _error(outgoing: OutgoingMigration, status: Status) -> str | None:
    if status in (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER):
        return None if outgoing.lost is None else str(outgoing.lost)
    return str(outgoing.error) if status is Status.FAILED else None


def _ring_full_us(limits: Sequence[DirtyLimit]) -> int:
    """On average, of the vCPUs that fill their rings at all."""
    times = [limit.ring_full for limit in limits if limit.ring_full]
    return _us(sum(times) / len(times)) if times else 0


def _verdict_info(verdict: Verdict | None) -> VerdictInfo | None:
    if verdict is None:
        return None
    return VerdictInfo(
        converges=verdict.converges,
        seconds=_finite(verdict.seconds),
        downtime=_finite(verdict.downtime),
        needed_limit=_finite(verdict.needed_limit),
        needed_bandwidth=_finite(verdict.needed_bandwidth),
        needed_throttle=round(verdict.needed_throttle * 100, 1),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def ms(seconds: float) -> int:
    """Milliseconds."""
    return round(seconds * _MILLISECONDS)


def _us(seconds: float) -> int:
    return round(seconds * _MICROSECONDS)


def _ram_info(outgoing: OutgoingMigration, passes: Sequence[PassStatistics]) -> RAMInfo:
    statistics = outgoing.statistics
    transferred, standing = statistics.bytes, statistics.downtime_bytes
    rate = _rate(outgoing, passes)
    return RAMInfo(
        transferred=transferred,
        remaining=0 if outgoing.status is Status.COMPLETED else statistics.remaining_pages * PAGE_SIZE,
        total=statistics.total_bytes,
        duplicate=statistics.zero_pages,
        normal=statistics.pages,
        normal_bytes=statistics.pages * PAGE_SIZE,
        dirty_pages_rate=round(statistics.dirty_rate),
        mbps=rate * 8 / _MEGABIT,
        dirty_sync_count=outgoing.statistics.pass_count,
        page_size=PAGE_SIZE,
        pages_per_second=round(rate / PAGE_SIZE),
        multifd_bytes=transferred if outgoing.agreed.channels > 1 else 0,
        precopy_bytes=transferred - standing - statistics.postcopy_bytes,
        downtime_bytes=standing,
        postcopy_bytes=statistics.postcopy_bytes,
        postcopy_requests=statistics.postcopy_requests,
    )


def _rate(outgoing: OutgoingMigration, passes: Sequence[PassStatistics]) -> float:
    """Bytes a second: on average if it has ended, else lately."""
    if outgoing.ended and outgoing.elapsed:
        return outgoing.statistics.bytes / outgoing.elapsed
    latest = next((one for one in reversed(passes) if one.seconds), None)
    return 0.0 if latest is None else latest.bandwidth or latest.bytes / latest.seconds


def _cache_info(size: int, statistics: Statistics) -> XBZRLECacheInfo | None:
    if not size:
        return None
    pages, sent = statistics.ways.get(Way.DELTA, (0, 0))
    looked_up = statistics.found + statistics.missed
    return XBZRLECacheInfo(
        cache_size=size,
        bytes=sent,
        pages=pages,
        cache_miss=statistics.missed,
        cache_miss_rate=statistics.missed / looked_up if looked_up else 0.0,
        encoding_rate=pages * PAGE_SIZE / sent if sent else 0.0,
        overflow=statistics.overflowed,
    )


def _ways_info(ways: Ways) -> dict[str, WayInfo]:
    return {way.value: WayInfo(pages, size, max(0, pages * PAGE_SIZE - size)) for way, (pages, size) in ways.items()}


def _parts_info(parts: DowntimeParts | None) -> DowntimePartsInfo | None:
    if parts is None:
        return None
    return DowntimePartsInfo(_us(parts.stop), _us(parts.final_pass), _us(parts.state), _us(parts.handover))


def _expected_downtime(one: PassStatistics) -> float | None:
    """Seconds, if anything is known of the link."""
    return one.expected_downtime if 0 < one.expected_downtime < math.inf else None


def _pass_info(one: PassStatistics) -> PassInfo:
    return PassInfo(
        number=one.number,
        pages=one.pages,
        zero_pages=one.zero_pages,
        bytes=one.bytes,
        seconds=one.seconds,
        starved=one.starved,
        dirtied=one.dirtied,
        bandwidth=one.bandwidth,
        expected_downtime=_expected_downtime(one),
        throttle=one.throttle,
        ways=_ways_info(one.ways),
    )

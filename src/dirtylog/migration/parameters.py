"""What a user may set about a migration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Final

from dirtylog.errors import UsageError
from dirtylog.migration.convergence import ThrottleParameters
from dirtylog.migration.messages import MAX_CHANNELS
from dirtylog.units import MIB, PAGE_SIZE

MAX_DOWNTIME_LIMIT: Final = 2000.0
"""QEMU's upper bound, in seconds."""


class Compression(Enum):
    """Whether contents may be compressed."""

    NONE = "none"
    AUTO = "auto"


class Slowdown(Enum):
    """What is done about a guest that dirties memory faster than it is sent."""

    NONE = "none"
    AUTO_CONVERGE = "auto-converge"
    DIRTY_LIMIT = "dirty-limit"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Immutable; a running migration is given a new one, which may differ in all but `AGREED`.

    Attributes:
        downtime_limit: how long the guest may stand still at the switchover, in seconds. About 11 ms of it are set
            aside for what is not memory: with less, the guest is stopped only once nothing is dirty.
        max_bandwidth: bytes a second while the guest runs; 0 for no limit. At the switchover there is none.
        max_postcopy_bandwidth: bytes a second once the guest was handed over before its memory; 0 for no limit. What
            it waits for comes at once.
        switchover_bandwidth: bytes a second that the switchover will have, for the estimate of the downtime; 0 to go by
            what was measured.
        clear_chunk: bytes whose log is cleared at once, right before the first of its pages is read; rounded up to
            whole 64-page words.
        verify: compare a digest of every block at the switchover. That takes time with the guest stopped, which is
            reported apart from the downtime.
        share_memory: hand the memory over by its files' descriptors, to a process on this host, and copy nothing.
        channels: parallel connections.
        compression: whether zstd may be used where it saves time.
        delta_cache: bytes of copies kept of what was sent, so that what changed a little is sent as a difference, where
            that saves time; 0 for none.
        postcopy: whether the guest may be handed over before all of its memory.
        postcopy_after: so many passes that do not converge have that done; 0 for only when asked to.
        pause_before_switchover: wait, with the guest stopped, until told to go on.
        slowdown: whether all vCPUs are throttled, step by step, or those that write more than ``vcpu_dirty_limit``,
            once the guest has dirtied too much in two periods of a second.
        throttle: how much is too much, and how far to go in each step.
        vcpu_dirty_limit: MiB a second that each vCPU may write then.
        dirty_limit_period: seconds between two adjustments to that.
        tls_creds: the directory of the `Credentials` for a `TLSAddress`; empty for none.
        tls_hostname: the name that the destination's certificate must have; empty for that of its address.

    Raises:
        UsageError: a value is out of range.
    """

    AGREED: ClassVar = frozenset(
        {
            *(
                "clear_chunk",
                "verify",
                "share_memory",
                "channels",
                "compression",
                "delta_cache",
                "slowdown",
                "postcopy",
            ),
            *("tls_creds", "tls_hostname"),
        }
    )
    """What cannot change any more once a migration has begun."""

    downtime_limit: float = 0.3
    max_bandwidth: int = 0
    max_postcopy_bandwidth: int = 0
    switchover_bandwidth: int = 0
    clear_chunk: int = 128 * MIB
    verify: bool = False
    share_memory: bool = False
    channels: int = 1
    compression: Compression = Compression.NONE
    delta_cache: int = 0
    postcopy: bool = False
    postcopy_after: int = 0
    pause_before_switchover: bool = False
    slowdown: Slowdown = Slowdown.NONE
    throttle: ThrottleParameters = field(default_factory=ThrottleParameters)
    vcpu_dirty_limit: int = 1
    dirty_limit_period: float = 1.0
    tls_creds: str = ""
    tls_hostname: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.downtime_limit <= MAX_DOWNTIME_LIMIT:
            raise UsageError(f"a downtime limit of {self.downtime_limit} s", remedy="it may be 0 to 2000 s")
        for bandwidth, zero in (
            (self.max_bandwidth, "no limit"),
            (self.max_postcopy_bandwidth, "no limit"),
            (self.switchover_bandwidth, "as measured"),
        ):
            if not 0 <= bandwidth < 1 << 63:
                raise UsageError(f"a bandwidth of {bandwidth} bytes a second", remedy=f"0 means {zero}")
        if not 1 <= self.clear_chunk < 1 << 63:
            raise UsageError(f"a clear chunk of {self.clear_chunk} bytes", remedy="128M is usual")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"{self.channels} channels", remedy=f"1 to {MAX_CHANNELS} can be had")
        if self.delta_cache and not PAGE_SIZE <= self.delta_cache < 1 << 63:
            raise UsageError(f"a cache of {self.delta_cache} bytes", remedy="64M is usual; 0 means none")
        if not 0 <= self.postcopy_after < 1 << 31:
            raise UsageError(f"postcopy after {self.postcopy_after} passes", remedy="0 means only when asked to")
        if not 1 <= self.vcpu_dirty_limit < 1 << 32:
            raise UsageError(f"a dirty limit of {self.vcpu_dirty_limit} MiB/s", remedy="1 MiB/s is the lowest")
        if not 0.001 <= self.dirty_limit_period <= 1:
            raise UsageError(
                f"a period of {self.dirty_limit_period} s for the dirty limit", remedy="it may be 1 to 1000 ms"
            )

"""What operators set about migrations, as QEMU divides it: capabilities that are on or off, and parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from dirtylog.errors import UsageError
from dirtylog.migration import Parameters, Slowdown
from dirtylog.units import MIB


class Capability(Enum):
    """What can be switched on, in QEMU's words.

    Two change nothing, and are there for clients that switch them on: postcopy always has a channel of its own for what
    the guest waits for, and always measures for how long it does.
    """

    XBZRLE = "xbzrle"
    AUTO_CONVERGE = "auto-converge"
    EVENTS = "events"
    MULTIFD = "multifd"
    DIRTY_LIMIT = "dirty-limit"
    POSTCOPY = "postcopy-ram"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    PAUSE = "pause-before-switchover"


_DEFAULTS: Final = Parameters(channels=2, delta_cache=64 * MIB)
"""QEMU's, where it has such a parameter."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Immutable, as `Parameters` are.

    Attributes:
        parameters: as they were set. How many channels there are, and how large the cache of copies is, counts only
            where `Capability.MULTIFD` and `Capability.XBZRLE` are on.
        capabilities: what is on.
    """

    parameters: Parameters = _DEFAULTS
    capabilities: frozenset[Capability] = frozenset()

    @property
    def effective(self) -> Parameters:
        """The parameters of a migration with these settings."""
        return replace(
            self.parameters,
            channels=self.parameters.channels if Capability.MULTIFD in self.capabilities else 1,
            delta_cache=self.parameters.delta_cache if Capability.XBZRLE in self.capabilities else 0,
            slowdown=self._slowdown,
            postcopy=Capability.POSTCOPY in self.capabilities,
            pause_before_switchover=Capability.PAUSE in self.capabilities,
        )

    @property
    def _slowdown(self) -> Slowdown:
        if Capability.DIRTY_LIMIT in self.capabilities:
            return Slowdown.DIRTY_LIMIT
        return Slowdown.AUTO_CONVERGE if Capability.AUTO_CONVERGE in self.capabilities else Slowdown.NONE

    def with_capabilities(self, changes: Mapping[Capability, bool]) -> "Settings":
        """Settings in which some capabilities are switched.

        Raises:
            UsageError: two are on that exclude each other.
        """
        on = self.capabilities - changes.keys() | {capability for capability, state in changes.items() if state}
        if {Capability.AUTO_CONVERGE, Capability.DIRTY_LIMIT} <= on:
            raise UsageError("auto-converge and dirty-limit exclude each other", remedy="switch one of them off")
        return replace(self, capabilities=on)

    def with_parameters(self, **changes: Any) -> "Settings":
        """Settings in which some parameters are others; ``throttle`` may be a mapping of what is to change in it.

        Raises:
            UsageError: a value is out of range.
        """
        throttle = changes.get("throttle")
        if isinstance(throttle, Mapping):
            changes["throttle"] = replace(self.parameters.throttle, **throttle)
        return replace(self, parameters=replace(self.parameters, **changes))

    def check_change(self, new: "Settings") -> None:
        """Refuse new settings that a migration under way with these could not follow.

        Raises:
            UsageError: they differ in what was agreed on when it began.
        """
        before, after = self.effective, new.effective
        for name in sorted(Parameters.AGREED):
            if getattr(before, name) != getattr(after, name):
                raise UsageError(
                    f"the {name.replace('_', ' ')} of a migration that is under way cannot be changed",
                    remedy="wait for its end, or cancel it with migrate_cancel",
                )

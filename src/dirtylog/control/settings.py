"""What operators set about migrations, as QEMU divides it: capabilities that are on or off, and parameters."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from dirtylog.errors import UsageError
from dirtylog.migration import Parameters
from dirtylog.units import MIB


class Capability(Enum):
    """What can be switched on, in QEMU's words."""

    XBZRLE = "xbzrle"
    EVENTS = "events"
    MULTIFD = "multifd"


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
        )

    def with_parameters(self, **changes: Any) -> "Settings":
        """Settings in which some parameters are others.

        Raises:
            UsageError: a value is out of range.
        """
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

"""Which pages of memory were written, and what that is good for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dirtylog.trackers.watch import Watch, Written, watch, zeros

__version__ = "0.1.0"

__all__ = ["Watch", "Written", "watch", "zeros"]


def __getattr__(name: str) -> object:
    """Load what `__all__` names when it is first used: the command line shall not wait for numpy to show its help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module("dirtylog.trackers.watch"), name)
    return found

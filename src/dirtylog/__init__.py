"""Which pages of memory were written, and what that is good for."""

from dirtylog.trackers.watch import Watch, Written, watch, zeros

__version__ = "0.1.0"

__all__ = ["Watch", "Written", "watch", "zeros"]

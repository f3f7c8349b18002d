"""Which pages of memory were written, and what that is good for."""

__version__ = "0.1.0"

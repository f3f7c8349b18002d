"""Signals, where Python's own `signal` takes longer than the call that they must not interrupt."""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_libc = ctypes.CDLL(None)
_libc.pthread_sigmask.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.pthread_sigmask.restype = ctypes.c_int

_SET_BYTES: Final = 128
"""sigset_t of glibc and musl; both leave out those that they use themselves."""
_ALL: Final = b"\xff" * _SET_BYTES


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Have all signals to this thread wait meanwhile.

    `signal.pthread_sigmask` makes a member of an enumeration of each signal that is or was blocked, which takes 0.1 ms.
    """
    before = ctypes.create_string_buffer(_SET_BYTES)
    _libc.pthread_sigmask(signal.SIG_BLOCK, _ALL, before)
    try:
        yield
    finally:
        _libc.pthread_sigmask(signal.SIG_SETMASK, before, None)

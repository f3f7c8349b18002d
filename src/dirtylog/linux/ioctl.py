"""ioctl request numbers computed from the argument's size, and the one place that turns errno into an error.

The encoding is that of ``include/uapi/asm-generic/ioctl.h``: direction (2 bits), size (14), group (8), number (8).
"""

import ctypes
import fcntl
import os
from typing import Any, NamedTuple

from dirtylog.errors import KernelError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_libc.ioctl.restype = ctypes.c_int

_WRITE = 1
_READ = 2
_MOST_UNLOCKED = 1024
"""fcntl.ioctl keeps the interpreter lock where a buffer is longer. Who waits in the kernel for memory that another
thread is to fetch would wait for ever then."""

TypeOrSize = int | type[ctypes.Structure]


class Request(NamedTuple):
    """An ioctl request: its name in the kernel's headers, for messages, and its number."""

    name: str
    code: int


def _encode(direction: int, group: int | str, number: int, argument: TypeOrSize) -> int:
    size = argument if isinstance(argument, int) else ctypes.sizeof(argument)
    if not 0 <= size < 1 << 14:
        raise ValueError(f"an ioctl argument of {size} bytes cannot be encoded")
    letter = ord(group) if isinstance(group, str) else group
    return direction << 30 | size << 16 | letter << 8 | number


def io(name: str, group: int | str, number: int) -> Request:
    """A request without an argument, or with a plain integer."""
    return Request(name, _encode(0, group, number, 0))


def ior(name: str, group: int | str, number: int, argument: TypeOrSize) -> Request:
    """A request whose argument the kernel fills."""
    return Request(name, _encode(_READ, group, number, argument))


def iow(name: str, group: int | str, number: int, argument: TypeOrSize) -> Request:
    """A request whose argument the kernel reads."""
    return Request(name, _encode(_WRITE, group, number, argument))


def iowr(name: str, group: int | str, number: int, argument: TypeOrSize) -> Request:
    """A request whose argument the kernel reads and fills."""
    return Request(name, _encode(_READ | _WRITE, group, number, argument))


def kernel_error(call: str, error: OSError, *, remedy: str | None = None) -> KernelError:
    """The dirtylog error for a failed system call."""
    return KernelError(call, error.errno or 0, error.strerror or str(error), remedy=remedy)


def ioctl(fd: int, request: Request, argument: Any = 0) -> int:
    """Call ioctl without the interpreter lock; return its non-negative result.

    Args:
        fd: the file.
        request: what to ask.
        argument: an integer, or a writable buffer that the kernel may read and fill in place.

    Raises:
        KernelError: the kernel refused.
        InterruptedError: a signal arrived first. Only calls that wait can raise it, and those expect it.
    """
    if not isinstance(argument, int) and memoryview(argument).nbytes > _MOST_UNLOCKED:
        return ioctl_unsigned(fd, request, ctypes.addressof(ctypes.c_char.from_buffer(argument)))
    try:
        result: int = fcntl.ioctl(fd, request.code, argument)
        return result
    except InterruptedError:
        raise
    except OSError as error:
        raise kernel_error(request.name, error) from error


def ioctl_unsigned(fd: int, request: Request, argument: int) -> int:
    """Call ioctl with an unsigned integer, which ``fcntl.ioctl`` takes only up to 2**31 - 1."""
    result: int = _libc.ioctl(fd, request.code, argument)
    if result == -1:
        code = ctypes.get_errno()
        raise kernel_error(request.name, OSError(code, os.strerror(code)))
    return result

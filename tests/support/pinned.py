"""Memory that others than the CPU write: pages given to the kernel, and a device's."""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
from support.require import require

from dirtylog.units import PAGE_SIZE

_IO_URING_SETUP: Final = 425  # these numbers are the same on all processors
_IO_URING_ENTER: Final = 426
_IO_URING_REGISTER: Final = 427
_REGISTER_BUFFERS: Final = 0
_READ_FIXED: Final = 4
_GETEVENTS: Final = 1
_OFFSET_OF_ENTRIES: Final = 0x1000_0000
_PERF_EVENT_OPEN: Final = 298  # on x86-64
_PERF_TYPE_SOFTWARE: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, number: int, *arguments: int) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    require(name, result >= 0, f"{name} is not to be had here: {os.strerror(ctypes.get_errno())}")
    return result


class ReadsIntoRegisteredBuffer:
    """An io_uring that holds on to the pages of an array (include/uapi/linux/io_uring.h)."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array
        parameters = (ctypes.c_uint8 * 120)()
        self._fd = _call("io_uring", _IO_URING_SETUP, 1, ctypes.addressof(parameters))
        _, tail, _, _, _, _, numbers = struct.unpack_from("<7I", parameters, 40)
        with mmap.mmap(self._fd, numbers + 4) as ring:
            ring[numbers : numbers + 4] = struct.pack("<I", 0)
            ring[tail : tail + 4] = struct.pack("<I", 1)
        vector = (ctypes.c_uint64 * 2)(array.ctypes.data, array.nbytes)
        _call("io_uring", _IO_URING_REGISTER, self._fd, _REGISTER_BUFFERS, ctypes.addressof(vector), 1)

    def close(self) -> None:
        os.close(self._fd)

    def read_zeros(self, offset: int, size: int) -> None:
        """Have the kernel read /dev/zero into a part of the array."""
        with open("/dev/zero", "rb") as zeros, mmap.mmap(self._fd, 64, offset=_OFFSET_OF_ENTRIES) as entry:
            address = self._array.ctypes.data + offset
            entry[:] = struct.pack("<BBHiQQIIQHHiQQ", _READ_FIXED, 0, 0, zeros.fileno(), 0, address, size, *[0] * 7)
            assert _call("io_uring", _IO_URING_ENTER, self._fd, 1, 1, _GETEVENTS, 0, 0) == 1


@contextmanager
def device_memory() -> Iterator[mmap.mmap]:
    """Memory that the kernel maps as a device's: the ring of a perf event (since Linux 6.14)."""
    require("perf-ring", os.uname().machine == "x86_64", "the number of perf_event_open is not known")
    attributes = (ctypes.c_uint8 * 128)()
    struct.pack_into("<II", attributes, 0, _PERF_TYPE_SOFTWARE, len(attributes))
    fd = _call("perf-ring", _PERF_EVENT_OPEN, ctypes.addressof(attributes), 0, -1, -1, 0)
    try:
        with mmap.mmap(fd, 2 * PAGE_SIZE) as memory:
            yield memory
    finally:
        os.close(fd)

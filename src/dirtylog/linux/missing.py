"""Memory that is not there yet: userfaultfd's missing faults, from ``include/uapi/linux/userfaultfd.h``.

Who touches an absent page waits in the kernel until somebody puts contents there, whole pages at a time: nobody sees a
page that is half filled. For shared memory a page is absent while the file has a hole there.
"""

import ctypes
import errno
import os
import struct
from typing import Final, NamedTuple, Self

from dirtylog.errors import HostError, KernelError
from dirtylog.linux.ioctl import ioctl, ior, iowr
from dirtylog.linux.userfaultfd import API, Access, Feature, RangeArgument, RegisterMode, Userfaultfd
from dirtylog.units import PAGE_SIZE

_EVENT_PAGEFAULT: Final = 0x12
_MESSAGE: Final = struct.Struct("<B7xQQI4x")
"""struct uffd_msg of a page fault: event, flags, address, thread."""
_MOST_MESSAGES: Final = 64


class _CopyArgument(ctypes.Structure):
    """struct uffdio_copy."""

    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class _ZeroArgument(ctypes.Structure):
    """struct uffdio_zeropage."""

    _fields_ = (("range", RangeArgument), ("mode", ctypes.c_uint64), ("zeropage", ctypes.c_int64))


UFFDIO_WAKE: Final = ior("UFFDIO_WAKE", API, 0x02, RangeArgument)
UFFDIO_COPY: Final = iowr("UFFDIO_COPY", API, 0x03, _CopyArgument)
UFFDIO_ZEROPAGE: Final = iowr("UFFDIO_ZEROPAGE", API, 0x04, _ZeroArgument)


class Fault(NamedTuple):
    """Somebody waits for a page.

    Attributes:
        address: of the page.
        thread: who waits; 0 if it is another process's, or the kernel's.
    """

    address: int
    thread: int


class MissingFaults:
    """Faults on shared memory that is absent, and the means to end them. Owns its descriptor.

    Attributes:
        of_kernel: whether faults that the kernel takes are served, too. KVM takes its guests' faults in the kernel;
            where they are not served, the guest ends with an error.

    Raises:
        HostError: the host does not let this process have that.
    """

    def __init__(self) -> None:
        self._uffd = Userfaultfd(Feature.MISSING_SHMEM | Feature.THREAD_ID)
        self.of_kernel = self._uffd.access is not Access.USER_MODE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, readable while there are faults that were not read."""
        return self._uffd.fd

    def register(self, address: int, size: int) -> None:
        """From here on whoever touches an absent page of a mapping waits.

        Raises:
            AlreadyWatchedError: another userfaultfd has some of it.
            UntrackableError: it is not mapped, or not shared memory.
        """
        self._uffd.register(address, size, RegisterMode.MISSING)

    def unregister(self, address: int, size: int) -> None:
        """End that. Who waits goes on, and finds zeros where pages are absent still."""
        self._uffd.unregister(address, size)

    def read(self) -> list[Fault]:
        """The faults since the last call; does not wait for any."""
        try:
            data = os.read(self._uffd.fd, _MESSAGE.size * _MOST_MESSAGES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise HostError(f"page faults cannot be read any more: {error.strerror}") from error
        return [
            Fault(address & -PAGE_SIZE, thread)
            for event, _, address, thread in _MESSAGE.iter_unpack(data)
            if event == _EVENT_PAGEFAULT
        ]

    def copy(self, address: int, source: int, size: int) -> int:
        """Fill absent pages, and wake who waits for them; how many bytes, up to the first page that was there already.

        Args:
            address: of the first page.
            source: the address of what to put there.
            size: bytes, whole pages.
        """
        done = 0
        while done < size:
            argument = _CopyArgument(address + done, source + done, size - done)
            try:
                ioctl(self._uffd.fd, UFFDIO_COPY, argument)
            except KernelError as error:
                if error.errno == errno.EEXIST:
                    return done
                if error.errno != errno.EAGAIN:  # part of it was done, or the address space changes just now
                    raise
                done += max(0, argument.copy)
            else:
                done = size
        return done

    def zero(self, address: int, size: int) -> None:
        """Make absent pages zero, up to the first that is there already, and wake who waits for any of them."""
        done = 0
        while done < size:
            argument = _ZeroArgument(RangeArgument(address + done, size - done))
            try:
                ioctl(self._uffd.fd, UFFDIO_ZEROPAGE, argument)
            except KernelError as error:
                if error.errno == errno.EEXIST:
                    break
                if error.errno != errno.EAGAIN:
                    raise
                done += max(0, argument.zeropage)
            else:
                return
        ioctl(self._uffd.fd, UFFDIO_WAKE, RangeArgument(address, size))

    def close(self) -> None:
        """Close the descriptor; who waits goes on, and finds zeros. Idempotent."""
        self._uffd.close()

"""userfaultfd: page faults and write protection handled by the process, from ``include/uapi/linux/userfaultfd.h``.

Three ways lead to one, tried in this order: the system call, which wants CAP_SYS_PTRACE or the sysctl
``vm.unprivileged_userfaultfd``; ``/dev/userfaultfd`` (Linux 6.1), which wants access to that file; and the system call
with UFFD_USER_MODE_ONLY (Linux 5.11), which anybody may make, but whose faults must come from user mode. Asynchronous
write protection hands no fault to anybody, so the last way serves it as well as the others.
"""

import ctypes
import errno
import os
import platform
from enum import Enum, IntFlag
from typing import Final, Self

from dirtylog.errors import AlreadyWatchedError, ClosedError, HostError, KernelError, UntrackableError
from dirtylog.linux.ioctl import io, ioctl, ior, iowr, kernel_error
from dirtylog.linux.process import MadeBy

USERFAULTFD_DEVICE: Final = "/dev/userfaultfd"
API: Final = 0xAA
_USER_MODE_ONLY: Final = 1
_CALL_NUMBERS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_REMEDIES: Final = {
    errno.EPERM: f"give access to {USERFAULTFD_DEVICE}, or run 'sysctl vm.unprivileged_userfaultfd=1'; "
    "in a container, let its seccomp profile allow userfaultfd",
    errno.ENOSYS: "use a kernel with CONFIG_USERFAULTFD; in a container, let its seccomp profile allow userfaultfd",
    errno.EMFILE: "raise the limit shown by 'ulimit -n'",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long


class Feature(IntFlag):
    """What a kernel's userfaultfd can do: UFFD_FEATURE_*."""

    NONE = 0
    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class RegisterMode(IntFlag):
    """What a registered range is watched for: UFFDIO_REGISTER_MODE_*."""

    MISSING = 1
    WP = 2
    MINOR = 4


class Access(Enum):
    """The way that led to a userfaultfd."""

    SYSTEM_CALL = "the system call"
    DEVICE = "the device"
    USER_MODE = "the system call, for faults in user mode"


class ApiArgument(ctypes.Structure):
    """struct uffdio_api."""

    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class RangeArgument(ctypes.Structure):
    """struct uffdio_range."""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class RegisterArgument(ctypes.Structure):
    """struct uffdio_register."""

    _fields_ = (("range", RangeArgument), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


DEVICE_NEW: Final = io("USERFAULTFD_IOC_NEW", API, 0x00)
UFFDIO_API: Final = iowr("UFFDIO_API", API, 0x3F, ApiArgument)
UFFDIO_REGISTER: Final = iowr("UFFDIO_REGISTER", API, 0x00, RegisterArgument)
UFFDIO_UNREGISTER: Final = ior("UFFDIO_UNREGISTER", API, 0x01, RangeArgument)


class Userfaultfd:
    """An open userfaultfd whose API and features are agreed with the kernel.

    Attributes:
        fd: the descriptor, owned here.
        access: the way that led to it.
        features: all that this kernel offers, wanted or not; may hold bits that `Feature` does not name.

    Raises:
        HostError: no way leads to a userfaultfd, or the kernel lacks a wanted feature.
    """

    def __init__(self, wanted: Feature = Feature.NONE, *, device: str = USERFAULTFD_DEVICE) -> None:
        self._made_by = MadeBy()
        self.fd, self.access = _open(device)
        argument = ApiArgument(api=API, features=int(wanted))
        try:
            ioctl(self.fd, UFFDIO_API, argument)
        except KernelError as error:
            self.close()
            raise HostError(
                f"userfaultfd does not offer {wanted.name} here ({error.cause})",
                remedy="'dirtylog doctor' shows which it does offer; Linux 6.7 has all that this package can use",
            ) from error
        self.features = Feature(argument.features)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor, which also ends all registrations; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def register(self, address: int, size: int, mode: RegisterMode) -> None:
        """Watch whole pages of one mapping, or of several that touch. Nothing is protected by this alone.

        Raises:
            AlreadyWatchedError: another userfaultfd watches some of it.
            UntrackableError: some of it is not mapped, or is memory that userfaultfd does not serve in this mode: with
            WP_ASYNC and write protection alone it serves files, too, but not a device's memory.
        """
        argument = RegisterArgument(RangeArgument(address, size), int(mode))
        try:
            ioctl(self._open_fd(), UFFDIO_REGISTER, argument)
        except KernelError as error:
            raise _refused(error, address, size) from error

    def unregister(self, address: int, size: int) -> None:
        """Stop watching; pages that were protected become writable. What was unmapped meanwhile needs none of it."""
        try:
            ioctl(self._open_fd(), UFFDIO_UNREGISTER, RangeArgument(address, size))
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise ClosedError("this userfaultfd was closed")
        self._made_by.check("a userfaultfd")
        return self.fd


def _refused(error: KernelError, address: int, size: int) -> Exception:
    where = f"the memory at {address:#x} to {address + size:#x}"
    if error.errno == errno.EBUSY:
        return AlreadyWatchedError(
            f"{where} is watched by another userfaultfd", remedy="close the other watch first, or share it"
        )
    if error.errno == errno.EPERM:
        return UntrackableError(f"{where} can never be written here", remedy="map it with write permission")
    if error.errno in (errno.EINVAL, errno.ENOMEM):
        return UntrackableError(
            f"{where} is not all memory that userfaultfd serves, in whole pages ({error.cause})",
            remedy="huge pages of hugetlbfs are watched whole; other memory can be watched by comparison",
        )
    return error


def _open(device: str) -> tuple[int, Access]:
    try:
        return _call(0), Access.SYSTEM_CALL
    except KernelError as refused:
        reason = refused
    try:
        return _ask_device(device), Access.DEVICE
    except (OSError, KernelError):
        pass  # absent or closed to us, as it is on most hosts; the last way is still open
    try:
        return _call(_USER_MODE_ONLY), Access.USER_MODE
    except KernelError:
        remedy = _REMEDIES.get(reason.errno)
        raise HostError(f"no userfaultfd is to be had ({reason.cause})", remedy=remedy) from reason


def _call(flags: int) -> int:
    number = _CALL_NUMBERS.get(platform.machine())
    if number is None:
        raise HostError(f"the number of the system call userfaultfd is not known for {platform.machine()}")
    fd: int = _libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if fd == -1:
        code = ctypes.get_errno()
        raise kernel_error("userfaultfd", OSError(code, os.strerror(code)))
    return fd


def _ask_device(device: str) -> int:
    controller = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        return ioctl(controller, DEVICE_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(controller)

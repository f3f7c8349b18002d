import ctypes
import errno
import fcntl
import os
import struct
import termios

import pytest

from dirtylog.errors import KernelError
from dirtylog.linux.ioctl import Request, io, ioctl, ioctl_unsigned, ior, iow, iowr, kernel_error

BYTES_WAITING = Request("FIONREAD", termios.FIONREAD)


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint64))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        # From the headers: BLKGETSIZE64, TUNSETIFF, UFFDIO_API, PAGEMAP_SCAN, FS_IOC_FIEMAP, KVM_RUN.
        (ior("r", 0x12, 114, 8), 0x80081272),
        (iow("w", "T", 202, 4), 0x400454CA),
        (iowr("wr", 0xAA, 0x3F, 24), 0xC018AA3F),
        (iowr("wr", "f", 16, 96), 0xC0606610),
        (iowr("wr", "f", 11, 32), 0xC020660B),
        (io("none", 0xAE, 0x80), 0xAE80),
        (iowr("structure", "f", 11, Pair), 0xC010660B),
    ],
)
def test_numbers_are_those_of_the_headers(request_: Request, code: int) -> None:
    assert request_.code == code


@pytest.mark.parametrize("size", [-1, 1 << 14])
def test_size_that_does_not_fit_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be encoded"):
        iow("odd", 1, 1, size)


def test_buffer_is_filled_in_place() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"12345")
    waiting = bytearray(4)

    assert ioctl(ours, BYTES_WAITING, waiting) == 0

    assert struct.unpack("i", waiting) == (5,)
    os.close(ours)
    os.close(theirs)


def test_refusal_names_the_request_and_the_reason() -> None:
    with open(os.devnull) as null, pytest.raises(KernelError) as caught:
        ioctl(null.fileno(), BYTES_WAITING, bytearray(4))
    assert (caught.value.call, caught.value.errno) == ("FIONREAD", errno.ENOTTY)
    assert str(caught.value) == f"FIONREAD failed: {os.strerror(errno.ENOTTY)}"
    assert isinstance(caught.value.__cause__, OSError)


def test_unsigned_argument_is_refused_with_the_same_error() -> None:
    with open(os.devnull) as null, pytest.raises(KernelError) as caught:
        ioctl_unsigned(null.fileno(), BYTES_WAITING, 1 << 32)
    assert (caught.value.call, caught.value.errno) == ("FIONREAD", errno.ENOTTY)


def test_interruption_is_left_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(fd: int, code: int, argument: object) -> int:
        raise InterruptedError(errno.EINTR, "interrupted")

    monkeypatch.setattr(fcntl, "ioctl", interrupted)
    with pytest.raises(InterruptedError):
        ioctl(0, BYTES_WAITING)


def test_error_without_a_number_keeps_its_words() -> None:
    error = kernel_error("open", OSError("odd"), remedy="do better")
    assert (error.errno, str(error)) == (0, "open failed: odd; do better")

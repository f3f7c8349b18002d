"""What the host allows a migration: the same bytes between two Python processes, with no more than the system calls."""

import mmap
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct

from benchmarks.support.child import running
from benchmarks.support.usage import stolen
from dirtylog.errors import HostError, PeerError, UsageError
from dirtylog.linux.sockets import set_buffers, set_timeouts
from dirtylog.migration.channel import BUFFER_SIZE
from dirtylog.units import MIB, format_size

SCHEMES: Final = ("unix", "tcp")
COPIES: Final = 5

_RECEIVER: Final = Path(__file__).with_name("receiver.py")
_STALL_SECONDS: Final = 30.0


class Copy(Struct, frozen=True):
    """One copy.

    Attributes:
        seconds: from before the first byte is sent until the receiver has confirmed the last.
        steal: how much CPU time the host lost meanwhile, see `stolen`.
    """

    seconds: float
    steal: float


class BareCopies(Struct, frozen=True):
    """Some copies of as many bytes, one after the other."""

    size: int
    copies: list[Copy]

    @property
    def seconds(self) -> list[float]:
        """Of each."""
        return [one.seconds for one in self.copies]


def copy(size: int, scheme: str, copies: int = COPIES) -> BareCopies:
    """Send memory to memory of another process, all of it populated, again and again.

    Args:
        size: bytes of each copy; both processes have that much memory.
        scheme: one of `SCHEMES`, the kind of connection.
        copies: how many.

    Raises:
        HostError: there is not so much memory, or no connection.
        PeerError: the other process ended, or is stuck.
    """
    if size <= 0 or scheme not in SCHEMES:
        raise UsageError(f"{size} bytes cannot be copied over a connection of kind {scheme!r}")
    try:
        memory = memoryview(mmap.mmap(-1, size))
    except (OSError, OverflowError) as error:
        raise HostError(
            f"the host cannot map {format_size(size)} of memory ({error})", remedy="migrate a smaller guest"
        ) from error
    np.frombuffer(memory, np.uint8).fill(1)  # populates; and zeros that nobody wrote are slower to send, once
    with _receiver(size, scheme) as sock:
        return BareCopies(size, [_copy(sock, memory) for _ in range(copies)])


def _copy(sock: socket.socket, memory: memoryview) -> Copy:
    steal, began, sent = stolen(), time.perf_counter(), 0
    while sent < len(memory):
        sent += sock.sendmsg([memory[sent : sent + MIB]])
    _await_confirmation(sock)
    return Copy(time.perf_counter() - began, stolen() - steal)


def _await_confirmation(sock: socket.socket) -> None:
    if not sock.recv(1):
        raise EOFError("it ended the connection")


@contextmanager
def _receiver(size: int, scheme: str) -> Iterator[socket.socket]:
    """A connection to a process that has its memory ready."""
    ours, theirs = _connection(scheme)
    with ours, theirs, tempfile.TemporaryFile() as log:
        for sock in (ours, theirs):
            set_buffers(sock, BUFFER_SIZE)
        set_timeouts(ours, _STALL_SECONDS)
        command = [sys.executable, "-I", str(_RECEIVER), str(size)]
        with running(command, log, stdin=theirs.fileno()):
            theirs.close()
            try:
                _await_confirmation(ours)
                yield ours
            except (OSError, EOFError) as error:
                log.seek(0)
                words = log.read().decode(errors="replace").strip()
                raise PeerError(
                    f"the receiver of {size} bytes is lost ({error}): {words or 'it did not say why'}",
                    remedy=f"see whether the host has {format_size(2 * size)} of memory for this",
                ) from error


def _connection(scheme: str) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    try:
        if scheme == "unix":
            return socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
            ours = stack.enter_context(socket.create_connection(listener.getsockname()))
            theirs = stack.enter_context(listener.accept()[0])
            for sock in (ours, theirs):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stack.pop_all()
    except OSError as error:
        raise HostError(f"cannot connect two sockets of kind {scheme!r}: {error.strerror or error}") from error
    return ours, theirs

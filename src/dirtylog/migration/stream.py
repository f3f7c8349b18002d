"""How the bytes of a conversation travel over a connected socket."""

import os
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from dirtylog.linux.mapping import Contents, FilePart, memory_of
from dirtylog.units import KIB

_IOV_MAX: Final = 1024
_FILE_SIZE: Final = 64 * KIB
"""Shorter parts of files are sent faster as memory, many in one call."""


_UNLIMITED: Final = 1 << 62
_SHORT: Final = 8 * KIB
"""A few microseconds: for postcopy, whose guest waits for a CPU like everybody else."""


class Stream(Protocol):
    """Bytes both ways over a blocking socket with the timeouts of `set_timeouts`, whose owner is somebody else.

    One thread at a time may send, and one receive. Another can end either by a shutdown of the socket.
    """

    @property
    def passes_files(self) -> bool:
        """Whether descriptors can be sent beside the bytes."""

    def send(self, parts: Sequence[Contents]) -> int:
        """Send all of some buffers, in order; how many bytes they have.

        Raises:
            BlockingIOError: nothing moved for the time that the socket has.
            OSError: the connection ended.
        """

    def receive_into(self, buffers: list[memoryview]) -> bool:
        """Fill buffers; whether the peer said so much before it ended.

        Raises:
            BlockingIOError: nothing moved for the time that the socket has.
            OSError: the connection ended otherwise.
        """

    def use_short_calls(self) -> None:
        """From here on let no system call take long, for the sake of others who need the CPU.

        A kernel without preemption (PREEMPT_NONE, as servers have) lets nobody in before a call returns.
        """

    def has_arrived(self) -> bool:
        """Whether there is something to receive, the end included. Does not wait."""

    @property
    def has_buffered(self) -> bool:
        """Whether there is something to receive that has left the socket already, so that no poll tells of it."""


class PlainStream:
    """Bytes as they are: from memory to memory in one system call for many buffers.

    Long parts of files are not copied into a Unix socket, since Linux 6.5. Measured, that halves the sender's CPU time;
    over TCP's loopback it adds half.
    """

    has_buffered: Final = False

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._most = _UNLIMITED
        """Bytes that a system call may move."""
        self.passes_files = sock.family == socket.AF_UNIX

    def use_short_calls(self) -> None:
        """See `Stream`."""
        self._most = _SHORT

    def send(self, parts: Sequence[Contents]) -> int:
        """See `Stream`."""
        total = 0
        buffers: list[memoryview] = []
        for part in parts:
            memory = memory_of(part)
            total += len(memory)
            if isinstance(part, FilePart) and self.passes_files and len(memory) >= _FILE_SIZE:
                self._send_buffers(buffers)
                self._send_file(part)
                buffers = []
            else:
                buffers.append(memory)
        self._send_buffers(buffers)
        return total

    def _send_buffers(self, buffers: list[memoryview]) -> None:
        while buffers:
            _advance(buffers, self._socket.sendmsg(self._next(buffers)))

    def _send_file(self, part: FilePart) -> None:
        offset, end = part.offset, part.offset + len(part.memory)
        while offset < end:
            offset += os.sendfile(self._socket.fileno(), part.fd, offset, min(self._most, end - offset))

    def receive_into(self, buffers: list[memoryview]) -> bool:
        """See `Stream`."""
        while buffers:
            received, *_ = self._socket.recvmsg_into(self._next(buffers), 0, socket.MSG_WAITALL)
            if not received:
                return False
            _advance(buffers, received)
        return True

    def _next(self, buffers: list[memoryview]) -> list[memoryview]:
        """What the next call is to move."""
        if self._most == _UNLIMITED:
            return buffers[:_IOV_MAX]
        return [buffers[0][: self._most]]

    def has_arrived(self) -> bool:
        """See `Stream`."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def _advance(buffers: list[memoryview], done: int) -> None:
    """Drop the first ``done`` bytes from a list of buffers."""
    index = 0
    while index < len(buffers) and done >= len(buffers[index]):
        done -= len(buffers[index])
        index += 1
    del buffers[:index]
    if done:
        buffers[0] = buffers[0][done:]

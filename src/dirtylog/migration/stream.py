"""How the bytes of a conversation travel over a connected socket."""

import os
import select
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol

from dirtylog.linux.mapping import Contents, FilePart, memory_of
from dirtylog.linux.sockets import set_timeouts
from dirtylog.migration.attention import Attention
from dirtylog.units import KIB

_IOV_MAX: Final = 1024
_FILE_SIZE: Final = 64 * KIB
"""Shorter parts of files are sent faster as memory, many in one call."""
_UNLIMITED: Final = 1 << 62
_SHORT: Final = 32 * KIB
"""Some microseconds, beside which what a call costs is little."""


class Stream(Protocol):
    """Bytes both ways over a blocking socket, whose owner is somebody else.

    One thread at a time may send, and one receive. Another can end either by a shutdown of the socket.
    """

    @property
    def passes_files(self) -> bool:
        """Whether descriptors can be sent beside the bytes."""

    def set_timeout(self, seconds: float) -> None:
        """How long nothing may move; 0 for ever."""

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

    def receive(self, size: int) -> bytes:
        """That many bytes; none if the peer ended before. See `receive_into`."""

    def receive_available(self, buffer: memoryview) -> int:
        """Receive what is there, and does not wait: how many bytes; 0 if the peer ended.

        Raises:
            BlockingIOError: nothing is there.
            OSError: the connection ended otherwise.
        """

    def attend(self, attention: Attention | None) -> None:
        """From here on serve others while a call would wait, and between pieces of what it moves.

        The pieces are short: who is to be served waits for the end of one at most. So does who needs the CPU, if the
        kernel has no preemption (PREEMPT_NONE, as on servers): it lets nobody in before a system call returns.
        """

    def has_arrived(self) -> bool:
        """Whether there is something to receive, the end included. Does not wait."""

    @property
    def has_buffered(self) -> bool:
        """Whether there is something to receive that has left the socket already, so that no poll tells of it."""


class SocketStream(ABC):
    """What all kinds of `Stream` have in common."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._timeout = 0.0
        self._attention: Attention | None = None

    def set_timeout(self, seconds: float) -> None:
        """See `Stream`."""
        self._timeout = seconds
        set_timeouts(self._socket, seconds)

    def attend(self, attention: Attention | None) -> None:
        """See `Stream`."""
        self._attention = attention

    def _await(self, event: int) -> None:
        """Serve others until the socket is ready for a call, which waits by itself where there are none."""
        if self._attention is not None:
            self._attention.wait(self._socket, event, self._timeout)

    @abstractmethod
    def receive_into(self, buffers: list[memoryview]) -> bool:
        """See `Stream`."""

    def receive(self, size: int) -> bytes:
        """See `Stream`."""
        data = bytearray(size)
        return bytes(data) if self.receive_into([memoryview(data)]) else b""


class PlainStream(SocketStream):
    """Bytes as they are: from memory to memory in one system call for many buffers.

    Long parts of files are not copied into a Unix socket, since Linux 6.5. Measured, that halves the sender's CPU time;
    over TCP's loopback it adds half.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.passes_files = sock.family == socket.AF_UNIX

    @property
    def has_buffered(self) -> bool:
        """See `Stream`."""
        return False

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
            _advance(buffers, self._socket.sendmsg(self._next(buffers, select.POLLOUT)))

    def _send_file(self, part: FilePart) -> None:
        offset, end = part.offset, part.offset + len(part.memory)
        while offset < end:
            self._await(select.POLLOUT)
            offset += os.sendfile(self._socket.fileno(), part.fd, offset, min(self._most, end - offset))

    def receive_into(self, buffers: list[memoryview]) -> bool:
        """See `Stream`."""
        flags = 0 if self._attention else socket.MSG_WAITALL
        while buffers:
            received, *_ = self._socket.recvmsg_into(self._next(buffers, select.POLLIN), 0, flags)
            if not received:
                return False
            _advance(buffers, received)
        return True

    def receive_available(self, buffer: memoryview) -> int:
        """See `Stream`."""
        return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)

    def _next(self, buffers: list[memoryview], event: int) -> list[memoryview]:
        """What the next call is to move, as soon as it can."""
        if self._attention is None:
            return buffers[:_IOV_MAX]
        self._await(event)
        left = self._most
        chosen: list[memoryview] = []
        for buffer in buffers[:_IOV_MAX]:
            chosen.append(buffer[:left])
            left -= len(chosen[-1])
            if not left:
                break
        return chosen

    @property
    def _most(self) -> int:
        """Bytes that a call may move."""
        return _UNLIMITED if self._attention is None else _SHORT

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

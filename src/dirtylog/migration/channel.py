"""The connections of a migration: all that is said on them goes through here."""

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self, TypeVar

from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    DisconnectedError,
    ProtocolError,
    RefusedError,
)
from dirtylog.linux.mapping import Contents
from dirtylog.linux.sockets import (
    connect_unix,
    hear_out,
    keep_alive,
    receive_files,
    set_buffers,
    shut_down,
)
from dirtylog.migration.address import Address, UnixAddress
from dirtylog.migration.attention import Attention
from dirtylog.migration.credentials import Credentials, socket_address
from dirtylog.migration.messages import Failed, Message
from dirtylog.migration.protocol import Protocol, Role
from dirtylog.migration.stream import PlainStream, Stream
from dirtylog.migration.tls import Handshakes
from dirtylog.units import MIB

BUFFER_SIZE: Final = 4 * MIB
CONNECT_TIMEOUT: Final = 10.0
HANDSHAKE_TIMEOUT: Final = 10.0
STALL_TIMEOUT: Final = 30.0
"""Seconds without a byte moving after which the peer counts as gone."""
_WITH_FILES: Final = b"F"
"""The byte that descriptors travel with."""
_DRAIN_SECONDS: Final = 2.0

_M = TypeVar("_M", bound=Message)


class Channel:
    """A connected socket that speaks the protocol. One thread uses it; any may `abort` it.

    Args:
        sock: owned from now on.
        role: which side this is.
        stream: how bytes travel over the socket; as they are unless given.

    Attributes:
        peer: who the other side is, for messages.
        stage: how far the conversation has come, see `Protocol`.
        passes_files: whether descriptors can be sent: over Unix sockets.
    """

    def __init__(self, sock: socket.socket, role: Role, stream: Stream | None = None) -> None:
        self._socket = sock
        self._stream: Stream = stream or PlainStream(sock)
        self._protocol = Protocol(role)
        self._aborted = False
        self._io = _Translated(self._ended)
        self.passes_files = self._stream.passes_files
        self.peer = "destination" if role is Role.SOURCE else "source"
        try:
            if role is Role.SOURCE:
                self.enlarge_buffers()
            with self._io:
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    keep_alive(sock)
                self.set_timeout(HANDSHAKE_TIMEOUT)
                self._stream.send([memoryview(Protocol.preamble())])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def stage(self) -> object:
        """How far the conversation has come."""
        return self._protocol.stage

    def set_timeout(self, seconds: float) -> None:
        """How long nothing may move."""
        self._stream.set_timeout(seconds)

    def enlarge_buffers(self) -> None:
        """Have the kernel buffer as much as memory needs. A destination does so only for who is let in."""
        with self._io:
            set_buffers(self._socket, BUFFER_SIZE)

    def attend(self, attention: Attention | None) -> None:
        """See `Stream.attend`."""
        self._stream.attend(attention)

    def send(self, message: Message, payload: Iterable[Contents] = ()) -> int:
        """Send a message and what belongs to it; how many bytes that were.

        What is long and in a file is not copied into the socket, which only refers to its pages: the peer may get what
        is written there until it has received them, as long as the migration lasts.
        """
        return self.send_frame([memoryview(self._protocol.send(message)), *payload])

    def send_files(self, files: Sequence[int]) -> None:
        """Send descriptors, right after the message that announces them."""
        with self._io:
            socket.send_fds(self._socket, [_WITH_FILES], files)

    def receive_files(self, count: int) -> list[int]:
        """That many descriptors, right after the message that announces them. They are the caller's to close.

        Raises:
            ProtocolError: they did not come, or others.
        """
        with self._io:
            data, files, lost = receive_files(self._socket, len(_WITH_FILES), count)
        if not data:
            raise self._ended()
        if data != _WITH_FILES or len(files) != count or lost:
            for file in files:
                os.close(file)
            raise ProtocolError(
                f"the {self.peer} announced {count} files, and sent {len(files)}",
                remedy="see whether this process may open more, with 'ulimit -n'",
            )
        return files

    def receive(self) -> Message:
        """The next message; the payload of `Pages` is to be fetched with `receive_into`."""
        while True:
            wanted = self._protocol.wanted
            message = self._protocol.receive(self._exactly(wanted) if wanted else b"")
            if message is not None:
                return message

    def expect(self, kind: type[_M]) -> _M:
        """The next message, which must be of a kind.

        Raises:
            RefusedError: the peer gives up, and says why.
            ProtocolError: it is another message.
        """
        message = self.receive()
        if isinstance(message, kind):
            return message
        raise self.unexpected(message, f"instead of {kind.__name__}")

    def check_quiet(self) -> None:
        """Find out, without waiting, whether the peer still waits for us.

        Raises:
            DisconnectedError: it is gone.
            RefusedError: it gives up, and says why.
            ProtocolError: it says something else.
        """
        with self._io:
            has_arrived = self._stream.has_arrived()
        if has_arrived:
            raise self.unexpected(self.receive(), "before its time")

    @property
    def has_buffered(self) -> bool:
        """Whether something can be received that no poll of `fileno` tells of: ask before each poll.

        Raises:
            ProtocolError: what came was not made by the peer.
        """
        return self._stream.has_buffered

    def unexpected(self, message: Message, when: str) -> RefusedError | ProtocolError:
        """The error that a message is which may not come ``when``: the peer gives up, or breaks the protocol."""
        if isinstance(message, Failed):
            return RefusedError(f"the {self.peer} gave up: {message.reason}")
        return ProtocolError(f"the {self.peer} sent {type(message).__name__} {when}")

    def send_frame(self, parts: Sequence[Contents]) -> int:
        """Send a message that the caller has made, and that the protocol allows; how many bytes that were."""
        with self._io:
            return self._stream.send(parts)

    def receive_available(self, buffer: memoryview) -> int:
        """Receive what has arrived, wherever in a message that ends; how many bytes. Does not wait."""
        try:
            count = self._stream.receive_available(buffer)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._ended(error) from error
        if not count:
            raise self._ended()
        return count

    def receive_into(self, buffers: list[memoryview]) -> None:
        """Fill buffers, straight from the socket."""
        with self._io:
            whole = self._stream.receive_into(buffers)
        if not whole:
            raise self._ended()

    def _exactly(self, size: int) -> bytes:
        with self._io:
            data = self._stream.receive(size)
        if not data:
            raise self._ended()
        return data

    def abort(self) -> None:
        """Make every call fail, in whichever thread it waits. The socket stays to be closed."""
        self._aborted = True
        shut_down(self._socket, socket.SHUT_RDWR)

    def stop_receiving(self) -> None:
        """Make every `receive` fail, in whichever thread it waits. Something can still be sent."""
        shut_down(self._socket, socket.SHUT_RD)

    def stop_sending(self) -> None:
        """Make every `send` fail, in whichever thread it waits. What the peer said before can still be received."""
        shut_down(self._socket, socket.SHUT_WR)

    def cut(self) -> None:
        """Make every call fail, in whichever thread it waits, as if the network had."""
        self.stop_sending()
        self.stop_receiving()

    def last_words(self) -> RefusedError | None:
        """After the connection failed: what the peer may have said before it ended, as an error."""
        if self._aborted:
            return None
        self.attend(None)
        self.set_timeout(_DRAIN_SECONDS)
        try:
            message = self.receive()
        except DirtylogError:  # nothing, or nothing whole
            return None
        return RefusedError(f"the {self.peer} gave up: {message.reason}") if isinstance(message, Failed) else None

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def give_up(self, error: Exception, *, wait: bool = True) -> None:
        """Let the peer know why nothing comes of it, unless it knows or was not to know; it may be gone.

        Args:
            error: why.
            wait: whether to `finish`.
        """
        if isinstance(error, CancelledError | DisconnectedError | RefusedError):
            return
        try:
            self.send(Failed(str(error)[:4096]))
        except DirtylogError:  # the error that matters is on its way already
            return
        if wait:
            self.finish()

    def finish(self) -> None:
        """Say no more, and let the peer read what was said: bytes that arrive meanwhile are thrown away."""
        hear_out(self._socket, _DRAIN_SECONDS)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def _ended(self, error: OSError | None = None) -> CancelledError | DisconnectedError:
        if isinstance(error, BlockingIOError):
            return DisconnectedError(
                f"the {self.peer} has not moved a byte for a while and counts as gone",
                remedy=f"see whether the {self.peer}, or the network in between, is overloaded",
            )
        if self._aborted:
            return CancelledError("the migration was cancelled")
        detail = f": {error.strerror}" if error is not None and error.strerror else ""
        return DisconnectedError(
            f"the connection to the {self.peer} ended before the migration did{detail}",
            remedy=f"see why the {self.peer} ended, then migrate again",
        )


class _Translated:
    """What the operating system says of a connection, in other words. Entered often, for which generators are slow."""

    def __init__(self, translate: Callable[[OSError], DirtylogError]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise self._translate(error) from error


def connect(address: Address, credentials: Credentials | None = None, handshakes: Handshakes | None = None) -> Channel:
    """Connect to a destination that listens at an address.

    Args:
        address: a `TLSAddress` takes credentials, others none.
        credentials: the source's.
        handshakes: by which another thread can end that of TLS.

    Raises:
        DisconnectedError: nobody listens there, or cannot be reached.
        PeerError: one side does not accept the other.
        UsageError: it is a file, or lacks credentials.
    """
    address = socket_address(address, credentials)
    try:
        if isinstance(address, UnixAddress):
            sock = connect_unix(address.path, CONNECT_TIMEOUT)
        else:
            sock = socket.create_connection((address.host, address.port), timeout=CONNECT_TIMEOUT)
            sock.settimeout(None)
    except OSError as error:
        reason = error.strerror or str(error)
        with_credentials = "" if credentials is None else " --tls-creds DIR"
        raise DisconnectedError(
            f"cannot connect to the destination at {address}: {reason}",
            remedy=f"start it there with 'dirtylog run --incoming {address}{with_credentials}'",
        ) from error
    if credentials is None or isinstance(address, UnixAddress):
        return Channel(sock, Role.SOURCE)
    handshakes = handshakes or Handshakes()
    return Channel(sock, Role.SOURCE, handshakes.shake_hands(sock, credentials, address.host, HANDSHAKE_TIMEOUT))

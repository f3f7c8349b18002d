"""TLS over a connected socket: all that is said is encrypted, and both sides have proved who they are.

OpenSSL works on memory, and only what it made of that passes through the socket, which stays an ordinary blocking one:
its timeouts count bytes that move, and a shutdown from any thread ends what waits. One socket call carries many
records. OpenSSL's object is used under a lock that is never held across I/O, so that one thread can send while another
receives.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final, cast

from dirtylog.errors import CancelledError, DisconnectedError, PeerError
from dirtylog.linux.mapping import Contents, memory_of
from dirtylog.linux.sockets import hear_out, set_timeouts, shut_down
from dirtylog.migration.credentials import Credentials
from dirtylog.migration.messages import MAGIC, Failed, encode
from dirtylog.migration.protocol import Protocol, Role
from dirtylog.migration.stream import SocketStream
from dirtylog.migration.tls_errors import why_broken, why_refused
from dirtylog.units import KIB

_CHUNK: Final = 256 * KIB
"""What is encrypted, or received, at once: 16 full records."""
_SHORT: Final = 64 * KIB
"""The same while others wait to be served in between."""
_PARTING_SECONDS: Final = 2.0
_PLAIN_REFUSAL: Final = Protocol.preamble() + encode(
    Failed("this destination takes nothing that is not encrypted; migrate to tls:HOST:PORT, with --tls-creds")
)


class TLSStream(SocketStream):
    """Implements `Stream`. Nothing can be sent or received before `shake_hands`.

    Args:
        sock: connected, and somebody else's to close.
        credentials: of this side.
        host: the destination's, as its address has it, whose certificate must have it, or `Credentials.hostname`.
    """

    passes_files: Final = False

    def __init__(self, sock: socket.socket, credentials: Credentials, host: str | None = None) -> None:
        super().__init__(sock)
        self._role = credentials.role
        self._peer = "destination" if credentials.role is Role.SOURCE else "source"
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = credentials.context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=credentials.role is Role.DESTINATION,
            server_hostname=None if credentials.role is Role.DESTINATION else credentials.hostname or host,
        )
        self._lock = threading.Lock()
        self._received = memoryview(bytearray(_CHUNK))
        self._agreed = False
        self._settled = False
        self._ahead = b""

    def shake_hands(self, timeout: float) -> None:
        """Check each other's certificates, and agree on keys, within some seconds.

        A source waits for the destination's first byte, too. It is ready before the destination looks at its
        certificate (RFC 8446, section 2), and nothing else tells it that it was accepted.

        Raises:
            RefusedError: the peer does not accept this side, and said why.
            ProtocolError: the peer is not accepted here, or does not speak TLS 1.3.
            DisconnectedError: it is gone, or took too long.
        """
        deadline = time.monotonic() + timeout
        try:
            while not self._is_settled():
                self._exchange(deadline)
            self._settled = True
        except (BlockingIOError, TimeoutError) as error:
            raise DisconnectedError(
                f"the {self._peer} did not complete the TLS handshake in {timeout:.0f} s",
                remedy=f"see whether the {self._peer} speaks TLS, or is overloaded",
            ) from error
        except OSError as error:
            raise DisconnectedError(
                f"the connection to the {self._peer} ended in the TLS handshake: {error.strerror}",
                remedy=f"see what the {self._peer} says about it",
            ) from error

    def _exchange(self, deadline: float) -> None:
        """Say what there is to say, and hear what comes next."""
        left = deadline - time.monotonic()
        if left <= 0:  # with the socket's timeout alone, bytes that dribble in could take for ever
            raise TimeoutError
        set_timeouts(self._socket, max(left, 0.001))
        self._flush()
        if not self._receive():
            raise DisconnectedError(
                f"the connection to the {self._peer} ended in the TLS handshake",
                remedy=f"see what the {self._peer} says about it, and whether it speaks TLS",
            )

    def _is_settled(self) -> bool:
        if not self._agreed:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLError as error:
                self._part()
                raise why_refused(error, self._role) from error
            self._agreed = True
            self._flush()
        return self._role is Role.DESTINATION or self.has_buffered

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())

    def _part(self) -> None:
        """Have the peer read why before it sees the end. It may be gone."""
        if self._role is Role.DESTINATION and bytes(self._received[: len(MAGIC)]) == MAGIC:
            self._outgoing.read()
            self._outgoing.write(_PLAIN_REFUSAL)
        with contextlib.suppress(OSError):
            self._flush()
            hear_out(self._socket, _PARTING_SECONDS)

    def send(self, parts: Sequence[Contents]) -> int:
        """See `Stream`."""
        total = 0
        for piece in _pieces(parts, self._piece):
            self._await(select.POLLOUT)
            self._socket.sendall(self._encrypted(piece))
            total += len(piece)
        return total

    @property
    def _piece(self) -> int:
        """Bytes that are encrypted, or received, at once."""
        return _CHUNK if self._attention is None else _SHORT

    def _encrypted(self, piece: memoryview) -> bytes:
        with self._lock:
            try:
                while piece:
                    piece = piece[self._tls.write(piece) :]
            except ssl.SSLError as error:
                raise self._failure(error) from error
            return self._outgoing.read()

    def receive_into(self, buffers: list[memoryview]) -> bool:
        """See `Stream`.

        Raises:
            ProtocolError: what came was not made by the peer.
        """
        for buffer in buffers:
            rest = buffer
            while rest:
                count = self._decrypt_into(rest)
                if count == 0 or (count is None and not self._receive()):
                    return False
                rest = rest[count or 0 :]
        return True

    def _decrypt_into(self, buffer: memoryview) -> int | None:
        """Fill a buffer with what is there of one record: bytes, 0 at the end, or None if more has to be received."""
        if self._ahead:
            buffer[:1], self._ahead = self._ahead, b""
            return 1
        with self._lock:
            try:
                return cast(int, self._tls.read(len(buffer), buffer))  # typeshed has it for no buffer only
            except ssl.SSLWantReadError:
                return None
            except ssl.SSLError as error:
                raise self._failure(error) from error

    def _failure(self, error: ssl.SSLError) -> PeerError:
        return (why_broken if self._settled else why_refused)(error, self._role)

    def _receive(self, flags: int = 0) -> bool:
        """Take bytes from the socket; whether there were any before its end."""
        if not flags:
            self._await(select.POLLIN)
        count = self._socket.recv_into(self._received, self._piece, flags)
        with self._lock:
            self._incoming.write(self._received[:count])
        return count > 0

    @property
    def has_buffered(self) -> bool:
        """See `Stream`."""
        if self._ahead:
            return True
        byte = bytearray(1)
        count = self._decrypt_into(memoryview(byte))
        if count:
            self._ahead = bytes(byte)
        return count is not None

    def receive_available(self, buffer: memoryview) -> int:
        """See `Stream`. What arrived may be a record in part only, of which nothing is there yet.

        Raises:
            ProtocolError: what came was not made by the peer.
        """
        ahead = len(self._ahead)
        buffer[:ahead], self._ahead = self._ahead, b""
        count = self._decrypt_into(buffer[ahead:])
        if ahead:  # more than one record came, and `has_buffered` looked
            return ahead + (count or 0)
        if count is None:
            count = self._decrypt_into(buffer) if self._receive(socket.MSG_DONTWAIT) else 0
        if count is None:
            raise BlockingIOError
        return count

    def has_arrived(self) -> bool:
        """See `Stream`."""
        while not self.has_buffered:
            try:
                if not self._receive(socket.MSG_DONTWAIT):
                    return True
            except BlockingIOError:
                return False
        return True


class Handshakes:
    """The sockets on which handshakes are under way, so that another thread can end all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._aborted = False

    def shake_hands(self, sock: socket.socket, credentials: Credentials, host: str | None, timeout: float) -> TLSStream:
        """The stream over a socket, which is closed where it comes to nothing. See `TLSStream`.

        Raises:
            CancelledError: `abort` ended it.
        """
        try:
            stream = TLSStream(sock, credentials, host)
            with self._under_way(sock):
                stream.shake_hands(timeout)
        except BaseException as error:
            sock.close()  # only now that `abort` knows it no longer: its descriptor's number may be another's next
            if self._aborted and isinstance(error, PeerError):
                raise CancelledError("the migration was cancelled") from error
            raise
        return stream

    @contextlib.contextmanager
    def _under_way(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(sock)
            if self._aborted:
                shut_down(sock, socket.SHUT_RDWR)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def abort(self) -> None:
        """End those under way, and each that begins later."""
        with self._lock:
            self._aborted = True
            for sock in self._sockets:
                shut_down(sock, socket.SHUT_RDWR)


def _pieces(parts: Sequence[Contents], size: int) -> Iterator[memoryview]:
    """Some buffers as pieces of a size, so that nearly all records are full. What is short is copied for that."""
    joined: list[memoryview] = []
    left = size
    for part in parts:
        memory = memory_of(part)
        while memory:
            joined.append(memory[:left])
            memory = memory[left:]
            left -= len(joined[-1])
            if not left:
                yield _join(joined)
                joined, left = [], size
    if joined:
        yield _join(joined)


def _join(parts: list[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

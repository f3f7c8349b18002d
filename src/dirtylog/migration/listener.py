"""Where a destination listens."""

import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from dirtylog.errors import CancelledError, HostError
from dirtylog.linux.socketfile import SocketFile
from dirtylog.linux.sockets import listen_tcp
from dirtylog.linux.wakeup import Waiter, Wakeup
from dirtylog.migration.address import Address, TCPAddress, UnixAddress
from dirtylog.migration.channel import HANDSHAKE_TIMEOUT, Channel
from dirtylog.migration.credentials import Credentials, socket_address
from dirtylog.migration.messages import MAX_CHANNELS
from dirtylog.migration.protocol import Role
from dirtylog.migration.tls import Handshakes


class Listener:
    """Waits for a source at an address; owns the socket, and its file if it has one.

    Args:
        address: a `TLSAddress` takes credentials, others none.
        credentials: the destination's.

    Raises:
        UsageError: the address is in use, cannot be one, or lacks credentials.
        HostError: the host does not let us listen there.
    """

    def __init__(self, address: Address, credentials: Credentials | None = None) -> None:
        address = socket_address(address, credentials)
        self._credentials = credentials
        self._handshakes = Handshakes()
        self._lock = threading.Lock()
        self._closed = False
        self._wakeup = Wakeup()
        self._close: Callable[[], None]
        try:
            if isinstance(address, UnixAddress):
                file = SocketFile(address.path)
                self._socket, self._close = file.socket, file.close
                self.address: Address = address
            else:
                self._socket = _listen_tcp(address)
                self._close = self._socket.close
                self.address = replace(address, port=self._socket.getsockname()[1])
        except BaseException:
            self._wakeup.close()
            raise
        self._aborted = False

    def accept(self, timeout: float | None = None) -> socket.socket | None:
        """Wait for a connection, for some seconds or for ever.

        Returns:
            The connection, the caller's to close; None if there is none, or it has gone again.

        Raises:
            CancelledError: `abort` was called.
            HostError: the host lacks what a connection takes. It stays where it is.
        """
        if not self._aborted:
            Waiter(self._socket.fileno(), self._wakeup).wait(read=True, timeout=timeout)
        if self._aborted:
            raise CancelledError("waiting for a migration was cancelled")
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:
            raise HostError(
                f"cannot accept a connection: {error.strerror}", remedy="see how many files may be open, 'ulimit -n'"
            ) from error
        sock.setblocking(True)
        return sock

    def open(self, sock: socket.socket) -> Channel:
        """The channel on a connection that was accepted, which is its own from now on, also if this fails.

        With credentials, both sides have proved who they are when this returns, which takes `HANDSHAKE_TIMEOUT` and a
        little more at most.

        Raises:
            PeerError: it is gone, or is not accepted.
            CancelledError: `abort` was called.
        """
        if self._credentials is None:
            return Channel(sock, Role.DESTINATION)
        stream = self._handshakes.shake_hands(sock, self._credentials, None, HANDSHAKE_TIMEOUT)
        return Channel(sock, Role.DESTINATION, stream)

    def abort(self) -> None:
        """Make `accept` give up, and `open` where it waits, in whichever thread; nothing to do after `close`."""
        self._handshakes.abort()
        with self._lock:
            self._aborted = True
            if not self._closed:
                self._wakeup.set()

    def close(self) -> None:
        """Close the socket and remove its file; idempotent. Not while another thread is in `accept`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()
                self._wakeup.close()


def _listen_tcp(address: TCPAddress) -> socket.socket:
    try:
        return listen_tcp(address.host, address.port, MAX_CHANNELS)
    except OSError as error:
        raise HostError(
            f"cannot listen at {address}: {error.strerror or error}",
            remedy="choose an address of this host, and a port that is free",
        ) from error

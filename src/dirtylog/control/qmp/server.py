"""A QMP server on a Unix socket."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from msgspec import UNSET, Struct

from dirtylog.control.qmp.connection import Connection
from dirtylog.control.qmp.messages import ErrorBody, ErrorClass, Event, Failure, Timestamp, encode
from dirtylog.control.qmp.registry import CommandRegistry
from dirtylog.control.qmp.session import Session
from dirtylog.errors import ClosedError, DirtylogError, HostError, UsageError
from dirtylog.linux.socketfile import SocketFile
from dirtylog.linux.wakeup import Waiter, Wakeup

MAX_CLIENTS: Final = 32
_CLOSE_SECONDS: Final = 2.0
_RETRY_SECONDS: Final = 1.0


class QMPServer:
    """Serves QMP to any number of clients at once.

    Whoever can connect controls the machine, so the socket's mode is 0600: only its owner and root can.

    The socket exists once the object does, so what is wrong with the path is found early. ``start`` begins to serve;
    clients that came before then wait. Commands run one at a time whichever client they come from, as in QEMU, each in
    its client's thread; handlers should not take long.

    Args:
        path: where the socket is to be.
        registry: the commands; more may be added before ``start``.
        on_failure: called, from any thread, with each defect that would otherwise be known to the client alone.

    Attributes:
        path: where the socket is.
        failure: the first defect, or None.

    Raises:
        UsageError: the path is in use, or cannot name a socket.
        HostError: the host does not let a socket be there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        registry: CommandRegistry,
        *,
        on_failure: Callable[[DirtylogError], None] | None = None,
    ) -> None:
        self._registry: Final = registry
        self._on_failure: Final = on_failure
        self._lock: Final = threading.Lock()
        self._command_lock: Final = threading.Lock()
        self._connections: list[Connection] = []
        self._closing = False
        self.failure: DirtylogError | None = None
        self._file: Final = SocketFile(path)
        self.path: Final[Path] = self._file.path
        self._wakeup: Final = Wakeup()
        self._thread = threading.Thread(target=self._accept_all, name="qmp", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to serve."""
        with self._lock:
            if self._closing:
                raise ClosedError("the QMP server was closed")
            if self._thread.ident is not None:
                raise UsageError("the QMP server was started already")
            self._thread.start()

    def emit(self, event: str, data: Mapping[str, Any] | Struct | None = None) -> None:
        """Tell every negotiated client of an event. Any thread may call this, and never waits for a client."""
        body = UNSET if data is None else msgspec.to_builtins(data, str_keys=True)
        message = encode(Event(event, Timestamp.now(), body))
        for connection in self._snapshot():
            connection.emit(message)

    def close(self) -> None:
        """Stop serving, remove the socket, let commands under way end within a bound; idempotent.

        A handler that takes longer is recorded as a failure; its client is hung up on, its thread ends with it.
        Not for handlers to call: one that ends the server does so in its command's ``after_reply``.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
            started = self._thread.ident is not None
        self._wakeup.set()
        if started and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)
        try:
            self._file.close()
        finally:
            self._end_connections()
            self._wakeup.close()

    def _end_connections(self) -> None:
        connections = self._snapshot()
        for connection in connections:
            connection.stop()
        connections = _join(connections)
        for connection in connections:
            connection.drop()
        for _ in _join(connections):
            self._fail(UsageError("a QMP command is still running after the server was closed"))

    def _fail(self, error: DirtylogError) -> None:
        with self._lock:
            self.failure = self.failure or error
        if self._on_failure is not None:
            self._on_failure(error)

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.remove(connection)

    def _snapshot(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    def _accept_all(self) -> None:
        waiter = Waiter(self._file.socket.fileno(), self._wakeup)
        while not self._closing:
            waiter.wait(read=True)
            try:
                client, _ = self._file.socket.accept()
                self._welcome(client)
            except (BlockingIOError, ConnectionError):  # the client has left already
                continue
            except OSError as error:
                self._fail(HostError(f"cannot serve a QMP client: {error.strerror}"))
                waiter.wait(timeout=_RETRY_SECONDS)

    def _welcome(self, client: socket.socket) -> None:
        try:
            if not self._admit(client):
                desc = f"{MAX_CLIENTS} clients are connected already"
                client.setblocking(False)
                client.send(encode(Failure(ErrorBody(ErrorClass.GENERIC_ERROR, desc))))
                client.close()
        except BaseException:
            client.close()
            raise

    def _admit(self, client: socket.socket) -> bool:
        with self._lock:
            if len(self._connections) >= MAX_CLIENTS:
                return False
            session = Session(self._registry)
            connection = Connection(client, session, self._command_lock, on_failure=self._fail, on_end=self._forget)
            connection.start()
            self._connections.append(connection)
            return True


def _join(connections: list[Connection]) -> list[Connection]:
    """Those that do not end within the bound."""
    end = time.monotonic() + _CLOSE_SECONDS
    return [connection for connection in connections if not connection.join(max(0.0, end - time.monotonic()))]

"""A synchronous QMP client, for dirtylog's machines and for QEMU's."""

import os
import socket
import time
from collections import deque
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from dirtylog.control.qmp.messages import (
    ErrorBody,
    Event,
    Failure,
    Greeting,
    QMPCommandError,
    QMPError,
    Version,
    decode_object,
)
from dirtylog.control.qmp.registry import NEGOTIATE
from dirtylog.control.qmp.stream import JSONStream
from dirtylog.errors import (
    ClosedError,
    DisconnectedError,
    HostError,
    PeerError,
    ProtocolError,
    RefusedError,
)
from dirtylog.linux.socketfile import check_path

MAX_MESSAGE: Final = 16 << 20
"""The most bytes of one message from a server; QEMU's longest, its schema, has a fifth of a MiB."""

_RECEIVE_SIZE: Final = 1 << 16


class QMPClient:
    """A negotiated QMP session. Its methods are for one thread at a time.

    Args:
        path: the server's Unix socket.
        timeout: the most seconds that connecting, or a command's reply, may take.

    Attributes:
        version: what the server told of itself.
        timeout: the most seconds to wait for a reply from now on.

    Raises:
        UsageError: the path cannot name a socket.
        HostError: no permission to connect.
        DisconnectedError: nobody listens there, or nobody answers.
        ProtocolError: whoever listens there does not speak QMP.
        RefusedError: the server refused the session.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 10.0) -> None:
        self._path: Final = os.fspath(path)
        self.timeout = timeout
        self._stream: Final = JSONStream(MAX_MESSAGE)
        self._events: deque[Event] = deque()
        self._last_id = 0
        check_path(self._path)
        self._socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            self.version: Final[Version] = self._greet().body.version
            self.execute(NEGOTIATE)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; idempotent."""
        self._socket.close()

    def execute(self, command: str, /, **arguments: object) -> Any:
        """Execute a command and wait for its reply.

        Args:
            command: its name.
            arguments: its arguments, with underscores for the dashes in their names.

        Returns:
            What the server returned, as plain Python objects.

        Raises:
            QMPCommandError: the server answered with an error.
            PeerError: no reply came in time. One that comes later is not mistaken for another command's.
            DisconnectedError: the connection is lost.
            ProtocolError: the server broke the protocol.
        """
        self._last_id += 1
        request: dict[str, object] = {"execute": command, "id": self._last_id}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        deadline = time.monotonic() + self.timeout
        self._send(msgspec.json.encode(request) + b"\n", deadline)
        while (members := self._receive(deadline)) is not None:
            if members.get("id") == self._last_id:
                return self._result(members)
            if "error" in members and "id" not in members:
                desc = self._error(members).desc
                raise ProtocolError(f"the QMP server at {self._path} does not understand its client: {desc}")
            self._note(members)
        raise PeerError(f"the QMP server at {self._path} did not answer {command} in {self.timeout:g} s")

    def events(self) -> list[Event]:
        """The events that came and were not taken yet; does not wait.

        Raises:
            DisconnectedError: the connection is lost, and no event is left.
        """
        try:
            while (members := self._receive(time.monotonic())) is not None:
                self._note(members)
        except DisconnectedError:
            if not self._events:
                raise
        taken = list(self._events)
        self._events.clear()
        return taken

    def next_event(self, timeout: float) -> Event | None:
        """Take the next event, waiting for it at most ``timeout`` seconds; None when none came.

        Raises:
            DisconnectedError: the connection is lost.
        """
        deadline = time.monotonic() + timeout
        while not self._events:
            members = self._receive(deadline)
            if members is None:
                return None
            self._note(members)
        return self._events.popleft()

    def wait_event(self, name: str, timeout: float | None = None) -> Event:
        """Take the first event of a name, waiting for it; other events are left for later.

        Args:
            name: the event's name.
            timeout: the most seconds to wait, the client's own unless given.

        Raises:
            PeerError: no such event came in time.
            DisconnectedError: the connection is lost.
        """
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while (event := next((event for event in self._events if event.event == name), None)) is None:
            members = self._receive(deadline)
            if members is None:
                raise PeerError(f"the QMP server at {self._path} sent no event {name} in {seconds:g} s")
            self._note(members)
        self._events.remove(event)
        return event

    def _connect(self) -> None:
        remedy = f"start a machine with it: dirtylog run IMAGE --qmp {self._path}"
        self._socket.settimeout(self.timeout)
        try:
            self._socket.connect(self._path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DisconnectedError(f"there is no QMP socket {self._path}", remedy=remedy) from error
        except ConnectionRefusedError as error:
            raise DisconnectedError(f"nobody listens on the QMP socket {self._path}", remedy=remedy) from error
        except PermissionError as error:
            cause = f"no permission to connect to the QMP socket {self._path}"
            raise HostError(cause, remedy="run as the user who owns the machine, or as root") from error
        except BlockingIOError as error:
            cause = f"too many clients wait at the QMP socket {self._path}"
            raise DisconnectedError(cause, remedy="end another client, or try again later") from error
        except OSError as error:
            cause = f"cannot connect to the QMP socket {self._path}: {error.strerror or error}"
            raise DisconnectedError(cause) from error

    def _greet(self) -> Greeting:
        try:
            members = self._receive(time.monotonic() + self.timeout)
            if members is None:
                cause = f"whoever listens on {self._path} sent no QMP greeting in {self.timeout:g} s"
                raise DisconnectedError(cause, remedy="end its other client, if it serves only one as QEMU does")
            if "error" in members:
                cause = f"the QMP server at {self._path} refuses to serve: {self._error(members).desc}"
                raise RefusedError(cause)
            return msgspec.convert(members, Greeting)
        except (ProtocolError, msgspec.ValidationError) as error:
            cause = f"whoever listens on {self._path} is not a QMP server ({error})"
            raise ProtocolError(cause, remedy="name the socket that was given to --qmp") from error

    def _send(self, data: bytes, deadline: float) -> None:
        self._check_open()
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            self._socket.sendall(data)
        except (TimeoutError, BlockingIOError) as error:
            self.close()  # part of the request may be sent, so no other can follow
            raise PeerError(f"the QMP server at {self._path} takes no requests") from error
        except ConnectionError as error:
            raise DisconnectedError(f"the QMP server at {self._path} is gone") from error

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None when none came in time."""
        while (message := self._stream.next()) is None:
            data = self._read(deadline)
            if data is None:
                return None
            self._stream.feed(data)
        try:
            return decode_object(message)
        except QMPError as error:
            raise ProtocolError(f"the QMP server at {self._path} sent what is not a message: {error}") from error

    def _read(self, deadline: float) -> bytes | None:
        self._check_open()
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except (TimeoutError, BlockingIOError):
            return None
        except ConnectionError as error:
            raise DisconnectedError(f"the QMP server at {self._path} is gone") from error
        if not data:
            raise DisconnectedError(f"the QMP server at {self._path} closed the connection")
        return data

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise ClosedError(f"the QMP connection to {self._path} was closed")

    def _note(self, members: dict[str, Any]) -> None:
        """Keep an event; anything else is the reply to a command that was given up."""
        if "event" not in members:
            return
        try:
            self._events.append(msgspec.convert(members, Event))
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the QMP server at {self._path} sent a malformed event: {error}") from error

    def _result(self, members: dict[str, Any]) -> Any:
        if "return" in members:
            return members["return"]
        body = self._error(members)
        raise QMPCommandError(body.error_class, body.desc)

    def _error(self, members: dict[str, Any]) -> ErrorBody:
        try:
            return msgspec.convert(members, Failure).error
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the QMP server at {self._path} sent a malformed reply: {error}") from error

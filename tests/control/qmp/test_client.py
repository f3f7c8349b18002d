import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dirtylog.control.qmp import Arguments, Event, NoArguments, QMPClient, QMPCommandError
from dirtylog.errors import (
    ClosedError,
    DisconnectedError,
    HostError,
    PeerError,
    ProtocolError,
    RefusedError,
    UsageError,
)

SECONDS = 10.0

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": ["oob"]}}\r\n'
)
NEGOTIATED = GREETING + b'{"return": {}, "id": 1}\r\n'


class Limits(Arguments, frozen=True):
    max_bandwidth: int
    downtime_limit: int = 300


@contextlib.contextmanager
def scripted(path: Path, script: Callable[[socket.socket], None]) -> Iterator[None]:
    """A server that does to its one client what the script says, then hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(SECONDS)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def saying(*parts: bytes, hang_up: bool = False) -> Callable[[socket.socket], None]:
    """Sends the first part at once, and each of the others after one more request."""

    def script(connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            connection.sendall(parts[0])
            for part in parts[1:]:
                requests.readline()
                connection.sendall(part)
            if not hang_up:
                requests.read()  # until the client leaves

    return script


class TestWithOurServer:
    def test_version_is_the_servers(self, served: Any, path: Path) -> None:
        with QMPClient(path) as client:
            assert client.version == served.registry.version

    def test_command_returns_plain_objects(self, served: Any, path: Path) -> None:
        with QMPClient(str(path)) as client:
            assert client.execute("query-version") == msgspec.to_builtins(served.registry.version)

    def test_arguments_get_dashes(self, served: Any, path: Path) -> None:
        served.registry.add("limits", Limits, lambda arguments: arguments)
        with QMPClient(path) as client:
            result = client.execute("limits", max_bandwidth=5, downtime_limit=7)
        assert result == {"max-bandwidth": 5, "downtime-limit": 7}

    def test_refused_command_raises_with_class_and_description(self, served: Any, path: Path) -> None:
        with QMPClient(path) as client:
            with pytest.raises(QMPCommandError, match="no command 'nope'") as caught:
                client.execute("nope")
            assert caught.value.error_class == "CommandNotFound"
            with pytest.raises(QMPCommandError, match="parameter 'a-b' is unexpected"):
                client.execute("query-version", a_b=1)

    def test_events_are_taken_in_order(self, served: Any, path: Path) -> None:
        served.registry.add("stop", NoArguments, lambda _: served.server.emit("STOP"))
        with QMPClient(path) as client:
            assert client.events() == []
            client.execute("stop")
            served.server.emit("RESUME", {"why": "asked"})
            events = client.events()
            assert [(event.event, event.data) for event in events] == [
                ("STOP", msgspec.UNSET),
                ("RESUME", {"why": "asked"}),
            ]
            assert client.events() == []

    def test_waiting_for_an_event_leaves_the_others(self, served: Any, path: Path) -> None:
        with QMPClient(path) as client:
            for name in ("STOP", "MIGRATION", "RESUME", "MIGRATION"):
                served.server.emit(name)
            first = client.wait_event("MIGRATION")
            assert isinstance(first, Event)
            assert first.event == "MIGRATION"
            assert [event.event for event in client.events()] == ["STOP", "RESUME", "MIGRATION"]

    def test_event_that_does_not_come_is_an_error(self, served: Any, path: Path) -> None:
        with QMPClient(path) as client:
            served.server.emit("STOP")
            with pytest.raises(PeerError, match=r"sent no event RESUME in 0\.01 s"):
                client.wait_event("RESUME", timeout=0.01)
            assert client.wait_event("STOP", timeout=0).event == "STOP"

    def test_end_of_the_server_is_told_after_the_last_event(self, served: Any, path: Path) -> None:
        with QMPClient(path) as client:
            served.server.emit("SHUTDOWN")
            served.server.close()
            assert [event.event for event in client.events()] == ["SHUTDOWN"]
            with pytest.raises(DisconnectedError, match="closed the connection"):
                client.events()
            with pytest.raises(DisconnectedError):
                client.wait_event("RESUME")
            with pytest.raises(DisconnectedError, match="is gone"):
                client.execute("query-version")

    def test_closed_client_is_of_no_use(self, served: Any, path: Path) -> None:
        client = QMPClient(path)
        client.close()
        client.close()
        with pytest.raises(ClosedError, match="was closed"):
            client.execute("query-version")
        with pytest.raises(ClosedError):
            client.events()

    def test_server_with_too_many_clients_refuses(self, served: Any, path: Path) -> None:
        with contextlib.ExitStack() as clients:
            for _ in range(32):
                clients.enter_context(QMPClient(path))
            with pytest.raises(RefusedError, match="refuses to serve: 32 clients"):
                QMPClient(path)


class TestNobodyToTalkTo:
    def test_missing_socket_is_named(self, path: Path) -> None:
        with pytest.raises(DisconnectedError, match=r"there is no QMP socket .*; start a machine"):
            QMPClient(path)

    def test_directory_that_is_a_file_is_named(self, path: Path) -> None:
        path.touch()
        with pytest.raises(DisconnectedError, match="there is no QMP socket"):
            QMPClient(path / "qmp.sock")

    def test_stale_socket_is_named(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        with pytest.raises(DisconnectedError, match="nobody listens on the QMP socket"):
            QMPClient(path)

    def test_other_kind_of_socket_is_named(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind(str(path))
            with pytest.raises(DisconnectedError, match="cannot connect to the QMP socket"):
                QMPClient(path)

    def test_missing_permission_is_named(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(13, "denied")

        monkeypatch.setattr(socket.socket, "connect", refuse)  # root is refused nothing
        with pytest.raises(HostError, match="no permission to connect"):
            QMPClient(path)

    def test_path_that_is_too_long_is_refused(self) -> None:
        with pytest.raises(UsageError, match="more than the 107"):
            QMPClient("x" * 108)

    def test_socket_whose_queue_is_full_is_named(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
            listener.bind(str(path))
            listener.listen(0)
            waiting.connect(str(path))
            with pytest.raises(DisconnectedError, match="too many clients wait"):
                QMPClient(path)


class TestStrangePeers:
    @pytest.mark.parametrize(
        "greeting",
        [
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\x00\x01\x02",
            b"{bad}",
            b"[]",
            b"{}\n",
            b'{"QMP": {}}',
            b'{"QMP": {"version": {"qemu": {"major": "7"}, "package": ""}, "capabilities": []}}',
            b'{"return": {}}',
            b'{"error": {"desc": 1}}',
        ],
    )
    def test_peer_that_does_not_speak_qmp_is_told_apart(self, path: Path, greeting: bytes) -> None:
        with scripted(path, saying(greeting)), pytest.raises(ProtocolError, match=r"is not a QMP server \("):
            QMPClient(path)

    def test_peer_that_says_nothing_is_an_error(self, path: Path) -> None:
        with scripted(path, saying(b"")), pytest.raises(DisconnectedError, match=r"no QMP greeting in 0\.01 s"):
            QMPClient(path, timeout=0.01)

    @pytest.mark.parametrize("said", [b"", GREETING[:20]])
    def test_peer_that_hangs_up_is_an_error(self, path: Path, said: bytes) -> None:
        script = saying(said, hang_up=True)
        with scripted(path, script), pytest.raises(DisconnectedError, match="closed the connection"):
            QMPClient(path)

    def test_greeting_in_pieces_is_understood(self, path: Path) -> None:
        def script(connection: socket.socket) -> None:
            for byte in NEGOTIATED.rstrip():  # the client may leave once it has the last bracket
                connection.send(bytes([byte]))
            connection.recv(1 << 16)

        with scripted(path, script), QMPClient(path) as client:
            assert client.version.qemu.major == 7

    def test_connection_lost_within_a_command_is_an_error(self, path: Path) -> None:
        script = saying(NEGOTIATED, b"", b'{"return"', hang_up=True)
        with scripted(path, script), QMPClient(path) as client, pytest.raises(DisconnectedError):
            client.execute("query-status")

    def test_late_reply_is_not_taken_for_another(self, path: Path) -> None:
        late = b'{"return": "late", "id": 2}\n{"return": "right", "id": 3}\n'
        with scripted(path, saying(NEGOTIATED, b"", b"", late)), QMPClient(path) as client:
            client.timeout = 0.01
            with pytest.raises(PeerError, match=r"did not answer slow in 0\.01 s"):
                client.execute("slow")
            client.timeout = SECONDS
            assert client.execute("quick") == "right"

    @pytest.mark.parametrize(
        ("reply", "cause"),
        [
            (b'{"id": 2}', "malformed reply"),
            (b'{"error": "no", "id": 2}', "malformed reply"),
            (b'{"error": {"class": "GenericError", "desc": "bad JSON"}}', "does not understand its client: bad JSON"),
            (b'{"event": 1}', "malformed event"),
            (b'{"event": "STOP"}', "malformed event"),
            (b"[]", "sent what is not a message"),
            (b"{,}", "sent what is not a message"),
            (b"oops\n", "invalid JSON"),
        ],
    )
    def test_peer_that_breaks_the_protocol_is_an_error(self, path: Path, reply: bytes, cause: str) -> None:
        script = saying(NEGOTIATED, b"", reply)
        with scripted(path, script), QMPClient(path) as client, pytest.raises(ProtocolError, match=cause):
            client.execute("query-status")

    def test_unknown_members_and_error_classes_are_accepted(self, path: Path) -> None:
        reply = b'{"error": {"class": "Novel", "desc": "no", "more": 1}, "id": 2, "more": 1}'
        with scripted(path, saying(NEGOTIATED, b"", reply)), QMPClient(path) as client:
            with pytest.raises(QMPCommandError, match="no") as caught:
                client.execute("query-status")
            assert caught.value.error_class == "Novel"

    def test_peer_that_takes_no_requests_is_an_error(self, path: Path) -> None:
        done = threading.Event()

        def script(connection: socket.socket) -> None:
            connection.sendall(NEGOTIATED)
            done.wait(SECONDS)

        with scripted(path, script):
            client = QMPClient(path)
            client.timeout = 0.05
            with pytest.raises(PeerError, match="takes no requests"):
                client.execute("long", text="x" * 5_000_000)
            with pytest.raises(ClosedError):
                client.execute("another")
            done.set()


def test_failed_connection_leaves_no_descriptor(path: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(DisconnectedError):
            QMPClient(path)
    assert len(os.listdir("/proc/self/fd")) == files

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dirtylog.control.qmp import CommandRegistry, QMPServer

SECONDS = 10.0
"""The bound of every wait."""


class RawClient:
    """A socket that sends what it is told, and reads lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> Any:
        """The next message, or None at the end of the stream."""
        line = self._lines.readline()
        return msgspec.json.decode(line) if line else None

    def ask(self, data: bytes) -> Any:
        self.send(data)
        return self.read()

    def negotiate(self) -> "RawClient":
        assert "QMP" in self.read()
        assert self.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
        return self

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


class Server:
    """A server under test and the failures it told of."""

    def __init__(self, path: Path) -> None:
        self.registry = CommandRegistry()
        self.failures: list[Exception] = []
        self.failed = threading.Event()
        self.server = QMPServer(path, self.registry, on_failure=self._note)

    def _note(self, error: Exception) -> None:
        self.failures.append(error)
        self.failed.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest.fixture
def served(path: Path) -> Iterator[Server]:
    """A started server with the commands that a test adds."""
    served = Server(path)
    with served.server:
        served.server.start()
        yield served


@pytest.fixture
def connect(path: Path) -> Iterator[Callable[..., RawClient]]:
    """Connects a raw client, to the server under test unless told another path; closed at the end of the test."""
    clients: list[RawClient] = []

    def make(server: Path = path) -> RawClient:
        clients.append(RawClient(server))
        return clients[-1]

    yield make
    for client in clients:
        client.close()

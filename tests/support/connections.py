"""Sockets that are connected to each other."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HOST: Final = "127.0.0.1"


@contextmanager
def connections() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets of TCP."""
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            yield one, other

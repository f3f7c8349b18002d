"""``python -m support.crowd URI COUNT``: strangers at a destination, all at once, who say what else programs say."""

import itertools
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from support.processes import Process
from support.waiting import BOUND

from dirtylog.linux.sockets import set_timeouts
from dirtylog.migration import Address, parse_address
from dirtylog.migration.address import UnixAddress
from dirtylog.migration.credentials import socket_address
from dirtylog.migration.messages import Hello, encode
from dirtylog.migration.protocol import Protocol

_THREADS: Final = 4
_PREAMBLE: Final = Protocol.preamble()
_HELLO: Final = encode(Hello("another", (), False, 1, bytes(16), False, False))
_SAYINGS: Final = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    bytes(1000),
    b"DIRTYLOG" + struct.pack("<I", 77),
    _PREAMBLE[:5],
    _PREAMBLE,
    _PREAMBLE + struct.pack("<HHI", 1, 0, 0xFFFFFFFF),
    _PREAMBLE + struct.pack("<HHI", 1, 0, 1 << 20),
    _PREAMBLE + _HELLO[:-1],
    _PREAMBLE + _HELLO,
)


def connected(address: Address) -> socket.socket:
    """A connection on which nothing was said."""
    address = socket_address(address, None)
    if not isinstance(address, UnixAddress):
        return socket.create_connection((address.host, address.port), timeout=BOUND)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        set_timeouts(sock, BOUND)  # with Python's own a full queue would be an error
        sock.connect(address.path)
        stack.pop_all()
    return sock


def strangers(address: Address, count: int) -> Iterator[socket.socket]:
    """Their connections, which are the caller's to close. There are fewer if the destination waits no more."""
    for saying in itertools.islice(itertools.cycle(_SAYINGS), count):
        with suppress(OSError):
            sock = connected(address)
            yield sock
            sock.sendall(saying)


@contextmanager
def crowd(address: Address, count: int) -> Iterator[Process]:
    """Strangers in a process of their own."""
    with Process((sys.executable, "-m", "support.crowd", str(address), str(count))) as process:
        yield process


def main(uri: str, count: str) -> None:
    """Connect with all of them, say so, and stay."""
    come: list[socket.socket] = []
    address = parse_address(uri)
    share = int(count) // _THREADS
    threads = [threading.Thread(target=lambda: come.extend(strangers(address, share))) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write("all have come\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

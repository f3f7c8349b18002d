"""What the two sides of a migration say, recorded, and played to one of them alone."""

import logging
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.fake_machine import FakeMachine
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import CancelledError
from dirtylog.machine import Machine
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Parameters, parse_address
from dirtylog.migration.messages import HEAD, PREAMBLE, Failed, Message, Pages, decode_body, decode_head, encode
from dirtylog.migration.protocol import Protocol
from dirtylog.migration.refusals import LOGGER


@dataclass(frozen=True)
class Piece:
    """A preamble, a frame, or the payload of a `Pages` message."""

    name: str
    data: bytes

    @property
    def message(self) -> Message:
        """What a frame says."""
        kind, _ = decode_head(self.data[: HEAD.size])
        return decode_body(kind, self.data[HEAD.size :])


@dataclass(frozen=True)
class Recording:
    """All that was said in a migration with ``verify`` of a machine that did not write."""

    source: tuple[Piece, ...]
    destination: tuple[Piece, ...]


PREAMBLE_PIECE = Piece("preamble", Protocol.preamble())


def piece(message: Message) -> Piece:
    return Piece(type(message).__name__, encode(message))


def stream(pieces: Sequence[Piece]) -> bytes:
    return b"".join(one.data for one in pieces)


def first(pieces: Sequence[Piece], name: str) -> int:
    """Where the first piece of a name is."""
    return next(index for index, one in enumerate(pieces) if one.name == name)


def replaced(pieces: Sequence[Piece], name: str, *substitutes: Piece) -> tuple[Piece, ...]:
    """The pieces with others in the place of the first of a name."""
    index = first(pieces, name)
    return (*pieces[:index], *substitutes, *pieces[index + 1 :])


def parse(data: bytes) -> Iterator[Piece]:
    """The pieces of one side's stream, as far as they are whole."""
    yield Piece("preamble", data[: PREAMBLE.size])
    data = data[PREAMBLE.size :]
    while len(data) >= HEAD.size:
        kind, length = decode_head(data[: HEAD.size])
        end = HEAD.size + length
        yield (frame := Piece(kind.__name__, data[:end]))
        data = data[end:]
        if kind is Pages:
            assert isinstance(frame.message, Pages)
            end = frame.message.payload_size
            yield Piece("payload", data[:end])
            data = data[end:]


class PairListener(Listener):
    """Accepts the one connection it was given, and waits for others in vain."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock
        self._credentials = None
        self._over = threading.Event()

    def accept(self, timeout: float | None = None) -> socket.socket | None:
        if self._sock is None and self._over.wait(timeout):
            raise CancelledError("waiting for a migration was cancelled")
        sock, self._sock = self._sock, None
        return sock

    def abort(self) -> None:
        self._over.set()

    def close(self) -> None:
        """The connection is the channel's by now."""


def accepted(listener: Listener) -> socket.socket:
    """The next connection."""
    sock = listener.accept(BOUND)
    assert sock is not None, "nobody connected"
    return sock


def record(directory: Path) -> Recording:
    """Record a migration: a relay between the two sides keeps what passes."""
    said: dict[str, bytearray] = {"source": bytearray(), "destination": bytearray()}

    def relay(name: str, one: socket.socket, other: socket.socket) -> None:
        while data := one.recv(1 << 20):
            said[name] += data
            other.sendall(data)
        with suppress(OSError):  # closed by the side itself
            other.shutdown(socket.SHUT_WR)

    near, far = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as server, near, fake_machine() as source, fake_machine(boot=False) as guest:
        path = directory / "recorded"
        server.bind(str(path))
        server.listen()
        source.resume()
        tasks = [Task(OutgoingMigration(source, parse_address(f"unix:{path}"), Parameters(verify=True)).run)]
        tasks.append(Task(IncomingMigration(guest, PairListener(far)).run))
        connection, _ = server.accept()
        with connection:
            tasks.append(Task(lambda: relay("source", connection, near)))
            tasks.append(Task(lambda: relay("destination", near, connection)))
            for task in tasks:
                task.join()
    return Recording(tuple(parse(bytes(said["source"]))), tuple(parse(bytes(said["destination"]))))


@contextmanager
def fake_machine(*, boot: bool = True, ram_pages: int | None = None) -> Iterator[FakeMachine]:
    """A machine that does not write."""
    made = FakeMachine(writes=False) if ram_pages is None else FakeMachine(ram_pages, writes=False)
    try:
        if boot:
            made.boot()
        yield made
    finally:
        made.close()
        made.memory.close()


def talk(sock: socket.socket, data: bytes, *, end: bool = True) -> bytes:
    """Say all of something, and end this direction unless told not to; what the other side says until it ends."""
    heard = bytearray()

    def listen() -> None:
        with suppress(ConnectionResetError):  # it went away with bytes unread
            while received := sock.recv(1 << 20):
                heard.extend(received)

    sock.settimeout(BOUND)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    with suppress(BrokenPipeError, ConnectionResetError):  # it stopped listening, which is its right
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
    thread.join(BOUND)
    assert not thread.is_alive(), "the other side did not end"
    return bytes(heard)


def play_to_destination(guest: Machine, data: bytes) -> tuple[BaseException | None, tuple[Piece, ...]]:
    """Play a source's stream to a machine: the error that its migration ended with, and what it answered.

    A destination that turned the source away waits for another; it is told to stop, so the error is a `CancelledError`.
    """
    one, other = socket.socketpair()
    with one, closing(PairListener(other)) as listener, refusals() as refused:
        incoming = IncomingMigration(guest, listener)
        task = Task(incoming.run)
        heard = talk(one, data)
        wait_until(lambda: refused or not task.running, "the migration ended, or its source was turned away")
        if refused:
            incoming.abort()
        return task.error(), tuple(parse(heard))


@contextmanager
def refusals() -> Iterator[list[str]]:
    """What is logged about connections that were turned away."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        yield logged
    finally:
        LOGGER.removeHandler(handler)


@contextmanager
def playing_destination(directory: Path, data: bytes, *, end: bool = True) -> Iterator[str]:
    """Somebody at an address who plays a destination's stream to who connects, whatever that one says; see `talk`."""
    path = directory / "played"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                talk(connection, data, end=end)

        task = Task(answer)
        yield f"unix:{path}"
        task.join()
    path.unlink()


def reason(pieces: Sequence[Piece]) -> str | None:
    """Why a side gave up, if it said so."""
    message = pieces[-1].message if len(pieces) > 1 else None
    return message.reason if isinstance(message, Failed) else None


def patched(frame: Piece, offset: int, form: str, value: int) -> Piece:
    """A frame with one number replaced, ``form`` being its `struct` format and ``offset`` counted in the body."""
    data = bytearray(frame.data)
    struct.pack_into(form, data, HEAD.size + offset, value)
    return Piece(frame.name, bytes(data))

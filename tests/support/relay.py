"""A relay between the two sides of a migration that knows where in which message it is, and does harm there."""

import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
from collections import Counter
from contextlib import suppress
from typing import Final, Self

from support.places import PAST_BODY, PAYLOADS, PREAMBLE_NAME, Boundary, Fault, Step
from support.streams import Piece, parse
from support.waiting import BOUND, wait_until

from dirtylog.migration.address import Address, TCPAddress, UnixAddress
from dirtylog.migration.messages import (
    HEAD,
    MAX_FILES,
    PREAMBLE,
    EncodedPages,
    Page,
    Pages,
    decode_body,
    decode_head,
)
from dirtylog.migration.protocol import Role
from dirtylog.units import MIB, PAGE_SIZE

_ONE_BY_ONE: Final = 24
"""Bytes that come one by one before the rest comes in odd pieces."""
_ODD: Final = 1021


class _Message:
    """A preamble, or a frame with its payload, of which no more was read from its sender than somebody asked for."""

    def __init__(self, incoming: socket.socket, *, greeting: bool) -> None:
        self._incoming = incoming
        self.data = bytearray()
        self.files: list[int] = []
        self.fill(HEAD.size)
        if greeting:
            self.name, self.frame = PREAMBLE_NAME, PREAMBLE.size
        else:
            self._kind, length = decode_head(bytes(self.data))
            self.name, self.frame = self._kind.__name__, HEAD.size + length

    def fill(self, size: int) -> None:
        """Have so many bytes here.

        Raises:
            EOFError: the sender has ended.
        """
        while len(self.data) < size:
            with suppress(ConnectionError):
                if data := self._receive(size - len(self.data)):
                    self.data += data
                    continue
            raise EOFError

    def _receive(self, size: int) -> bytes:
        if self._incoming.family != socket.AF_UNIX:
            return self._incoming.recv(size)
        data, files, _, _ = socket.recv_fds(self._incoming, size, MAX_FILES)
        self.files += files
        return data

    @property
    def payload(self) -> int:
        """Bytes that follow the frame."""
        if self.name not in PAYLOADS:
            return 0
        self.fill(self.frame)
        message = decode_body(self._kind, bytes(self.data[HEAD.size : self.frame]))
        if isinstance(message, Pages | EncodedPages):
            return message.payload_size
        return PAGE_SIZE if isinstance(message, Page) else 1

    def offset(self, boundary: Boundary) -> int:
        """Where a boundary is."""
        return boundary.offset(self.frame, self.payload if boundary in PAST_BODY else 0)

    @property
    def size(self) -> int:
        """All bytes."""
        return self.frame + self.payload


class _Direction:
    """What one side says."""

    def __init__(self, sender: Role, incoming: socket.socket, outgoing: socket.socket) -> None:
        self.sender = sender
        self.incoming, self.outgoing = incoming, outgoing
        self.said = bytearray()
        self.delivered: Counter[str] = Counter()
        self.ended = False

    def receive(self) -> _Message | None:
        """The next message; None at the end."""
        try:
            return _Message(self.incoming, greeting=not self.delivered[PREAMBLE_NAME])
        except EOFError:
            self.ended = True
            with suppress(OSError):
                self.outgoing.shutdown(socket.SHUT_WR)
            return None

    def send(self, message: _Message, start: int, end: int) -> None:
        """Pass a part of a message on, descriptors with the byte that they came with."""
        with suppress(EOFError):
            message.fill(end)
        part = bytes(message.data[start:end])
        self.said += part
        with suppress(ConnectionError):  # the receiver has gone, which the sender will find out
            if message.files:
                self.outgoing.sendall(part[:-1])
                socket.send_fds(self.outgoing, [part[-1:]], message.files)
            else:
                self.outgoing.sendall(part)
        while message.files:
            socket.close(message.files.pop())
        if len(message.data) == end == message.size:
            self.delivered[message.name] += 1

    def wait_until_read(self) -> None:
        """Return once the receiver has read all that was passed on; over a Unix socket only."""

        def unread() -> int:
            (size,) = struct.unpack("i", fcntl.ioctl(self.outgoing, termios.TIOCOUTQ, bytes(4)))
            return int(size)

        wait_until(lambda: not unread(), f"what the {self.sender.value} said was read")


class _Link:
    """One connection of the source's, and that to the destination which it stands for."""

    def __init__(self, relay: "Relay", number: int, near: socket.socket, far: socket.socket) -> None:
        self._relay = relay
        self.number = number
        self._sockets = near, far
        self.source = _Direction(Role.SOURCE, near, far)
        self.destination = _Direction(Role.DESTINATION, far, near)
        self._directions = (self.source, self.destination)
        self._over = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(BOUND)
        assert not self._thread.is_alive(), "a link of the relay did not end"

    def _run(self) -> None:
        try:
            while not self._over and not all(direction.ended for direction in self._directions):
                for direction in self._readable():
                    if not self._over:
                        self._pass_on(direction)
        finally:
            for sock in self._sockets:
                sock.close()

    def _readable(self) -> list[_Direction]:
        poll = select.poll()
        for direction in self._directions:
            if not direction.ended:
                poll.register(direction.incoming, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        return [one for one in self._directions if one.incoming.fileno() in ready]

    def _pass_on(self, direction: _Direction) -> None:
        message = direction.receive()
        if message is None:
            return
        step = self._relay.due(self, direction, message.name)
        if step is None:
            direction.send(message, 0, message.size)
            return
        at = message.offset(step.place.boundary)
        self._over = step.fault not in (Fault.SHORT, Fault.TWICE)
        step.met.set()
        direction.send(message, 0, at)
        if step.fault is Fault.SHORT:
            self._dribble(direction, message, at)
        elif step.fault is Fault.TWICE:
            self._relay.repeat(bytes(self.source.said))
            direction.send(message, at, message.size)
        else:
            self._end(step)

    @staticmethod
    def _dribble(direction: _Direction, message: _Message, at: int) -> None:
        direction.wait_until_read()
        odd = min(at + _ONE_BY_ONE, message.size)
        starts = [*range(at, odd), *range(odd, message.size, _ODD)]
        for start, end in zip(starts, [*starts[1:], message.size], strict=False):
            direction.send(message, start, end)

    def _end(self, step: Step) -> None:
        if step.fault is Fault.CLOSE:
            self._hang_up()
        elif step.fault is Fault.STALL:
            self._stall()
        elif step.fault is Fault.KILL:
            self._kill(step)
        else:
            self._reset()

    def _hang_up(self) -> None:
        """End both directions, and throw away what still comes, so that it is no reset."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        for sock in self._sockets:
            sock.settimeout(BOUND)
            with suppress(OSError):
                while sock.recv(MIB):
                    pass

    def _reset(self) -> None:
        """Over a Unix socket its peer's calls fail likewise, where something that it said is not read."""
        for sock in self._sockets:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def _stall(self) -> None:
        poll = select.poll()
        for sock in self._sockets:
            poll.register(sock, select.POLLRDHUP)
        poll.poll()

    def _kill(self, step: Step) -> None:
        """The kernel still delivers what a process has said before its end; of the place's sender that is no more."""
        step.kill()
        said = self.source if step.victim is Role.SOURCE else self.destination
        if step.victim is not step.place.sender:
            while (message := said.receive()) is not None:
                said.send(message, 0, message.size)


class Relay:
    """Listens where the source connects, and makes a connection to the destination for each one that comes.

    Args:
        address: where the source finds it; over TCP the port may be 0.
        target: where the destination listens.
        steps: what is to happen, one after the other.

    Attributes:
        address: where it listens.
        target: may be replaced.
        doubles: what was answered to those who said again what the source had said.
    """

    def __init__(self, address: Address, target: Address, *steps: Step) -> None:
        self.target = target
        self.doubles: list[tuple[Piece, ...]] = []
        self._steps = list(steps)
        self._links: list[_Link] = []
        self._repeating: list[tuple[socket.socket, threading.Thread]] = []
        self._lock = threading.Lock()
        self._socket = socket.socket(_family(address), socket.SOCK_STREAM)
        self._socket.bind(_name(address))
        self._socket.listen()
        self.address = TCPAddress(*self._socket.getsockname()) if isinstance(address, TCPAddress) else address
        self._thread = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(BOUND)
        self._socket.close()
        for link in self._links:
            link.close()
        self.hang_up_doubles()

    def delivered(self, message: str) -> int:
        """How many messages of a kind have been passed on whole."""
        directions = [one for link in tuple(self._links) for one in (link.source, link.destination)]
        return sum(direction.delivered[message] for direction in directions)

    def due(self, link: _Link, direction: _Direction, message: str) -> Step | None:
        """What is to happen in a message that is about to be passed on."""
        with self._lock:
            step = self._steps[0] if self._steps else None
            if step is None:
                return None
            place = step.place
            if (place.link, place.sender, place.message) != (link.number, direction.sender, message):
                return None
            if place.since and not (link.source.delivered[place.since] or link.destination.delivered[place.since]):
                return None
            return self._steps.pop(0)

    def repeat(self, said: bytes) -> None:
        """Say something to the destination on a connection of its own, and leave that open."""
        try:
            sock = _connect(self.target)
        except OSError:  # nobody is taken in any more
            return
        heard = bytearray()

        def listen() -> None:
            with suppress(OSError):
                while data := sock.recv(MIB):
                    heard.extend(data)
            self.doubles.append(tuple(parse(bytes(heard))))

        thread = threading.Thread(target=listen, name="double", daemon=True)
        thread.start()
        with suppress(OSError):
            sock.sendall(said)
        self._repeating.append((sock, thread))

    def hang_up_doubles(self) -> None:
        """Close them; all answers are in `doubles` then. Idempotent."""
        for sock, thread in self._repeating:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(BOUND)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:  # closed
                return
            try:
                far = _connect(self.target)
            except OSError:
                near.close()
                continue
            self._links.append(_Link(self, len(self._links), near, far))


def _connect(address: Address) -> socket.socket:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(_family(address), socket.SOCK_STREAM))
        sock.connect(_name(address))
        stack.pop_all()
    return sock


def _family(address: Address) -> int:
    return socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_INET


def _name(address: Address) -> str | tuple[str, int]:
    if isinstance(address, UnixAddress):
        return address.path
    assert isinstance(address, TCPAddress)
    return address.host, address.port

"""What is fuzzed. A target takes any bytes; it returns unless what it calls does something that it must not.

Bytes from a peer or a file give what they say, or a `ProtocolError`: no other error, and nothing that is not valid.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Final, cast

import msgspec
import xxhash

from dirtylog.errors import ProtocolError
from dirtylog.memory import RAMBlock
from dirtylog.migration import file as machine_file
from dirtylog.migration.channel import Channel
from dirtylog.migration.encoding import decompress
from dirtylog.migration.file import Description, Layout, MachineFile
from dirtylog.migration.messages import (
    HEAD,
    MAX_BATCH_PAGES,
    MAX_NAME,
    MAX_NAMES,
    MAX_PARTS,
    MAX_RUNS,
    MESSAGES,
    EncodedPages,
    Handover,
    Hello,
    Join,
    Joined,
    Lacking,
    Message,
    OnePage,
    Owed,
    Page,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    Request,
    RunTable,
    Shared,
    State,
    Taken,
    Welcome,
    ZeroPage,
    ZeroPages,
    decode_body,
    decode_head,
    encode,
)
from dirtylog.migration.protocol import Protocol, Role, Stage
from dirtylog.migration.ram import IncomingRAM, checked_block
from dirtylog.migration.urgent_channel import UrgentChannel
from dirtylog.units import PAGE_SIZE

BLOCKS: Final = (("ram", 64), ("rom", 3))
"""Names and pages of the memory that streams fill."""
ENCODED_PAGES: Final = 8
"""The most pages of a frame of the target `Encoded`."""
FILE_HEAD: Final = 40
_LONGEST_FILE: Final = 1 << 40

Target = Callable[[bytes], None]

SESSION: Final = bytes(range(16))
_OPENINGS: Final[tuple[tuple[Message, ...], ...]] = (
    (Hello("fuzz", (), True, 2, SESSION, False, False),),
    (Join(SESSION),),
)
_ANSWERS: Final[dict[type[Message], tuple[Message, ...]]] = {
    Hello: (Welcome("boot", 1, 1),),
    Join: (Joined(),),
    PassEnd: (PassDone(1, 0, 0, 0),),
    Shared: (PassDone(0, 0, 0, 0),),
    State: (Ready((), 0),),
    Handover: (Taken(),),
    Welcome: (PassEnd(1),),
    Joined: (PassEnd(1),),
    Ready: (Handover(),),
}


class Stream:
    """One side's whole stream, heard by the other, which answers and fills memory as it should.

    The first byte says who hears it: an even one a destination; 1 modulo 4 a source, on its first channel; and 3 modulo
    4 a source on a further one.
    """

    def __init__(self) -> None:
        self._blocks = [RAMBlock(name, pages * PAGE_SIZE) for name, pages in BLOCKS]
        self._ram = IncomingRAM(self._blocks)

    def __call__(self, data: bytes) -> None:
        """Hear it to its end, or to its first fault."""
        way = data[0] if data else 0
        protocol = Protocol(Role.SOURCE if way % 2 else Role.DESTINATION)
        for message in _OPENINGS[way // 2 % 2] if way % 2 else ():
            protocol.send(message)
        with contextlib.suppress(ProtocolError):
            self._hear(protocol, memoryview(data)[1:])

    def _hear(self, protocol: Protocol, rest: memoryview) -> None:
        while len(rest) >= (wanted := protocol.wanted):
            message, rest = protocol.receive(bytes(rest[:wanted])), rest[wanted:]
            if message is None:
                continue
            check(message)
            if isinstance(message, RunTable):
                rest = self._fill(message, rest)
            elif isinstance(message, Page):
                rest = rest[PAGE_SIZE:]
            for answer in _answers(protocol, message):
                protocol.send(answer)

    def _fill(self, message: RunTable, rest: memoryview) -> memoryview:
        """Do what a message says with what follows it; what is left."""
        if isinstance(message, ZeroPages):
            self._ram.zero(message)
            return rest
        if isinstance(message, Owed | Lacking):
            checked_block(self._blocks, message)
            return rest
        size = message.payload_size
        if isinstance(message, EncodedPages):
            if len(rest) >= size:
                self._ram.decode(message, bytearray(rest[:size]))
            return rest[size:]
        places = self._ram.place(message)
        assert sum(map(len, places)) == size
        if len(rest) >= size:
            for place in places:
                place[:], rest = rest[: len(place)], rest[len(place) :]
            return rest
        return rest[size:]


def _answers(protocol: Protocol, message: Message) -> tuple[Message, ...]:
    if isinstance(message, PassDone):
        return (PassEnd(2),) if protocol.stage is Stage.SIDE else (State(True, {}),)
    return _ANSWERS.get(type(message), ())


class _Arrived:
    """Stands in for a channel on which bytes arrive in pieces."""

    def __init__(self, data: bytes, piece: int) -> None:
        self.peer = "peer"
        self._rest = data
        self._piece = piece

    @property
    def has_buffered(self) -> bool:
        """Whether more arrives."""
        return bool(self._rest)

    def receive_available(self, buffer: memoryview) -> int:
        """The next piece, as far as it fits."""
        piece, self._rest = self._rest[: min(self._piece, len(buffer))], self._rest[min(self._piece, len(buffer)) :]
        buffer[: len(piece)] = piece
        return len(piece)


def urgent(data: bytes) -> None:
    """What is heard on the urgent channel: by whom, says the first byte; in pieces of what size, the next two."""
    role = Role.SOURCE if data and data[0] % 2 else Role.DESTINATION
    piece, rest = 1 + int.from_bytes(data[1:3], "little"), data[3:]
    channel = UrgentChannel(cast(Channel, _Arrived(rest, piece)), role)
    found = []
    with contextlib.suppress(ProtocolError):
        for block, page, address in channel.receive():
            found.append((block, page, ctypes.string_at(address, PAGE_SIZE) if address else None))
    assert found == list(_on_urgent(rest, (Request,) if role is Role.SOURCE else (Page, ZeroPage)))


def _on_urgent(rest: bytes, kinds: tuple[type[Message], ...]) -> Iterator[tuple[int, int, bytes | None]]:
    """The same, read with the means for any message."""
    while len(rest) >= HEAD.size:
        try:
            kind, length = decode_head(rest[: HEAD.size])
            message = decode_body(kind, rest[HEAD.size : HEAD.size + length])
        except ProtocolError:
            return
        contents = rest[HEAD.size + length :][: PAGE_SIZE if isinstance(message, Page) else 0]
        if not isinstance(message, kinds) or len(contents) < (PAGE_SIZE if isinstance(message, Page) else 0):
            return
        assert isinstance(message, OnePage)
        yield message.block, message.page, contents or None
        rest = rest[HEAD.size + length + len(contents) :]


def body(data: bytes) -> None:
    """A message's body; the first byte is the message's type."""
    kind = MESSAGES.get(data[0]) if data else None
    if kind is None:
        return
    try:
        message = decode_body(kind, data[1:])
    except ProtocolError:
        return
    assert type(message) is kind
    check(message)
    frame = encode(message)
    assert decode_head(frame[: HEAD.size]) == (kind, len(frame) - HEAD.size)
    assert decode_body(kind, frame[HEAD.size :]) == message


def check(message: Message) -> None:
    """Whether a message that was received is what `docs/wire-format.md` says of it."""
    if isinstance(message, State):
        names = [name for part in message.parts.values() for name in part]
        assert len(message.parts) <= MAX_PARTS
        assert all(len(part) <= MAX_NAMES for part in message.parts.values())
        assert all(len(name) <= MAX_NAME for name in (*message.parts, *names))
    if not isinstance(message, RunTable):
        return
    runs = message.runs.tolist()
    assert 0 < len(runs) <= MAX_RUNS
    assert message.pages == sum(count for _, count in runs)
    end = 0
    for first, count in runs:
        assert first >= end
        assert count > 0
        end = first + count
    if isinstance(message, Pages | EncodedPages):
        assert message.pages <= MAX_BATCH_PAGES
        assert 0 < message.payload_size <= message.pages * PAGE_SIZE
        assert message.numbers.tolist() == [page for first, count in runs for page in range(first, first + count)]


def encoded(data: bytes) -> None:
    """A zstd frame of pages; the first byte says of how many."""
    pages = 1 + (data[0] if data else 0) % ENCODED_PAGES
    with contextlib.suppress(ProtocolError):
        assert decompress(data[1:], pages).shape == (pages, PAGE_SIZE // 8)


class File:
    """A machine in a file: a flag, 40 bytes of the head, the description's length in two, the description, the state.

    With an odd flag the head is one that fits the rest, so that the rest is read.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("machine")

    def __call__(self, data: bytes) -> None:
        """Read its facts, or find the fault."""
        flag, head, length, rest = data[:1], data[1 : 1 + FILE_HEAD], data[41:43], data[43:]
        size = int.from_bytes(length, "little")
        self._write(head if not flag or flag[0] % 2 == 0 else None, rest[:size], rest[size:])
        try:
            file = MachineFile(f"/proc/self/fd/{self._fd}")
        except ProtocolError:
            return
        try:
            assert isinstance(file.description, Description)
            assert isinstance(file.state, State)
        finally:
            file.close()

    def _write(self, head: bytes | None, description: bytes, state: bytes) -> None:
        end = _end(description)
        if head is None:
            digest = xxhash.xxh3_128_digest(description + state)
            numbers = machine_file.VERSION, len(description), len(state), digest
            head = machine_file._HEAD.pack(machine_file.MAGIC, *numbers)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, head, 0)
        os.pwrite(self._fd, description, machine_file._DESCRIPTION)
        if end <= _LONGEST_FILE:
            os.pwrite(self._fd, state, end)


def _end(description: bytes) -> int:
    """Where the state has to be."""
    try:
        blocks = msgspec.msgpack.decode(description, type=Description).blocks
    except (msgspec.DecodeError, UnicodeDecodeError):
        blocks = ()
    return Layout(blocks).end


TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "stream": Stream,
    "body": lambda: body,
    "urgent": lambda: urgent,
    "encoded": lambda: encoded,
    "file": File,
}
"""Each makes a target, of its own or shared."""

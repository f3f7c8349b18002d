"""What the two sides of a migration say to each other, and how each message looks on the wire.

A frame is a head (type, reserved, length of the body; little-endian) and a body: msgpack for messages that carry facts,
a table of page runs for memory. The pages of a `Pages` message follow its frame, raw, in the order of its runs.
`docs/wire-format.md` describes all of it byte by byte.
"""

import itertools
import struct
from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt

from dirtylog.errors import ProtocolError
from dirtylog.units import PAGE_SIZE

VERSION: Final = 5
MAGIC: Final = b"DIRTYLOG"
PREAMBLE: Final = struct.Struct("<8sI")
"""Each side's first bytes: magic, version. Everything after them belongs to that version."""
HEAD: Final = struct.Struct("<HHI")
"""A frame's head: type, zero, length of the body."""
PAGE_FRAME: Final = struct.Struct("<HHIQQ")
"""The head and body of a message about one page: the number of its block, and its own there."""

MAX_BODY: Final = 16 << 20
"""The longest body of a `State`; machine state takes some KiB per vCPU."""
MAX_SHORT_BODY: Final = 2 << 20
"""The longest body of what grows with blocks or runs, with room for `MAX_RUNS`: what a stranger can make us hold."""
MAX_FACTS_BODY: Final = 32 << 10
"""The longest body of any other message, with room for a `ShortText`."""
MAX_PARTS: Final = 1024
"""The most parts of a machine's state: a few, and one for each vCPU."""
MAX_NAMES: Final = 256
"""The most names in one part of it, which may be registers."""
MAX_NAME: Final = 64
"""The most characters of the name of a part, or of one in it."""
MAX_BATCH_PAGES: Final = 4096
"""The most pages that one message may carry, so that a receiver can bound what it waits for."""
MAX_RUNS: Final = 1 << 16
"""The most runs in one table; zero runs may be long, but a table stays at 1 MiB."""

MAX_CHANNELS: Final = 64
"""The most connections of one migration."""

MAX_FILES: Final = 253
"""The most descriptors that one message may carry over a Unix socket: SCM_MAX_FD."""

Runs = npt.NDArray[np.int64]
"""Page runs, shape (n, 2): first page and count, ascending and disjoint."""

_PAGE_NUMBER: Final = struct.Struct("<QQ")
_RUN_TABLE: Final = struct.Struct("<II")
_ENCODING: Final = struct.Struct("<II")
"""What follows the runs of encoded pages: size of the payload, and 1 if it holds differences, else 0."""
_WIRE_RUNS: Final = np.dtype("<i8")
_LONGEST_REASON: Final = 200

ShortText = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Session = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Part = Annotated[dict[Name, bytes], msgspec.Meta(max_length=MAX_NAMES)]
ProcessID = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]


class BlockInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block: both sides must have the same, in the same order."""

    name: ShortText
    size: Count
    page_size: Count


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: what is coming. ``verify``: digests are compared at the switchover.

    ``channels``: how many connections there will be, this one included; the others name the ``session``.
    ``shared``: the destination is given the memory itself, by its files' descriptors.
    ``postcopy``: the guest may be handed over before all of its memory; one of the further connections is urgent then.
    """

    TYPE: ClassVar[int] = 1
    machine: ShortText
    blocks: tuple[BlockInfo, ...]
    verify: bool
    channels: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANNELS)]
    session: Session
    shared: bool
    postcopy: bool


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: it fits. This is the name of its process, see `linux.process.ProcessName`."""

    TYPE: ClassVar[int] = 2
    boot_id: ShortText
    pid: ProcessID
    start_time: Count


class PassEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: everything that was dirty when the pass began has been sent."""

    TYPE: ClassVar[int] = 5
    number: Count


class PassDone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: a pass is in memory.

    ``starved_ns``: how long its thread was ready to run but had no CPU in it. ``decode_ns``: how long it took to decode
    the pass's ``decoded`` bytes of memory, and to put them in place.
    """

    TYPE: ClassVar[int] = 6
    number: Count
    starved_ns: Count
    decoded: Count
    decode_ns: Count


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: the digest of each block now that nothing writes it any more, in the order of the blocks."""

    TYPE: ClassVar[int] = 7
    blocks: tuple[Digest, ...]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: the machine's state. ``running``: whether the guest is to run on the destination."""

    TYPE: ClassVar[int] = 8
    running: bool
    parts: Annotated[dict[Name, Part], msgspec.Meta(max_length=MAX_PARTS)]


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: memory and state are loaded; it could run the guest but does not yet.

    ``digests`` are its own, empty unless asked for; computing them took ``verify_ns``.
    """

    TYPE: ClassVar[int] = 9
    digests: tuple[Digest, ...]
    verify_ns: Count


class Handover(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: it has let go of the guest."""

    TYPE: ClassVar[int] = 10


class Taken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: it starts the guest now, not before."""

    TYPE: ClassVar[int] = 11


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either side: the migration ends here. From the destination: it does not run the guest and never will."""

    TYPE: ClassVar[int] = 12
    reason: Annotated[str, msgspec.Meta(max_length=4096)]


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: this connection is one more of the session's channels, for memory only."""

    TYPE: ClassVar[int] = 14
    session: Session


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: this connection takes the place of one that was lost after the guest was handed over."""

    TYPE: ClassVar[int] = 19
    session: Session


class Resumed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: that was all that it lacks."""

    TYPE: ClassVar[int] = 21


class Joined(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: the channel is taken in."""

    TYPE: ClassVar[int] = 15


class Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: one byte follows, with the descriptors of the blocks' files, in the order of the blocks (unix(7))."""

    TYPE: ClassVar[int] = 16
    files: Annotated[int, msgspec.Meta(ge=1, le=MAX_FILES)]


class Request(msgspec.Struct, frozen=True):
    """Destination, on the urgent channel: the guest waits for a page."""

    TYPE: ClassVar[int] = 18
    block: int
    page: int


class Page(msgspec.Struct, frozen=True):
    """Source, on the urgent channel: a page that was requested, whose contents follow the frame."""

    TYPE: ClassVar[int] = 22
    block: int
    page: int


class ZeroPage(msgspec.Struct, frozen=True):
    """Source, on the urgent channel: a page that was requested, and is all zero."""

    TYPE: ClassVar[int] = 23
    block: int
    page: int


class _RunTable:
    """Runs of pages of one block, by its number in `Hello`."""

    TYPE: ClassVar[int]
    __slots__ = ("block", "runs")

    def __init__(self, block: int, runs: Runs) -> None:
        self.block = block
        self.runs = runs

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _RunTable)
            and (self.TYPE, self.block) == (other.TYPE, other.block)
            and np.array_equal(self.runs, other.runs)
        )

    __hash__ = None  # type: ignore[assignment]  # holds an array

    def __repr__(self) -> str:
        return f"{type(self).__name__}(block={self.block}, runs={self.runs.tolist()})"

    @property
    def pages(self) -> int:
        """How many pages the runs have."""
        return int(self.runs[:, 1].sum())

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Their numbers, ascending."""
        first, count = self.runs[:, 0], self.runs[:, 1]
        before = np.cumsum(count) - count
        return np.repeat(first - before, count) + np.arange(self.pages)


class Pages(_RunTable):
    """Source: pages whose contents follow the frame."""

    TYPE: ClassVar[int] = 3
    __slots__ = ()

    @property
    def payload_size(self) -> int:
        """The bytes that follow."""
        return self.pages * PAGE_SIZE


class EncodedPages(_RunTable):
    """Source: pages whose contents follow the frame in ``size`` bytes: one zstd frame.

    ``difference``: it holds the exclusive or of the new contents with those that the destination has.
    """

    TYPE: ClassVar[int] = 13
    __slots__ = ("difference", "size")

    def __init__(self, block: int, runs: Runs, *, size: int, difference: bool) -> None:
        super().__init__(block, runs)
        self.size = size
        self.difference = difference

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, EncodedPages)
            and super().__eq__(other)
            and (self.size, self.difference) == (other.size, other.difference)
        )

    __hash__ = None

    @property
    def payload_size(self) -> int:
        """The bytes that follow."""
        return self.size


class ZeroPages(_RunTable):
    """Source: pages that are all zero."""

    TYPE: ClassVar[int] = 4
    __slots__ = ()


class Owed(_RunTable):
    """Source: pages that come after the handover. What the destination has of them is stale."""

    TYPE: ClassVar[int] = 17
    __slots__ = ()


class Lacking(_RunTable):
    """Destination, on a connection that resumes: pages that it does not have."""

    TYPE: ClassVar[int] = 20
    __slots__ = ()


Packed = (
    Hello
    | Welcome
    | PassEnd
    | PassDone
    | Digests
    | State
    | Ready
    | Handover
    | Taken
    | Failed
    | Join
    | Joined
    | Shared
    | Resume
    | Resumed
)
OnePage = Request | Page | ZeroPage
RunTable = Pages | ZeroPages | EncodedPages | Owed | Lacking
Message = Packed | OnePage | RunTable

_PACKED: Final = {
    kind.TYPE: kind
    for kind in (
        *(Hello, Welcome, PassEnd, PassDone, Digests, State, Ready, Handover, Taken, Failed, Join, Joined, Shared),
        *(Resume, Resumed),
    )
}
_ONE_PAGE: Final[dict[int, type[OnePage]]] = {kind.TYPE: kind for kind in (Request, Page, ZeroPage)}
_RUN_TABLES: Final = {kind.TYPE: kind for kind in (Pages, ZeroPages, EncodedPages, Owed, Lacking)}
MESSAGES: Final[dict[int, type[Message]]] = {**_PACKED, **_ONE_PAGE, **_RUN_TABLES}
_LONGEST: Final[dict[type[Message], int]] = {
    **dict.fromkeys(MESSAGES.values(), MAX_FACTS_BODY),
    **dict.fromkeys(_ONE_PAGE.values(), _PAGE_NUMBER.size),
    **dict.fromkeys((Hello, Digests, Ready, *_RUN_TABLES.values()), MAX_SHORT_BODY),
    State: MAX_BODY,
}

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final = {kind: msgspec.msgpack.Decoder(kind) for kind in _PACKED.values()}


def encode(message: Message) -> bytes:
    """A message's frame.

    Raises:
        ProtocolError: no peer would take it.
    """
    body = encode_body(message)
    return HEAD.pack(message.TYPE, 0, len(body)) + body


def encode_body(message: Message) -> bytes:
    """The frame without its head, see `encode`."""
    if isinstance(message, RunTable):
        body = _RUN_TABLE.pack(message.block, len(message.runs)) + message.runs.astype(_WIRE_RUNS).tobytes()
        if isinstance(message, EncodedPages):
            body += _ENCODING.pack(message.size, message.difference)
    elif isinstance(message, OnePage):
        body = _PAGE_NUMBER.pack(message.block, message.page)
    else:
        body = _encoder.encode(message)
    longest = _LONGEST[type(message)]
    if len(body) > longest:
        raise ProtocolError(f"a {type(message).__name__} message of {len(body)} bytes is longer than {longest}")
    if isinstance(message, State):
        _check_state(message)
    return body


def _check_state(state: State) -> None:
    parts = state.parts.values()
    names = itertools.chain(state.parts, *parts)
    if len(parts) > MAX_PARTS or max(map(len, parts), default=0) > MAX_NAMES or any(len(n) > MAX_NAME for n in names):
        raise ProtocolError(
            f"a machine's state may have {MAX_PARTS} parts of {MAX_NAMES} names, of {MAX_NAME} characters each",
            remedy="join what is in them",
        )


def decode_head(head: bytes) -> tuple[type[Message], int]:
    """A frame's message type and the length of its body.

    Raises:
        ProtocolError: no such frame is allowed.
    """
    number, reserved, length = HEAD.unpack(head)
    kind = MESSAGES.get(number)
    if kind is None or reserved:
        raise ProtocolError(f"the stream is corrupt: no message has the type {number} and flags {reserved}")
    if length > _LONGEST[kind]:
        raise ProtocolError(f"the stream is corrupt: a {kind.__name__} message of {length} bytes")
    return kind, length


def decode_body(kind: type[Message], body: bytes) -> Message:
    """The message in a body.

    Raises:
        ProtocolError: it is none.
    """
    if issubclass(kind, RunTable):
        return _decode_table(kind, body)
    if issubclass(kind, OnePage):
        return _decode_one_page(kind, body)
    try:
        return cast("Packed", _decoders[kind].decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = shortened(error)
    # Not as that one's cause, which may quote all of a stranger's body, for as long as the stranger is told of it.
    raise ProtocolError(f"the stream is corrupt: not a {kind.__name__} message ({reason})")


def shortened(error: Exception) -> str:
    """What is wrong with a body, of which the error may quote all."""
    text = str(error)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _decode_one_page(kind: type[OnePage], body: bytes) -> OnePage:
    if len(body) != _PAGE_NUMBER.size:
        raise ProtocolError(f"the stream is corrupt: the number of a page in {len(body)} bytes")
    return kind(*_PAGE_NUMBER.unpack(body))


def _decode_table(kind: type[RunTable], body: bytes) -> RunTable:
    if issubclass(kind, EncodedPages):
        return _decode_encoded(body)
    message = kind(*_decode_runs(body))
    if isinstance(message, Pages):
        _check_batch(message)
    return message


def _decode_encoded(body: bytes) -> EncodedPages:
    table, encoding = body[: -_ENCODING.size], body[-_ENCODING.size :]
    if len(encoding) < _ENCODING.size:
        raise ProtocolError(f"the stream is corrupt: encoded pages described by {len(body)} bytes")
    size, difference = _ENCODING.unpack(encoding)
    block, runs = _decode_runs(table)
    message = EncodedPages(block, runs, size=size, difference=bool(difference))
    _check_batch(message)
    if difference > 1 or not 0 < size <= message.pages * PAGE_SIZE:
        raise ProtocolError(f"the stream is corrupt: {message.pages} pages encoded as {size} bytes, kind {difference}")
    return message


def _check_batch(message: Pages | EncodedPages) -> None:
    if message.pages > MAX_BATCH_PAGES:
        raise ProtocolError(f"the stream is corrupt: {message.pages} pages in one message")


def _decode_runs(body: bytes) -> tuple[int, Runs]:
    if len(body) < _RUN_TABLE.size:
        raise ProtocolError(f"the stream is corrupt: a table of page runs of {len(body)} bytes")
    block, count = _RUN_TABLE.unpack_from(body)
    if not 0 < count <= MAX_RUNS or len(body) != _RUN_TABLE.size + count * 16:
        raise ProtocolError(f"the stream is corrupt: {count} page runs in {len(body)} bytes")
    runs = np.frombuffer(body, _WIRE_RUNS, offset=_RUN_TABLE.size).astype(np.int64).reshape(-1, 2)
    first, pages = runs[:, 0], runs[:, 1]
    # Both below 2**52, so that no sum or product of them here or later can overflow.
    if runs.min() < 0 or runs.max() >= 1 << 52 or not pages.all() or (first[1:] < (first + pages)[:-1]).any():
        raise ProtocolError("the stream is corrupt: page runs are empty, negative, out of order or overlap")
    return block, runs

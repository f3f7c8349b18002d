"""What the two sides of a migration say to each other, and how each message looks on the wire.

A frame is a head (type, reserved, length of the body; little-endian) and a body: msgpack for messages that carry facts,
a table of page runs for memory. The pages of a `Pages` message follow its frame, raw, in the order of its runs.
`docs/wire-format.md` describes all of it byte by byte.
"""

import struct
from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt

from dirtylog.errors import ProtocolError
from dirtylog.units import PAGE_SIZE

VERSION: Final = 1
MAGIC: Final = b"DIRTYLOG"
PREAMBLE: Final = struct.Struct("<8sI")
"""Each side's first bytes: magic, version. Everything after them belongs to that version."""
HEAD: Final = struct.Struct("<HHI")
"""A frame's head: type, zero, length of the body."""

MAX_BODY: Final = 16 << 20
"""The longest body that is accepted; machine state is the longest there is, and takes some KiB per vCPU."""
MAX_BATCH_PAGES: Final = 4096
"""The most pages that one message may carry, so that a receiver can bound what it waits for."""
MAX_RUNS: Final = 1 << 16
"""The most runs in one table; zero runs may be long, but a table stays at 1 MiB."""

Runs = npt.NDArray[np.int64]
"""Page runs, shape (n, 2): first page and count, ascending and disjoint."""

_RUN_TABLE: Final = struct.Struct("<II")
_WIRE_RUNS: Final = np.dtype("<i8")

ShortText = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
ProcessID = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]


class BlockInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block: both sides must have the same, in the same order."""

    name: ShortText
    size: Count
    page_size: Count


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: what is coming. ``verify``: digests are compared at the switchover."""

    TYPE: ClassVar[int] = 1
    machine: ShortText
    blocks: tuple[BlockInfo, ...]
    verify: bool


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
    """Destination: a pass is in memory. ``starved_ns``: how long its thread was ready to run but had no CPU in it."""

    TYPE: ClassVar[int] = 6
    number: Count
    starved_ns: Count


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: the digest of each block now that nothing writes it any more, in the order of the blocks."""

    TYPE: ClassVar[int] = 7
    blocks: tuple[bytes, ...]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: the machine's state. ``running``: whether the guest is to run on the destination."""

    TYPE: ClassVar[int] = 8
    running: bool
    parts: dict[str, dict[str, bytes]]


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: memory and state are loaded; it could run the guest but does not yet.

    ``digests`` are its own, empty unless asked for; computing them took ``verify_ns``.
    """

    TYPE: ClassVar[int] = 9
    digests: tuple[bytes, ...]
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


class Pages(_RunTable):
    """Source: pages whose contents follow the frame."""

    TYPE: ClassVar[int] = 3
    __slots__ = ()

    @property
    def payload_size(self) -> int:
        """The bytes that follow."""
        return self.pages * PAGE_SIZE


class ZeroPages(_RunTable):
    """Source: pages that are all zero."""

    TYPE: ClassVar[int] = 4
    __slots__ = ()


Packed = Hello | Welcome | PassEnd | PassDone | Digests | State | Ready | Handover | Taken | Failed
Message = Packed | Pages | ZeroPages

_PACKED: Final = {
    kind.TYPE: kind for kind in (Hello, Welcome, PassEnd, PassDone, Digests, State, Ready, Handover, Taken, Failed)
}
MESSAGES: Final[dict[int, type[Message]]] = {**_PACKED, Pages.TYPE: Pages, ZeroPages.TYPE: ZeroPages}

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final = {kind: msgspec.msgpack.Decoder(kind) for kind in _PACKED.values()}


def encode(message: Message) -> bytes:
    """A message's frame."""
    if isinstance(message, Pages | ZeroPages):
        body = _RUN_TABLE.pack(message.block, len(message.runs)) + message.runs.astype(_WIRE_RUNS).tobytes()
    else:
        body = _encoder.encode(message)
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a {type(message).__name__} message of {len(body)} bytes is longer than {MAX_BODY}")
    return HEAD.pack(message.TYPE, 0, len(body)) + body


def decode_head(head: bytes) -> tuple[type[Message], int]:
    """A frame's message type and the length of its body.

    Raises:
        ProtocolError: no such frame is allowed.
    """
    number, reserved, length = HEAD.unpack(head)
    kind = MESSAGES.get(number)
    if kind is None or reserved:
        raise ProtocolError(f"the stream is corrupt: no message has the type {number} and flags {reserved}")
    if length > MAX_BODY:
        raise ProtocolError(f"the stream is corrupt: a {kind.__name__} message of {length} bytes")
    return kind, length


def decode_body(kind: type[Message], body: bytes) -> Message:
    """The message in a body.

    Raises:
        ProtocolError: it is none.
    """
    if issubclass(kind, Pages | ZeroPages):
        return _decode_runs(kind, body)
    try:
        return cast("Packed", _decoders[kind].decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the stream is corrupt: not a {kind.__name__} message ({error})") from error


def _decode_runs(kind: type[Pages] | type[ZeroPages], body: bytes) -> Pages | ZeroPages:
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
    message = kind(block, runs)
    if isinstance(message, Pages) and message.pages > MAX_BATCH_PAGES:
        raise ProtocolError(f"the stream is corrupt: {message.pages} pages in one message")
    return message

"""The conversation of a migration, without I/O: which message may follow which, and bytes to messages.

All transitions are in `TRANSITIONS`. It does not know who we are: both sides walk the same table, each being the
sender of half of the messages. A message that the table does not allow is an error of whoever sent it.

::

    OPENING      Hello      → OFFERED        source says what is coming
    OFFERED      Welcome    → STREAMING      destination agrees
    STREAMING    Pages, EncodedPages, ZeroPages  memory
    STREAMING    PassEnd    → PASS_ENDED     ... of one pass
    PASS_ENDED   PassDone   → STREAMING      destination has it all
    STREAMING    Shared     → SHARED         memory itself
    SHARED       PassDone   → SHARED         destination has it
    STREAMING    Digests    → DIGESTED       if they were agreed on; SHARED likewise
    STREAMING    State      → STATE_SENT     the guest stands still; SHARED likewise
    DIGESTED     State      → STATE_SENT
    STATE_SENT   Ready      → READY          destination could run it
    READY        Handover   → HANDED_OVER    source let go
    HANDED_OVER  Taken      → TAKEN          destination runs it
    STREAMING    Owed       → OWING          some of memory comes later
    OWING        Owed
    OWING        State      → OWING_STATE_SENT  ... Ready → OWING_READY, Handover → OWING_HANDED_OVER
    OWING_HANDED_OVER  Taken → SERVING       destination runs it, and lacks what is owed
    SERVING      Pages, ZeroPages
    SERVING      PassEnd    → SERVED         that was all
    SERVED       PassDone   → FINISHED       destination has it all
    OPENING      Resume     → RESUMING       another connection for one that was lost when SERVING
    RESUMING     Lacking
    RESUMING     Resumed    → SERVING
    OPENING      Join       → JOINING        one more channel, for memory only
    JOINING      Joined     → SIDE
    SIDE         Pages, EncodedPages, ZeroPages
    SIDE         PassEnd    → SIDE_ENDED
    SIDE_ENDED   PassDone   → SIDE
    SIDE         Request                     destination's guest waits for a page
    SIDE         Page, ZeroPage              there it is
    any of them  Failed     → FAILED         nobody goes on
"""

from enum import Enum, auto
from typing import Final

from dirtylog.errors import ProtocolError, UsageError
from dirtylog.migration.messages import (
    HEAD,
    MAGIC,
    PREAMBLE,
    VERSION,
    Digests,
    EncodedPages,
    Failed,
    Handover,
    Hello,
    Join,
    Joined,
    Lacking,
    Message,
    Owed,
    Page,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    Request,
    Resume,
    Resumed,
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


class Role(Enum):
    """The two sides."""

    SOURCE = "source"
    DESTINATION = "destination"


class Stage(Enum):
    """How far the conversation has come."""

    OPENING = auto()
    OFFERED = auto()
    STREAMING = auto()
    PASS_ENDED = auto()
    SHARED = auto()
    DIGESTED = auto()
    STATE_SENT = auto()
    READY = auto()
    HANDED_OVER = auto()
    TAKEN = auto()
    OWING = auto()
    OWING_STATE_SENT = auto()
    OWING_READY = auto()
    OWING_HANDED_OVER = auto()
    SERVING = auto()
    SERVED = auto()
    FINISHED = auto()
    RESUMING = auto()
    JOINING = auto()
    SIDE = auto()
    SIDE_ENDED = auto()
    FAILED = auto()


_TLS_HANDSHAKE: Final = b"\x16\x03"
"""How a client of TLS begins (RFC 8446, section 5.1)."""
_MEMORY: Final = (Pages, EncodedPages, ZeroPages)
_OVER: Final = (Stage.TAKEN, Stage.FINISHED, Stage.FAILED)

TRANSITIONS: Final[dict[tuple[Stage, type[Message]], Stage]] = {
    (Stage.OPENING, Hello): Stage.OFFERED,
    (Stage.OFFERED, Welcome): Stage.STREAMING,
    **{(Stage.STREAMING, kind): Stage.STREAMING for kind in _MEMORY},
    (Stage.STREAMING, PassEnd): Stage.PASS_ENDED,
    (Stage.PASS_ENDED, PassDone): Stage.STREAMING,
    (Stage.STREAMING, Shared): Stage.SHARED,
    (Stage.SHARED, PassDone): Stage.SHARED,
    **{(stage, Digests): Stage.DIGESTED for stage in (Stage.STREAMING, Stage.SHARED)},
    **{(stage, State): Stage.STATE_SENT for stage in (Stage.STREAMING, Stage.SHARED)},
    (Stage.DIGESTED, State): Stage.STATE_SENT,
    (Stage.STATE_SENT, Ready): Stage.READY,
    (Stage.READY, Handover): Stage.HANDED_OVER,
    (Stage.HANDED_OVER, Taken): Stage.TAKEN,
    **{(stage, Owed): Stage.OWING for stage in (Stage.STREAMING, Stage.OWING)},
    (Stage.OWING, State): Stage.OWING_STATE_SENT,
    (Stage.OWING_STATE_SENT, Ready): Stage.OWING_READY,
    (Stage.OWING_READY, Handover): Stage.OWING_HANDED_OVER,
    (Stage.OWING_HANDED_OVER, Taken): Stage.SERVING,
    **{(Stage.SERVING, kind): Stage.SERVING for kind in (Pages, ZeroPages)},
    (Stage.SERVING, PassEnd): Stage.SERVED,
    (Stage.SERVED, PassDone): Stage.FINISHED,
    (Stage.OPENING, Resume): Stage.RESUMING,
    (Stage.RESUMING, Lacking): Stage.RESUMING,
    (Stage.RESUMING, Resumed): Stage.SERVING,
    (Stage.OPENING, Join): Stage.JOINING,
    (Stage.JOINING, Joined): Stage.SIDE,
    **{(Stage.SIDE, kind): Stage.SIDE for kind in _MEMORY},
    (Stage.SIDE, PassEnd): Stage.SIDE_ENDED,
    (Stage.SIDE_ENDED, PassDone): Stage.SIDE,
    (Stage.SIDE, Request): Stage.SIDE,
    **{(Stage.SIDE, kind): Stage.SIDE for kind in (Page, ZeroPage)},
    **{(stage, Failed): Stage.FAILED for stage in Stage if stage not in _OVER},
}

_SOURCE: Final = frozenset({Role.SOURCE})
_DESTINATION: Final = frozenset({Role.DESTINATION})
SENDERS: Final[dict[type[Message], frozenset[Role]]] = {
    **dict.fromkeys((Hello, *_MEMORY, PassEnd, Shared, Digests, State, Handover, Join), _SOURCE),
    **dict.fromkeys((Owed, Page, ZeroPage, Resume), _SOURCE),
    **dict.fromkeys((Welcome, PassDone, Ready, Taken, Joined, Request, Lacking, Resumed), _DESTINATION),
    Failed: frozenset(Role),
}


class Protocol:
    """One side's view of the conversation.

    To send, hand a message to `send` and put the bytes it returns on the wire, followed by the payload of `Pages` and
    `EncodedPages`. To receive, read exactly `wanted` bytes and hand them to `receive`, until it returns a message; the
    payload, which never passes through here, comes before the next frame.

    Attributes:
        role: which side this is.
        stage: how far the conversation has come.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.stage = Stage.OPENING
        self._peer = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        self._preamble_due = True
        self._kind: type[Message] | None = None
        self.wanted = PREAMBLE.size

    @staticmethod
    def preamble() -> bytes:
        """What each side sends first."""
        return PREAMBLE.pack(MAGIC, VERSION)

    def send(self, message: Message) -> bytes:
        """The frame of a message that this side says now.

        Raises:
            UsageError: it may not be said now, or not by this side. Nothing has changed then.
        """
        stage = self._next(message, self.role)
        if stage is None:
            raise UsageError(f"the {self.role.value} cannot send {type(message).__name__} when {self.stage.name}")
        data = encode(message)
        self.stage = stage
        return data

    def receive(self, data: bytes) -> Message | None:
        """Take exactly `wanted` bytes; a message, if one is complete with them.

        Raises:
            ProtocolError: the bytes are not what the protocol allows. The conversation is over.
        """
        if len(data) != self.wanted:
            raise UsageError(f"{len(data)} bytes were handed in, not the {self.wanted} wanted")
        if self._preamble_due:
            self._check_preamble(data)
            self._preamble_due, self.wanted = False, HEAD.size
            return None
        if self._kind is None:
            self._kind, length = decode_head(data)
            if (self.stage, self._kind) not in TRANSITIONS or self._peer not in SENDERS[self._kind]:
                raise ProtocolError(f"the {self._peer.value} sent {self._kind.__name__} when {self.stage.name}")
            self.wanted = length
            return None
        message = decode_body(self._kind, data)
        stage = self._next(message, self._peer)
        if stage is None:
            raise ProtocolError(f"the {self._peer.value} sent {self._kind.__name__} when {self.stage.name}")
        self.stage = stage
        self._kind, self.wanted = None, HEAD.size
        return message

    def _next(self, message: Message, sender: Role) -> Stage | None:
        if sender not in SENDERS[type(message)]:
            return None
        return TRANSITIONS.get((self.stage, type(message)))

    def _check_preamble(self, data: bytes) -> None:
        magic, version = PREAMBLE.unpack(data)
        if data.startswith(_TLS_HANDSHAKE):
            raise ProtocolError(
                f"the {self._peer.value} speaks TLS, and this side does not",
                remedy="use tls:HOST:PORT on both sides, with --tls-creds DIR, or tcp:HOST:PORT on both",
            )
        if magic != MAGIC:
            raise ProtocolError(
                f"the {self._peer.value} does not speak dirtylog's migration protocol",
                remedy="check the address: another program answers there",
            )
        if version != VERSION:
            raise ProtocolError(
                f"the {self._peer.value} speaks version {version} of the migration protocol, this side {VERSION}",
                remedy="use the same version of dirtylog on both sides",
            )

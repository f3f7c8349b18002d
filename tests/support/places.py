"""Places in what the two sides of a migration say, and what may go wrong there."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from dirtylog.migration.messages import HEAD
from dirtylog.migration.protocol import Role
from dirtylog.units import PAGE_SIZE

PREAMBLE_NAME: Final = "Preamble"
_EMPTY: Final = frozenset({"Handover", "Taken", "Joined", "Resumed"})
PAYLOADS: Final = frozenset({"Pages", "EncodedPages", "Page", "Shared"})


class Boundary(Enum):
    """Where in a message, by kind of place. A preamble is magic and version as a frame is head and body."""

    BEFORE = "before"
    WITHIN_HEAD = "within-head"
    WITHIN_LENGTH = "within-length"
    AFTER_HEAD = "after-head"
    WITHIN_BODY = "within-body"
    AFTER_BODY = "after-body"
    FIRST_OF_PAYLOAD = "first-of-payload"
    WITHIN_PAGE = "within-page"
    AFTER_PAGE = "after-page"
    BEFORE_LAST = "before-last"
    AFTER = "after"

    def offset(self, frame: int, payload: int) -> int:
        """Bytes of a message that come before it; the message's frame has ``frame``."""
        return {
            Boundary.BEFORE: 0,
            Boundary.WITHIN_HEAD: 1,
            Boundary.WITHIN_LENGTH: 6,
            Boundary.AFTER_HEAD: HEAD.size,
            Boundary.WITHIN_BODY: (HEAD.size + frame) // 2,
            Boundary.AFTER_BODY: frame,
            Boundary.FIRST_OF_PAYLOAD: frame + 1,
            Boundary.WITHIN_PAGE: frame + min(payload, PAGE_SIZE) // 2,
            Boundary.AFTER_PAGE: frame + PAGE_SIZE,
            Boundary.BEFORE_LAST: frame + payload - 1,
            Boundary.AFTER: frame + payload,
        }[self]


def boundaries(message: str) -> tuple[Boundary, ...]:
    """Those of a kind of message that are different from each other."""
    left_out = set()
    if message in _EMPTY:  # its body is one byte
        left_out |= {Boundary.WITHIN_BODY, Boundary.BEFORE_LAST}
    if message not in PAYLOADS:
        left_out |= {Boundary.AFTER_BODY, Boundary.FIRST_OF_PAYLOAD, Boundary.WITHIN_PAGE}
    if message == "Shared":  # one byte follows
        left_out |= {Boundary.FIRST_OF_PAYLOAD, Boundary.WITHIN_PAGE, Boundary.BEFORE_LAST}
    if message != "Pages":
        left_out.add(Boundary.AFTER_PAGE)
    return tuple(one for one in Boundary if one not in left_out)


PAST_BODY: Final = frozenset({Boundary.WITHIN_PAGE, Boundary.AFTER_PAGE, Boundary.BEFORE_LAST, Boundary.AFTER})
"""Those that depend on how long the payload is."""


class Fault(Enum):
    """What becomes of the connection at a boundary."""

    CLOSE = "close"
    """It is closed in good order, in both directions."""
    RESET = "reset"
    """It is reset; over TCP with RST."""
    STALL = "stall"
    """No byte moves any more, until one side hangs up."""
    SHORT = "short"
    """The rest comes once the receiver has read what is before it: byte by byte, then in odd pieces."""
    TWICE = "twice"
    """A second connection says all that the source has said on this one, and it goes on."""
    KILL = "kill"
    """A process is killed; what it has not said by then is lost."""


@dataclass(frozen=True)
class Place:
    """In the first message of a kind on a connection, or the first one after another kind.

    Attributes:
        link: the connection's number, in the order in which the source made them.
    """

    sender: Role
    message: str
    boundary: Boundary
    link: int = 0
    since: str = ""


@dataclass
class Step:
    """A fault that is to come about.

    Attributes:
        kill: for `Fault.KILL`: ends a process.
        victim: whose it is.
        met: once it has.
    """

    place: Place
    fault: Fault
    kill: Callable[[], None] = lambda: None
    victim: Role = Role.SOURCE
    met: threading.Event = field(default_factory=threading.Event)

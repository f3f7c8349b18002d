"""Whose the guest is, as far as each side can know: pure tables.

The source is told by the destination that it could run the guest, and then lets go of it, for good. From then on it
cannot know, once the connection is lost, whether the destination was told. Two running copies would be worse than none,
so it does not guess.
"""

from enum import Enum, auto
from typing import Final


class Custody(Enum):
    """What one side knows.

    The guest may run here only if it is `MINE`.
    """

    MINE = "it is here"
    OFFERED = "the other side is being told that it is there"
    THEIRS = "it is there"
    DOUBTFUL = "it may be there"
    NEVER = "it never will be here"


class Event(Enum):
    """What may happen to a side."""

    HANDOVER = auto()
    """The source lets go: it says so; the destination hears it."""
    NOT_SAID = auto()
    """The source could not say it, or not whole."""
    TAKEN = auto()
    """The source hears that the destination starts the guest."""
    REFUSED = auto()
    """The source hears that the destination never will."""
    LOST = auto()
    """The connection ended, or the other side broke the protocol."""
    GONE = auto()
    """The destination's process has ended, and all it ever said was read."""
    GIVEN_UP = auto()
    """The destination's operator ends it, or its host or a defect does."""


SOURCE: Final = {
    (Custody.MINE, Event.HANDOVER): Custody.OFFERED,
    (Custody.MINE, Event.LOST): Custody.MINE,
    (Custody.MINE, Event.REFUSED): Custody.MINE,
    (Custody.OFFERED, Event.NOT_SAID): Custody.MINE,
    (Custody.OFFERED, Event.TAKEN): Custody.THEIRS,
    (Custody.OFFERED, Event.REFUSED): Custody.MINE,
    (Custody.OFFERED, Event.LOST): Custody.DOUBTFUL,
    (Custody.DOUBTFUL, Event.TAKEN): Custody.THEIRS,
    (Custody.DOUBTFUL, Event.REFUSED): Custody.MINE,
    (Custody.DOUBTFUL, Event.GONE): Custody.MINE,
    (Custody.THEIRS, Event.LOST): Custody.THEIRS,
}
"""A source begins with a guest that is `Custody.MINE`."""

DESTINATION: Final = {
    (Custody.THEIRS, Event.HANDOVER): Custody.MINE,
    (Custody.THEIRS, Event.LOST): Custody.NEVER,
    (Custody.THEIRS, Event.GIVEN_UP): Custody.NEVER,
    (Custody.MINE, Event.LOST): Custody.MINE,
    (Custody.MINE, Event.GIVEN_UP): Custody.MINE,
    (Custody.NEVER, Event.HANDOVER): Custody.NEVER,
    (Custody.NEVER, Event.LOST): Custody.NEVER,
    (Custody.NEVER, Event.GIVEN_UP): Custody.NEVER,
}
"""A destination begins with a guest that is `Custody.THEIRS`."""

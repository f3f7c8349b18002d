"""Moments of a migration at which a test steps in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from dirtylog.linux.mapping import Contents
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Message, encode
from dirtylog.migration.protocol import Role


class Moment(Enum):
    """When, seen from the side that a checkpoint is on."""

    BEFORE_SENDING = "before-sending"
    WITHIN = "within"
    """The head of the frame has been sent, and nothing else."""
    AFTER_SENDING = "after-sending"
    AFTER_RECEIVING = "after-receiving"


@dataclass(frozen=True)
class Checkpoint:
    """The first time that a side sends or receives a message."""

    side: Role
    moment: Moment
    message: str

    def __str__(self) -> str:
        return f"{self.side.value}:{self.moment.value}:{self.message}"

    @classmethod
    def parse(cls, text: str) -> "Checkpoint":
        side, moment, message = text.split(":")
        return cls(Role(side), Moment(moment), message)


def _points(side: Role, sent: str, received: str) -> tuple[Checkpoint, ...]:
    sending = (Moment.BEFORE_SENDING, Moment.WITHIN, Moment.AFTER_SENDING)
    return tuple(Checkpoint(side, moment, name) for name in sent.split() for moment in sending) + tuple(
        Checkpoint(side, Moment.AFTER_RECEIVING, name) for name in received.split()
    )


SOURCE = _points(Role.SOURCE, "Hello ZeroPages Pages PassEnd Digests State Handover", "Welcome PassDone Ready Taken")
DESTINATION = _points(
    Role.DESTINATION, "Welcome PassDone Ready Taken", "Hello ZeroPages Pages PassEnd Digests State Handover"
)
"""Every moment of a migration with ``verify``, of a machine that has pages of both kinds."""

SHARED_SOURCE = _points(Role.SOURCE, "Hello Shared Digests State Handover", "Welcome PassDone Ready Taken")
SHARED_DESTINATION = _points(Role.DESTINATION, "Welcome PassDone Ready Taken", "Hello Shared Digests State Handover")
"""The same where memory is shared. Files follow ``Shared``, so they are there only at what comes later."""

POSTCOPY_SOURCE = _points(Role.SOURCE, "Owed State Handover Pages", "Ready Taken Request")
POSTCOPY_DESTINATION = _points(Role.DESTINATION, "Ready Taken Request", "Owed State Handover Page Pages")
"""What is more, or otherwise, where the guest is handed over before its memory."""

SIDE = _points(Role.SOURCE, "Join", "Joined") + _points(Role.DESTINATION, "Joined", "Join")
"""What is more with several channels."""


def install(checkpoint: Checkpoint, act: Callable[[], None], patch: Callable[[type, str, object], None]) -> None:
    """Have ``act`` called when the side of a checkpoint, in this process, gets there.

    ``patch`` is ``setattr``, or a `pytest.MonkeyPatch`'s.
    """
    send, receive = Channel.send, Channel.receive
    met: list[Checkpoint] = []

    def here(channel: Channel, moment: Moment, message: Message) -> bool:
        side = Role.DESTINATION if channel.peer == "source" else Role.SOURCE
        if met or checkpoint != Checkpoint(side, moment, type(message).__name__):
            return False
        met.append(checkpoint)
        return True

    def patched_send(channel: Channel, message: Message, payload: Iterable[Contents] = ()) -> int:
        if here(channel, Moment.BEFORE_SENDING, message):
            act()
        if here(channel, Moment.WITHIN, message):
            channel._socket.sendall(encode(message)[:7])
            act()
        size = send(channel, message, payload)
        if here(channel, Moment.AFTER_SENDING, message):
            act()
        return size

    def patched_receive(channel: Channel) -> Message:
        message = receive(channel)
        if here(channel, Moment.AFTER_RECEIVING, message):
            act()
        return message

    patch(Channel, "send", patched_send)
    patch(Channel, "receive", patched_receive)

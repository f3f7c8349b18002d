"""Both ends of one connection of a migration, for who needs no more of it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from support.waiting import BOUND

from dirtylog.migration.channel import Channel
from dirtylog.migration.protocol import Role, Stage


class Ends(NamedTuple):
    """A connection's."""

    source: Channel
    destination: Channel


@contextmanager
def connected(stage: Stage) -> Iterator[Ends]:
    """A connection whose conversation has come to a stage. Both ends are closed at last, whoever owns them by then."""
    near, far = socket.socketpair()
    with Channel(near, Role.SOURCE) as source, Channel(far, Role.DESTINATION) as destination:
        for channel in (source, destination):
            channel._protocol.receive(channel._exactly(channel._protocol.wanted))  # the preamble
            channel._protocol.stage = stage
            channel.set_timeout(BOUND)
        yield Ends(source, destination)

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, HostError, ProtocolError
from dirtylog.migration.channel import Channel
from dirtylog.migration.custody import Custody, Event
from dirtylog.migration.protocol import Role, Stage
from dirtylog.migration.taking_over import TakingOver


@pytest.fixture
def handed_over() -> TakingOver:
    taking_over = TakingOver()
    taking_over.take()
    return taking_over


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.mark.parametrize("error", [DisconnectedError("gone"), ProtocolError("what?"), HostError("full"), KeyError("x")])
def test_failure_before_the_handover_is_for_good(error: Exception) -> None:  # M6
    taking_over = TakingOver()
    taking_over.fail(error)
    assert taking_over.custody is Custody.NEVER
    with pytest.raises(CancelledError):
        taking_over.take()
    assert taking_over.custody is Custody.NEVER


@pytest.mark.parametrize("error", [DisconnectedError("gone"), HostError("full")])
def test_failure_after_the_handover_leaves_the_guest_here(handed_over: TakingOver, error: DirtylogError) -> None:
    handed_over.fail(error)
    handed_over.note(Event.GIVEN_UP)
    assert handed_over.custody is Custody.MINE


@pytest.mark.parametrize("source_is_gone", [False, True])
def test_guest_is_here_whether_the_source_can_be_told_or_not(
    handed_over: TakingOver, sockets: tuple[socket.socket, socket.socket], source_is_gone: bool
) -> None:  # M1
    near, far = sockets
    with closing(Channel(near, Role.DESTINATION)) as channel:
        channel._protocol.stage = Stage.HANDED_OVER
        if source_is_gone:
            far.close()
        handed_over.confirm(channel)
        assert channel.stage is Stage.TAKEN
    assert handed_over.custody is Custody.MINE

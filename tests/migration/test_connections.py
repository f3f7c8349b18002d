from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.streams import accepted
from support.waiting import Task

from dirtylog.errors import CancelledError, DisconnectedError, RefusedError
from dirtylog.migration import Listener, parse_address
from dirtylog.migration.channel import Channel
from dirtylog.migration.connections import Connections
from dirtylog.migration.file import FileOutlet
from dirtylog.migration.messages import Failed, Hello, Join, Joined, Welcome
from dirtylog.migration.outlet import Outlet

_SESSION = bytes(range(16))
_HELLO = Hello("fake", (), False, 1, _SESSION, False, True)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with closing(Listener(parse_address(f"unix:{tmp_path}/there"))) as listener:
        yield listener


@pytest.fixture
def connections() -> Iterator[Connections]:
    with closing(Connections()) as connections:
        yield connections


def _answered(listener: Listener, answer: Joined | Failed) -> tuple[Task, list[Join]]:
    """A destination that answers one connection."""
    heard: list[Join] = []

    def serve() -> None:
        with listener.open(accepted(listener)) as channel:
            heard.append(channel.expect(Join))
            channel.send(answer)

    return Task(serve), heard


def test_channel_is_open_to_who_listens_there(connections: Connections, listener: Listener) -> None:
    channel = connections.open(listener.address)
    channel.send(_HELLO)
    with listener.open(accepted(listener)) as other:
        assert other.expect(Hello) == _HELLO


def test_file_is_a_channel(connections: Connections, tmp_path: Path) -> None:
    assert isinstance(connections.open(parse_address(f"file:{tmp_path}/saved")), FileOutlet)


def test_nobody_listens_there(connections: Connections, tmp_path: Path) -> None:
    with pytest.raises(DisconnectedError, match="cannot connect to the destination"):
        connections.open(parse_address(f"unix:{tmp_path}/nobody"))


def test_further_channel_names_the_session(connections: Connections, listener: Listener) -> None:
    task, heard = _answered(listener, Joined())
    connections.join(listener.address, _SESSION)
    task.join()
    assert heard == [Join(_SESSION)]


def test_further_channel_that_is_refused_says_why(connections: Connections, listener: Listener) -> None:
    task, _ = _answered(listener, Failed("no room"))
    with pytest.raises(RefusedError, match="no room"):
        connections.join(listener.address, _SESSION)
    task.join()


def test_abort_cancels_those_that_are_open_and_those_to_come(connections: Connections, listener: Listener) -> None:
    channel = connections.open(listener.address)
    channel.send(_HELLO)
    waiting = Task(lambda: channel.expect(Welcome))
    connections.abort()
    assert isinstance(waiting.error(), CancelledError)
    later = connections.open(listener.address)
    with pytest.raises(CancelledError):
        later.send(_HELLO)


def test_cut_ends_those_that_are_open_only(connections: Connections, listener: Listener) -> None:
    channels: list[Outlet] = [connections.open(listener.address) for _ in range(2)]
    for channel in channels:
        channel.send(_HELLO)
    waiting = [Task(lambda channel=channel: channel.expect(Welcome)) for channel in channels]  # type: ignore[misc]
    connections.cut()
    for task in waiting:
        assert type(task.error()) is DisconnectedError  # and not cancelled: it can be gone on with
    connections.open(listener.address).send(_HELLO)


def test_close_closes_each_once_and_keeps_none(connections: Connections, listener: Listener) -> None:
    channel = connections.open(listener.address)
    assert isinstance(channel, Channel)
    connections.close()
    assert channel.fileno() == -1
    connections.close()
    connections.abort()
    connections.cut()

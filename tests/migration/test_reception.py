"""Who connects to a destination, and what strangers can do there: nothing (M8)."""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from support.crowd import connected, crowd
from support.descriptors import few_descriptors
from support.guests import same_memory
from support.kvm import open_descriptors
from support.streams import PREAMBLE_PIECE, fake_machine, parse, piece, reason, refusals, stream, talk
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import CancelledError, DisconnectedError, RefusedError, UsageError
from dirtylog.machine import RunState
from dirtylog.migration import (
    Channel,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    connect,
    parse_address,
)
from dirtylog.migration import reception as reception_module
from dirtylog.migration.address import Address, TCPAddress, UnixAddress
from dirtylog.migration.channel import BUFFER_SIZE
from dirtylog.migration.messages import (
    MAX_BODY,
    MAX_SHORT_BODY,
    Failed,
    Hello,
    Join,
    Message,
    PassEnd,
    Taken,
    Welcome,
    encode,
)
from dirtylog.migration.reception import MAX_VISITORS, Reception

_HELLO = Hello("right", (), False, 1, bytes(16), False, False)
_WELCOME = Welcome("boot", 1, 1)
_GREETING = stream([PREAMBLE_PIECE, piece(_HELLO)])


def _judge(_: Channel, message: Message) -> None:
    if isinstance(message, Failed):
        raise RefusedError(f"it gave up: {message.reason}")
    if isinstance(message, Hello) and message.machine != "right":
        raise UsageError(f"it is {message.machine}", remedy="be right")


class _Place:
    """A reception, and who comes there."""

    def __init__(self, stack: ExitStack, address: Address) -> None:
        self.refused = stack.enter_context(refusals())
        listener = Listener(address)
        self.address = listener.address
        self.reception = stack.enter_context(Reception(listener, lambda *said: self.judge(*said)))
        self.judge: Callable[[Channel, Message], None] = _judge
        self._stack = stack

    def raw(self) -> socket.socket:
        """A connection that says nothing by itself."""
        return self._stack.enter_context(connected(self.address))

    def source(self, message: Message = _HELLO) -> Channel:
        """Somebody who greets."""
        channel = self._stack.enter_context(connect(self.address))
        channel.send(message)
        return channel

    def takes(self) -> Channel:
        """The next one that is let in by its Hello."""
        channel, hello = self.reception.take(Hello, BOUND)
        assert hello == _HELLO
        return self._stack.enter_context(channel)

    def takes_a_source(self) -> None:
        """A source that comes now is let in, and spoken with."""
        source = self.source()
        self.takes().send(_WELCOME)
        assert source.expect(Welcome) == _WELCOME

    def waits_for_refusals(self, count: int) -> None:
        wait_until(lambda: len(self.refused) >= count, f"{count} were turned away")


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("reception", "visitor")]


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return UnixAddress(f"{tmp_path}/x")


@pytest.fixture
def place(address: Address) -> Iterator[_Place]:
    """Leaves neither threads nor descriptors."""
    before = len(open_descriptors())
    with ExitStack() as stack:
        yield _Place(stack, address)
    assert _threads() == []
    assert len(open_descriptors()) == before


_OVER_TCP = pytest.mark.parametrize("address", [TCPAddress("127.0.0.1", 0)], ids=["tcp"])
_EVERYWHERE = pytest.mark.parametrize("over_tcp", [False, True], ids=["unix", "tcp"])


def test_who_greets_is_let_in_and_given_large_buffers(place: _Place) -> None:
    place.source()
    sock = place.raw()
    idle = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    channel = place.takes()
    wait_until(lambda: len(place.reception._visitors) == 1, "the other one is all that is left to be dismissed")
    assert channel._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= min(BUFFER_SIZE, idle + 1)
    place.takes_a_source()
    assert place.refused == []


def test_who_does_not_fit_is_told_why_and_logged(place: _Place) -> None:
    stranger = place.source(Hello("wrong", (), False, 1, bytes(16), False, False))
    with pytest.raises(RefusedError, match="the destination gave up: it is wrong; be right"):
        stranger.expect(Welcome)
    (line,) = place.refused
    assert line.startswith("refused a connection from process ")
    assert line.endswith(": it is wrong; be right")
    place.takes_a_source()


@_OVER_TCP
def test_address_of_who_is_turned_away_over_tcp_is_logged(place: _Place) -> None:
    stranger = place.raw()
    host, port = stranger.getsockname()
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    place.waits_for_refusals(1)
    assert place.refused[0].startswith(f"refused a connection from {host}:{port}: the source does not speak")


_HEAD = len(_GREETING) - len(encode(_HELLO))
_PREAMBLE = PREAMBLE_PIECE.data

_SPEAKING = {
    "another program": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak dirtylog's migration protocol"),
    "zeros": (bytes(1000), "does not speak dirtylog's migration protocol"),
    "another version": (b"DIRTYLOG" + struct.pack("<I", 77), "speaks version 77"),
    "unknown message": (_PREAMBLE + struct.pack("<HHI", 99, 0, 4), "no message has the type 99"),
    "huge length": (_PREAMBLE + struct.pack("<HHI", 1, 0, 0xFFFFFFFF), "a Hello message of 4294967295 bytes"),
    "a state's length": (_PREAMBLE + struct.pack("<HHI", 1, 0, MAX_BODY), "a Hello message of 16777216 bytes"),
    "garbage of a length": (
        _PREAMBLE + struct.pack("<HHI", 1, 0, MAX_SHORT_BODY) + b"\xc1" * MAX_SHORT_BODY,
        "not a Hello message",
    ),
    "no greeting": (_PREAMBLE + encode(PassEnd(1)), "the source sent PassEnd when OPENING"),
    "a destination's": (_PREAMBLE + encode(Taken()), "the source sent Taken when OPENING"),
    "farewell": (_PREAMBLE + encode(Failed("changed my mind")), "it gave up: changed my mind"),
}


@pytest.mark.parametrize("name", _SPEAKING)
def test_who_says_something_else_is_told_why_and_logged_and_the_next_is_let_in(place: _Place, name: str) -> None:  # M10
    said, why = _SPEAKING[name]
    answer = tuple(parse(talk(place.raw(), said, end=False)))
    assert name == "farewell" or why in str(reason(answer))
    (line,) = place.refused
    assert why in line
    place.takes_a_source()


_UNFINISHED = {
    "nothing": b"",
    "half a preamble": _PREAMBLE[:5],
    "a preamble": _PREAMBLE,
    "half a head": _GREETING[: _HEAD + 3],
    "half a Hello": _GREETING[: len(_GREETING) // 2 + 8],
    "all but a byte": _GREETING[:-1],
}


@pytest.mark.parametrize("name", _UNFINISHED)
def test_who_ends_before_it_has_greeted_is_logged_and_the_next_is_let_in(place: _Place, name: str) -> None:  # M10
    stranger = place.raw()
    stranger.sendall(_UNFINISHED[name])
    stranger.shutdown(socket.SHUT_WR)
    place.waits_for_refusals(1)
    assert "the connection to the source ended before the migration did" in place.refused[0]
    place.takes_a_source()


@pytest.mark.parametrize("name", _UNFINISHED)
def test_who_does_not_greet_in_time_is_told_and_logged_and_others_are_let_in_meanwhile(  # M10
    monkeypatch: pytest.MonkeyPatch, place: _Place, name: str
) -> None:
    stranger = place.raw()
    stranger.sendall(_UNFINISHED[name])
    place.takes_a_source()
    assert place.refused == []
    monkeypatch.setattr(reception_module, "HANDSHAKE_TIMEOUT", 0.1)
    place.raw()  # whose deadline is a new one
    place.waits_for_refusals(2)
    assert "it did not say within 0 s what it wants" in place.refused[0]
    assert "it did not say within 0 s what it wants" in str(reason(tuple(parse(talk(stranger, b"", end=False)))))


@_EVERYWHERE
def test_bytes_that_trickle_in_gain_no_time(  # M10
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, over_tcp: bool
) -> None:
    with ExitStack() as stack:
        place = _Place(stack, TCPAddress("127.0.0.1", 0) if over_tcp else UnixAddress(f"{tmp_path}/x"))
        sent = 0
        with monkeypatch.context() as patch, suppress(OSError):
            patch.setattr(reception_module, "HANDSHAKE_TIMEOUT", 0.2)
            stranger = place.raw()
            stranger.sendall(_PREAMBLE + struct.pack("<HHI", 1, 0, MAX_SHORT_BODY))
            while not place.refused:
                sent += stranger.send(b"\x86")
                threading.Event().wait(0.001)
        place.waits_for_refusals(1)
        assert 0 < sent < MAX_SHORT_BODY
        assert "it did not say within 0 s what it wants" in place.refused[0]
        place.takes_a_source()


def test_who_came_first_gives_way_when_too_many_wait(monkeypatch: pytest.MonkeyPatch, place: _Place) -> None:  # M10
    monkeypatch.setattr(reception_module, "MAX_VISITORS", 3)
    monkeypatch.setattr(reception_module, "GRACE", 0.001)
    waiting = [place.raw() for _ in range(3)]
    wait_until(lambda: _threads().count("visitor") == 3, "all are there")
    waiting.append(place.raw())
    place.waits_for_refusals(1)
    (answer,) = [one for one in parse(talk(waiting[0], b"", end=False)) if one.name == "Failed"]
    assert "it did not say what it wants, and 3 others wait" in str(reason((answer, answer)))
    for late in waiting[1:]:
        late.sendall(_GREETING)
        place.takes().send(_WELCOME)
    assert len(place.refused) == 1


def test_nobody_gives_way_at_once(monkeypatch: pytest.MonkeyPatch, place: _Place) -> None:  # M10
    monkeypatch.setattr(reception_module, "MAX_VISITORS", 1)
    monkeypatch.setattr(reception_module, "GRACE", BOUND)
    first = place.raw()
    second = place.source()
    first.sendall(_GREETING)
    for _ in range(2):
        place.takes().send(_WELCOME)
    assert second.expect(Welcome) == _WELCOME
    assert place.refused == []


def test_defect_in_the_judge_turns_one_away_and_the_next_is_let_in(place: _Place) -> None:
    def fail(_: Channel, __: Message) -> None:
        raise ZeroDivisionError("oh")

    place.judge = fail
    with pytest.raises(RefusedError, match="a defect in dirtylog: ZeroDivisionError"):
        place.source().expect(Welcome)
    place.judge = _judge
    place.takes_a_source()
    assert "a defect in dirtylog: ZeroDivisionError('oh')" in place.refused[0]


def test_thread_that_the_host_does_not_give_turns_one_away(monkeypatch: pytest.MonkeyPatch, place: _Place) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "visitor":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        place.raw()
        place.waits_for_refusals(1)
    assert place.refused[0].endswith(": can't start new thread")
    place.takes_a_source()


def test_descriptors_that_are_used_up_are_waited_for(place: _Place) -> None:  # M10
    source = place.source()
    channel = place.takes()
    source.close()
    channel.close()
    with ExitStack() as stack:
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        stack.enter_context(few_descriptors(0))
        assert isinstance(place.address, UnixAddress)
        waiting.connect(place.address.path)
        place.waits_for_refusals(1)
    assert place.refused[0].startswith("cannot let anybody in: cannot accept a connection: Too many open files")
    place.takes_a_source()


def test_who_is_let_in_is_taken_by_its_first_message(place: _Place) -> None:
    place.source(Join(bytes(16)))
    wait_until(lambda: place.reception._admitted, "one is let in")
    place.takes_a_source()
    side, join = place.reception.take(Join, BOUND)
    side.close()
    assert join == Join(bytes(16))


def test_nobody_in_time_is_an_error(place: _Place) -> None:
    with pytest.raises(DisconnectedError, match="no Hello came within 0 s"):
        place.reception.take(Hello, 0.01)


def test_abort_ends_the_waiting_while_strangers_hang(place: _Place) -> None:
    hanging = [place.raw() for _ in range(5)]
    wait_until(lambda: _threads().count("visitor") == 5, "all are there")
    task = Task(lambda: place.reception.take(Hello))
    place.reception.abort()
    assert isinstance(task.error(), CancelledError)
    for stranger in hanging:
        assert [one.name for one in parse(talk(stranger, b"", end=False))] == ["preamble"]
    place.reception.abort()
    place.reception.close()
    place.reception.close()
    place.reception.abort()
    assert _threads() == []
    assert place.refused == []


def test_listener_that_is_told_to_give_up_ends_the_waiting(place: _Place) -> None:
    task = Task(lambda: place.reception.take(Hello))
    place.reception._listener.abort()
    assert isinstance(task.error(), CancelledError)


def test_abort_before_anybody_waits_is_not_forgotten(place: _Place) -> None:
    place.reception.abort()
    with pytest.raises(CancelledError):
        place.reception.take(Hello)


def test_who_waits_at_the_end_is_told(place: _Place) -> None:
    stranger, source = place.raw(), place.source()
    wait_until(lambda: place.reception._admitted, "one is let in")
    wait_until(lambda: _threads().count("visitor") == 1, "the other waits")
    place.reception.close()
    assert "waits for nobody else" in str(reason(tuple(parse(talk(stranger, b"", end=False)))))
    with pytest.raises(DisconnectedError):  # let in, and taken by nobody
        source.expect(Welcome)


def test_source_that_is_waited_with_ends_the_waiting_when_it_goes(place: _Place) -> None:
    source = place.source()
    main = place.takes()
    task = Task(lambda: place.reception.take(Join, unless=main))
    source.close()
    assert isinstance(task.error(), DisconnectedError)


@_EVERYWHERE
def test_source_among_a_thousand_strangers_migrates(tmp_path: Path, over_tcp: bool) -> None:  # M10
    uri = "tcp:127.0.0.1:0" if over_tcp else f"unix:{tmp_path}/x"
    before = len(open_descriptors())
    with (
        fake_machine() as source,
        fake_machine(boot=False) as guest,
        closing(Listener(parse_address(uri))) as listener,
        crowd(listener.address, 1000),
        refusals() as refused,
    ):
        source.resume()
        task = Task(IncomingMigration(guest, listener).run)
        wait_until(lambda: _threads().count("visitor") == MAX_VISITORS, "the crowd is there")
        OutgoingMigration(source, listener.address, Parameters(verify=True, channels=3)).run()
        task.join()
        assert guest.state is RunState.RUNNING
        guest.pause()
        assert same_memory(guest, source)
        assert refused
    assert _threads() == []
    assert len(open_descriptors()) == before


def test_threads_and_descriptors_stay_few_while_a_thousand_come_and_go(  # M10
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception_module, "GRACE", 0.05)
    before, most = len(open_descriptors()), [0, 0]
    with ExitStack() as stack:
        place = _Place(stack, address)
        strangers = stack.enter_context(crowd(place.address, 1000))

        def all_have_come() -> bool:
            most[:] = max(most[0], _threads().count("visitor")), max(most[1], len(os.listdir("/proc/self/fd")))
            return "all have come" in strangers.out

        wait_until(all_have_come, "all have come")
        place.takes_a_source()
    assert MAX_VISITORS <= most[0] <= 2 * MAX_VISITORS  # some are just ending
    assert most[1] < before + 2 * MAX_VISITORS + 20
    assert _threads() == []
    assert len(open_descriptors()) == before


def test_abort_ends_a_destination_among_strangers(tmp_path: Path) -> None:
    before = len(open_descriptors())
    with ExitStack() as stack, fake_machine(boot=False) as guest:
        listener = stack.enter_context(closing(Listener(UnixAddress(f"{tmp_path}/x"))))
        incoming = IncomingMigration(guest, listener)
        task = Task(incoming.run)
        hanging = stack.enter_context(crowd(listener.address, 1000))
        wait_until(lambda: _threads().count("visitor") == MAX_VISITORS, "the crowd is there")
        assert hanging.running
        incoming.abort()
        assert isinstance(task.error(), CancelledError)
        assert guest.state is RunState.INMIGRATE
    assert _threads() == []
    assert len(open_descriptors()) == before

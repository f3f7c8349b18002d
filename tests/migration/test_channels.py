"""A destination whose source has more than one channel, and what can go wrong on the further ones."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import pytest
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.streams import PREAMBLE_PIECE, fake_machine, parse, piece, reason, stream, talk
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, ProtocolError, RefusedError
from dirtylog.machine import RunState
from dirtylog.machine.machine import MachineState
from dirtylog.memory import RAMBlock
from dirtylog.migration import Channel, IncomingMigration, Listener, connect, parse_address
from dirtylog.migration import channel as channel_module
from dirtylog.migration import incoming as incoming_module
from dirtylog.migration.encoding import Compressor
from dirtylog.migration.messages import (
    BlockInfo,
    Digests,
    EncodedPages,
    Failed,
    Handover,
    Hello,
    Join,
    Joined,
    Message,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    State,
    Taken,
    Welcome,
)
from dirtylog.units import PAGE_SIZE

_SESSION = bytes(range(16))
_BLOCKS = (BlockInfo("ram", RAM_PAGES * PAGE_SIZE, PAGE_SIZE), BlockInfo("rom", ROM_PAGES * PAGE_SIZE, PAGE_SIZE))
_STATE: MachineState = {"cpu0": {"place": struct.pack("<IQ", 16 * PAGE_SIZE, 0)}}


class _Source:
    """A source that says what a test wants, to a destination of its own."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.guest = stack.enter_context(fake_machine(boot=False))
        self.path = directory / "x"
        self.address = parse_address(f"unix:{self.path}")
        self._stack = stack
        self._listener = stack.enter_context(closing(Listener(self.address)))
        self.incoming = IncomingMigration(self.guest, self._listener)
        self.task = Task(self.incoming.run)
        stack.callback(self._end)

    def _end(self) -> None:
        self.incoming.abort()
        self.task.error()
        ours = ("side-channel", "reception", "visitor")
        assert [thread.name for thread in threading.enumerate() if thread.name in ours] == []

    def channel(self) -> Channel:
        return self._stack.enter_context(connect(self.address))

    def raw(self) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(str(self.path))
        return sock

    def begin(self, channels: int, *, verify: bool = False) -> Channel:
        """The first channel."""
        main = self.channel()
        main.send(Hello("fake", _BLOCKS, verify, channels, _SESSION, False, False))
        main.expect(Welcome)
        return main

    def join(self, session: bytes = _SESSION) -> Channel:
        side = self.channel()
        side.send(Join(session))
        side.expect(Joined)
        return side

    def arrive(self, main: Channel) -> None:
        """The rest of a migration that goes well."""
        main.send(State(False, _STATE))
        main.expect(Ready)
        main.send(Handover())
        main.expect(Taken)
        self.task.join()
        assert self.guest.state is RunState.PAUSED

    def fails(self) -> DirtylogError:
        error = self.task.error()
        assert isinstance(error, DirtylogError)
        assert self.guest.state is RunState.INMIGRATE  # M6
        return error


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Source]:
    monkeypatch.setattr(channel_module, "_DRAIN_SECONDS", 0.2)
    with ExitStack() as stack:
        yield _Source(stack, tmp_path)


def _pages(first: int, value: int, count: int = 1) -> tuple[Pages, list[memoryview]]:
    contents = np.full(count * PAGE_SIZE, value, np.uint8)
    return Pages(0, np.array([[first, count]], np.int64)), [contents.data]


def _end_pass(number: int, channels: Sequence[Channel]) -> None:
    for channel in channels:
        channel.send(PassEnd(number))
    for channel in channels:
        assert channel.expect(PassDone).number == number


@pytest.mark.parametrize("channels", [2, 5])
def test_guest_arrives_on_several_channels(source: _Source, channels: int) -> None:
    main = source.begin(channels)
    every = [main, *(source.join() for _ in range(1, channels))]
    for number in (1, 2):
        for page in range(20):
            every[(page + number) % channels].send(*_pages(page, page + number))
        _end_pass(number, every)
    source.arrive(main)
    assert source.guest.memory.blocks["ram"].array[: 20 * PAGE_SIZE : PAGE_SIZE].tolist() == [*range(2, 22)]


def test_nobody_is_taken_in_once_all_channels_are_there(source: _Source) -> None:
    main = source.begin(3)
    source.join()
    assert source.path.exists()
    source.join()
    wait_until(lambda: not source.path.exists(), "nobody is waited for any more")
    with pytest.raises(DisconnectedError, match="cannot connect to the destination"):
        source.channel()
    source.arrive(main)


def _silent(source: _Source) -> None:
    source.raw()


def _gone(source: _Source) -> None:
    source.raw().close()


def _web(source: _Source) -> None:
    source.raw().sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def _another_session(source: _Source) -> None:
    source.channel().send(Join(bytes(16)))


def _another_source(source: _Source) -> None:
    source.channel().send(Hello("fake", _BLOCKS, False, 1, _SESSION, False, False))


def _half_a_message(source: _Source) -> None:
    source.raw().sendall(stream([PREAMBLE_PIECE, piece(Join(_SESSION))])[:-1])


@pytest.mark.parametrize(
    "stranger", [_silent, _gone, _web, _another_session, _another_source, _half_a_message], ids=lambda who: who.__name__
)
def test_stranger_is_turned_away_and_the_source_still_taken_in(
    source: _Source, stranger: Callable[[_Source], None]
) -> None:
    main = source.begin(3)
    stranger(source)
    sides = [source.join()]
    stranger(source)
    sides.append(source.join())
    _end_pass(1, [main, *sides])
    source.arrive(main)


@pytest.mark.parametrize("joined", [0, 1])
def test_channels_that_do_not_come_are_not_waited_for_long(
    source: _Source, monkeypatch: pytest.MonkeyPatch, joined: int
) -> None:
    monkeypatch.setattr(incoming_module, "HANDSHAKE_TIMEOUT", 0.1)
    main = source.begin(3)
    for _ in range(joined):
        source.join()
    error = source.fails()
    assert isinstance(error, ProtocolError)
    assert "the source's further channels did not come" in error.cause
    with pytest.raises(RefusedError, match="further channels did not come"):
        main.expect(Ready)


def test_source_that_goes_away_before_its_channels_came_is_noticed_at_once(source: _Source) -> None:  # M6
    source.begin(3).close()
    assert isinstance(source.fails(), DisconnectedError)


@pytest.mark.parametrize(
    ("message", "kind", "cause"),
    [
        (PassEnd(1), ProtocolError, "the source sent PassEnd before its time"),
        (Failed("enough"), RefusedError, "the source gave up: enough"),
    ],
)
def test_source_that_speaks_before_its_channels_came_is_heard(
    source: _Source, message: Message, kind: type[DirtylogError], cause: str
) -> None:
    source.begin(3).send(message)
    error = source.fails()
    assert (type(error), error.cause) == (kind, cause)


def test_source_with_more_channels_than_any_destination_takes_is_turned_away(source: _Source) -> None:  # M5, M10
    frame = piece(Hello("fake", _BLOCKS, False, 64, _SESSION, False, False))
    said = stream([PREAMBLE_PIECE]) + frame.data.replace(b"channels\x40", b"channels\x41")
    assert "not a Hello message" in str(reason(tuple(parse(talk(source.raw(), said)))))
    source.arrive(source.begin(1))


def test_channel_more_than_was_announced_is_turned_away(source: _Source) -> None:  # M5
    main = source.begin(3)
    late = source.channel()
    sides = [source.join(), source.join()]
    with pytest.raises(RefusedError, match=r"all channels .* are here already|has its source, and waits for nobody"):
        _join(late)
    _end_pass(1, [main, *sides])
    source.arrive(main)


def _join(channel: Channel) -> None:
    with suppress(DisconnectedError):
        channel.send(Join(_SESSION))
    channel.expect(Joined)


def _frame(message: Message, payload: bytes = b"") -> bytes:
    return piece(message).data + payload


_TABLE = np.array([[3, 2]], np.int64)
_ZSTD = Compressor(1).compress(np.ones((2, PAGE_SIZE // 8), np.uint64))
_SIDE = (
    Pages(0, _TABLE),
    bytes(2 * PAGE_SIZE),
    EncodedPages(0, _TABLE, size=len(_ZSTD), difference=False),
    _ZSTD,
    PassEnd(1),
)
"""What a further channel says in a pass."""


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1], ids=["before", "after-a-byte", "half-way", "before-the-last-byte"])
@pytest.mark.parametrize("at", range(len(_SIDE)))
def test_channel_that_is_cut_before_or_within_anything_it_says_ends_the_migration(  # M6
    source: _Source, at: int, cut: float
) -> None:
    data = [entry if isinstance(entry, bytes) else piece(entry).data for entry in _SIDE]
    end = len(data[at]) // 2 if cut == 0.5 else int(cut)
    main = source.begin(2)
    sock = source.raw()
    sock.sendall(stream([PREAMBLE_PIECE, piece(Join(_SESSION))]) + b"".join(data[:at]) + data[at][:end])
    sock.shutdown(socket.SHUT_WR)
    assert isinstance(source.fails(), DisconnectedError)
    with pytest.raises(DirtylogError):
        main.receive()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (_frame(State(True, {})), "the source sent State when SIDE"),
        (_frame(Digests(())), "the source sent Digests when SIDE"),
        (_frame(Handover()), "the source sent Handover when SIDE"),
        (_frame(Join(_SESSION)), "the source sent Join when SIDE"),
        (_frame(Taken()), "the source sent Taken when SIDE"),
        (b"\x63\0\0\0\0\0\0\0", "no message has the type 99"),
        (_frame(Pages(9, _TABLE)), "pages of block 9 of 2"),
        (_frame(Pages(0, np.array([[RAM_PAGES, 1]], np.int64))), f"which has {RAM_PAGES}"),
        (_frame(EncodedPages(0, _TABLE, size=7, difference=True), b"garbage"), "7 bytes are no zstd frame"),
        (_frame(EncodedPages(9, _TABLE, size=len(_ZSTD), difference=True), _ZSTD), "pages of block 9 of 2"),
        (_frame(Failed("out of paper")), "the source gave up: out of paper"),
    ],
)
def test_something_wrong_on_a_further_channel_ends_the_migration_and_the_source_is_told(  # M5, M6
    source: _Source, said: bytes, cause: str
) -> None:
    main = source.begin(2)
    sock = source.raw()
    sock.sendall(stream([PREAMBLE_PIECE, piece(Join(_SESSION))]) + said)
    error = source.fails()
    assert cause in error.cause
    if not isinstance(error, RefusedError):
        with pytest.raises(RefusedError, match="the destination gave up: "):
            main.expect(Ready)


def test_failure_of_a_further_channel_is_noticed_although_the_first_goes_on(source: _Source) -> None:
    main = source.begin(2)
    side = source.join()
    side.send(Pages(9, _TABLE), [memoryview(bytes(2 * PAGE_SIZE))])

    def send_for_ever() -> None:
        while True:
            main.send(*_pages(0, 1))

    with pytest.raises(DisconnectedError):
        send_for_ever()
    words = main.last_words()
    assert words is not None
    assert "pages of block 9 of 2" in words.cause
    assert isinstance(source.fails(), ProtocolError)


def _send_for_ever(side: Channel) -> None:
    while True:
        side.send(*_pages(3, 9))


def _side_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "side-channel"]


def test_further_channel_does_not_reach_memory_any_more_when_the_state_is_loaded(
    source: _Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = source.begin(2)
    side = source.join()
    side.send(*_pages(3, 7))
    _end_pass(1, [main, side])
    seen: list[object] = []

    def look(_: FakeMachine, state: MachineState) -> None:
        seen.extend((_side_threads(), source.guest.memory.blocks["ram"].array.tobytes()))

    monkeypatch.setattr(FakeMachine, "load_state", look)
    task = Task(lambda: _send_for_ever(side))
    source.arrive(main)
    assert isinstance(task.error(), DisconnectedError)
    assert seen == [[], source.guest.memory.blocks["ram"].array.tobytes()]


def test_further_channel_does_not_reach_memory_any_more_when_it_is_compared(
    source: _Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = source.begin(2, verify=True)
    side = source.join()
    _end_pass(1, [main, side])
    seen: list[list[str]] = []

    def look(block: RAMBlock) -> bytes:
        seen.append(_side_threads())
        return block.name.encode().ljust(32)

    monkeypatch.setattr(incoming_module, "block_digest", look)
    task = Task(lambda: _send_for_ever(side))
    main.send(Digests((b"ram".ljust(32), b"rom".ljust(32))))
    source.arrive(main)
    assert isinstance(task.error(), DisconnectedError)
    assert seen == [[], []]


@pytest.mark.parametrize("moment", ["before the second", "while one is asked", "with all", "in a message"])
def test_abort_ends_it_at_once_whatever_is_waited_for(source: _Source, moment: str) -> None:
    source.begin(3)
    side = source.join()
    if moment == "while one is asked":
        source.raw()
    elif moment != "before the second":
        source.join()
    if moment == "in a message":
        side.send(Pages(0, _TABLE), [])
    source.incoming.abort()
    assert isinstance(source.fails(), CancelledError)

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import DESTINATION, SHARED_DESTINATION, Checkpoint, Moment, install
from support.custody import Custody
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import same_memory
from support.kvm import open_descriptors
from support.patient_machine import PatientMachine
from support.streams import (
    PairListener,
    Piece,
    Recording,
    fake_machine,
    first,
    parse,
    patched,
    piece,
    play_to_destination,
    reason,
    refusals,
    replaced,
    stream,
    talk,
)
from support.waiting import Task, wait_until

from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    DisconnectedError,
    InDoubtError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.machine import RunState
from dirtylog.migration import (
    Channel,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    connect,
    letting_go,
    parse_address,
)
from dirtylog.migration.address import Address
from dirtylog.migration.messages import (
    HEAD,
    MAGIC,
    BlockInfo,
    Digests,
    Failed,
    Handover,
    Hello,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    Shared,
    State,
    Taken,
    Welcome,
    ZeroPages,
    encode,
)
from dirtylog.migration.protocol import Role
from dirtylog.units import PAGE_SIZE

_GREETING = ["preamble", "Hello"]
_NAMES = [*_GREETING, "ZeroPages", "Pages", "payload", "PassEnd", "Digests", "State", "Handover"]


@pytest.fixture
def guest() -> Iterator[FakeMachine]:
    with fake_machine(boot=False) as guest:
        yield guest


def _never_started(guest: FakeMachine) -> bool:  # M6
    return guest.state is RunState.INMIGRATE


def _is_empty(machine: FakeMachine) -> bool:
    return not any(block.array.any() for block in machine.memory.blocks.values())


def test_recording_has_every_message_of_a_source(recording: Recording) -> None:
    assert {one.name for one in recording.source} == set(_NAMES)


def test_whole_stream_brings_the_guest(guest: FakeMachine, recording: Recording) -> None:
    for block in guest.memory.blocks.values():
        block.array[:] = 0xEE  # must not show through  # M4
    error, answer = play_to_destination(guest, stream(recording.source))
    assert error is None
    assert [one.name for one in answer] == ["preamble", "Welcome", "PassDone", "PassDone", "Ready", "Taken"]
    assert guest.state is RunState.RUNNING
    guest.pause()
    with fake_machine() as original:
        assert same_memory(guest, original)


def test_guest_that_stood_still_stands_still_here(guest: FakeMachine, recording: Recording) -> None:
    index = first(recording.source, "State")
    state = recording.source[index].message
    assert isinstance(state, State)
    pieces = replaced(recording.source, "State", piece(State(False, state.parts)))
    assert play_to_destination(guest, stream(pieces))[0] is None
    assert guest.state is RunState.PAUSED


@pytest.mark.parametrize("name", _NAMES)
def test_stream_that_ends_before_or_within_a_piece_leaves_the_guest_unstarted(  # M6
    recording: Recording, name: str
) -> None:
    start = len(stream(recording.source[: first(recording.source, name)]))
    size = len(recording.source[first(recording.source, name)].data)
    data = stream(recording.source)
    for cut in sorted({0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 1, size // 2, size - 1} - {size}):
        with fake_machine(boot=False) as guest:
            error, _ = play_to_destination(guest, data[: start + cut])
            assert _never_started(guest)
            if name in _GREETING:
                assert isinstance(error, CancelledError), cut  # the next source was waited for
                continue
            assert isinstance(error, DisconnectedError), cut
            assert error.cause == (
                "the connection to the source ended before the migration did;"
                " the guest was not handed over and is not started here"
            )
            assert error.remedy == "start this side again, then the migration"


def test_guest_that_was_handed_over_runs_although_the_source_is_gone_by_then(  # M1
    guest: FakeMachine, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = socket.socketpair()
    install(Checkpoint(Role.DESTINATION, Moment.AFTER_RECEIVING, "Handover"), one.close, monkeypatch.setattr)
    with one, closing(PairListener(other)) as listener:
        task = Task(IncomingMigration(guest, listener).run)
        one.sendall(stream(recording.source))
        task.join()
    assert guest.state is RunState.RUNNING


def _head(number: int, reserved: int = 0, length: int = 0) -> Piece:
    return Piece("head", struct.pack("<HHI", number, reserved, length))


_FAKE_BLOCKS = (BlockInfo("ram", 80 * 4096, 4096), BlockInfo("rom", 5 * 4096, 4096))
_Change = Callable[[tuple[Piece, ...]], tuple[Piece, ...]]


def _instead(name: str, *substitutes: Piece) -> _Change:
    return lambda pieces: replaced(pieces, name, *substitutes)


def _number(name: str, offset: int, form: str, value: int) -> _Change:
    return lambda pieces: replaced(pieces, name, patched(pieces[first(pieces, name)], offset, form, value))


def _after(name: str, *extra: Piece) -> _Change:
    return lambda pieces: replaced(pieces, name, pieces[first(pieces, name)], *extra)


def _ones(payload: Piece) -> Piece:
    return Piece(payload.name, b"\1" * len(payload.data))


def _hello(machine: str = "fake", blocks: tuple[BlockInfo, ...] = _FAKE_BLOCKS, *, verify: bool = True) -> _Change:
    return _instead("Hello", piece(Hello(machine, blocks, verify, 1, bytes(16), False, False)))


_TURNED_AWAY: dict[str, tuple[_Change, str]] = {
    "HTTP": (
        _instead("preamble", Piece("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
        "the source does not speak dirtylog's migration protocol",
    ),
    "QEMU": (
        _instead("preamble", Piece("qemu", b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x06pc-q35")),
        "the source does not speak dirtylog's migration protocol",
    ),
    "another version": (
        _instead("preamble", Piece("preamble", MAGIC + struct.pack("<I", 1))),
        "the source speaks version 1 of the migration protocol, this side 5",
    ),
    "no greeting": (_instead("Hello"), "the source sent ZeroPages when OPENING"),
    "another kind of machine": (
        _hello("toaster"),
        "the source is a machine of kind 'toaster', this one of kind 'fake'",
    ),
    "memory of another size": (
        _hello(blocks=(BlockInfo("ram", 1 << 30, 4096), _FAKE_BLOCKS[1])),
        "the source's memory is ram of 1.0 GiB, rom of 20.0 KiB, this machine's is ram of 320.0 KiB, rom of 20.0 KiB",
    ),
    "pages of another size": (
        _hello(blocks=(BlockInfo("ram", 80 * 4096, 16384), _FAKE_BLOCKS[1])),
        "the source's memory is ram of 320.0 KiB in pages of 16.0 KiB, rom of 20.0 KiB",
    ),
    "blocks in another order": (_hello(blocks=_FAKE_BLOCKS[::-1]), "the source's memory is rom of"),
    "a block less": (_hello(blocks=_FAKE_BLOCKS[:1]), "the source's memory is ram of 320.0 KiB, this"),
    "no blocks": (_hello(blocks=()), "the source's memory is , this machine's"),
}  # fmt: skip


@pytest.mark.parametrize("name", _TURNED_AWAY)
def test_greeting_with_something_wrong_is_refused_and_the_next_source_taken_in(  # M5, M10
    guest: FakeMachine, recording: Recording, tmp_path: Path, name: str
) -> None:
    change, cause = _TURNED_AWAY[name]
    path = f"{tmp_path}/x"
    with closing(Listener(parse_address(f"unix:{path}"))) as listener, refusals() as refused:
        task = Task(IncomingMigration(guest, listener).run)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            answer = tuple(parse(talk(stranger, stream(change(recording.source)))))
        assert cause in str(reason(answer))
        (record,) = refused
        assert record.startswith("refused a connection from process ")
        assert cause in record
        assert _never_started(guest)
        assert task.running
        with socket.socket(socket.AF_UNIX) as source:
            source.connect(path)
            talk(source, stream(recording.source))
        task.join()
    assert guest.state is RunState.RUNNING


_REFUSED: dict[str, tuple[_Change, type[DirtylogError], str]] = {
    "two greetings": (
        lambda pieces: replaced(pieces, "Hello", *[pieces[first(pieces, "Hello")]] * 2),
        ProtocolError,
        "the source sent Hello when STREAMING",
    ),
    "unknown message": (_after("PassEnd", _head(99)), ProtocolError, "no message has the type 99"),
    "flags that nobody knows": (_after("PassEnd", _head(5, 1)), ProtocolError, "type 5 and flags 1"),
    "message that is too long": (
        _after("PassEnd", _head(3, 0, 1 << 31)),
        ProtocolError,
        "a Pages message of 2147483648 bytes",
    ),
    "message of a destination": (_after("PassEnd", piece(Taken())), ProtocolError, "the source sent Taken when"),
    "handover before its time": (_after("PassEnd", piece(Handover())), ProtocolError, "the source sent Handover when"),
    "handover without the state": (_instead("State"), ProtocolError, "the source sent Handover when DIGESTED"),
    "block that is not there": (_number("Pages", 0, "<I", 2), ProtocolError, "pages of block 2 of 2"),
    "zero pages of a block that is not there": (_number("ZeroPages", 0, "<I", 9), ProtocolError, "block 9 of 2"),
    "more runs than there are": (_number("Pages", 4, "<I", 1 << 20), ProtocolError, "1048576 page runs in"),
    "page past the block": (_number("ZeroPages", 8, "<q", 1 << 40), ProtocolError, "page runs are|which has 80"),
    "negative page": (_number("Pages", 8, "<q", -1), ProtocolError, "page runs are empty, negative"),
    "run of no pages": (_number("Pages", 16, "<q", 0), ProtocolError, "page runs are empty"),
    "run too long": (_number("Pages", 16, "<q", 1 << 50), ProtocolError, "page runs are|pages in one message"),
    "facts that are none": (
        _instead("PassEnd", Piece("PassEnd", HEAD.pack(PassEnd.TYPE, 0, 4) + b"\xff" * 4)),
        ProtocolError,
        "not a PassEnd message",
    ),
    "other contents": (
        lambda pieces: replaced(pieces, "payload", _ones(pieces[first(pieces, "payload")])),
        ProtocolError,
        "memory differs from the source's at the switchover",
    ),
    "page left out": (_instead("ZeroPages"), ProtocolError, "memory differs from the source's at the switchover"),
    "other digests": (_instead("Digests", piece(Digests((bytes(32), bytes(32))))), ProtocolError, "memory differs"),
    "digests that were agreed on are missing": (
        _instead("Digests"),
        ProtocolError,
        "the source sent its state without the digests that were agreed on",
    ),
    "digests that were not agreed on": (
        _hello(verify=False),
        ProtocolError,
        "the source sent digests that were not agreed on",
    ),
    "state of something else": (
        _instead("State", piece(State(True, {"toaster": {}}))),
        UsageError,
        "not the state of a fake machine",
    ),
    "state with a part cut off": (
        _instead("State", piece(State(True, {"cpu0": {"place": b"\0"}}))),
        UsageError,
        "not the state of a fake machine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _REFUSED)
def test_stream_with_something_wrong_is_refused_and_the_source_told_why(  # M5, M6
    guest: FakeMachine, recording: Recording, name: str
) -> None:
    guest.memory.blocks["ram"].array[:] = 0xEE
    guest.memory.blocks["rom"].array[:] = 0xEE
    change, kind, cause = _REFUSED[name]
    error, answer = play_to_destination(guest, stream(change(recording.source)))
    assert type(error) is kind
    with pytest.raises(kind, match=cause):
        raise error
    assert reason(answer) == str(error)
    assert _never_started(guest)


@pytest.mark.parametrize("name", [name for name in _NAMES if name not in ("preamble", "Pages", "Handover")])
def test_source_that_gives_up_ends_it_with_its_reason(  # M6
    guest: FakeMachine, recording: Recording, name: str
) -> None:
    index = first(recording.source, name) + 1
    pieces = (*recording.source[:index], piece(Failed("out of paper")))
    error, answer = play_to_destination(guest, stream(pieces))
    assert isinstance(error, RefusedError)
    assert error.cause == "the source gave up: out of paper"
    assert reason(answer) is None
    assert _never_started(guest)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_the_stream_brings_the_guest_or_an_error(recording: Recording, data: st.DataObject) -> None:  # M5
    changed = bytearray(stream(recording.source))
    frames, start = [], 0
    for one in recording.source:
        if one.name != "payload":
            frames += [*range(start, start + len(one.data))]
        start += len(one.data)
    for place in data.draw(st.lists(st.sampled_from(frames), min_size=1, max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    with fake_machine(boot=False) as guest:
        custody = Custody(guest)
        error, _ = play_to_destination(guest, bytes(changed))
        if error is None:
            assert guest.state in (RunState.RUNNING, RunState.PAUSED)
        else:
            assert isinstance(error, DirtylogError)
            assert custody.states[guest] == [RunState.INMIGRATE]


def test_abort_makes_a_waiting_destination_give_up(guest: FakeMachine, tmp_path: Path) -> None:
    with closing(Listener(parse_address(f"unix:{tmp_path}/x"))) as listener:
        incoming = IncomingMigration(guest, listener)
        task = Task(incoming.run)
        incoming.abort()
        assert isinstance(task.error(), CancelledError)
    assert _never_started(guest)


_POINTS = [(point, False) for point in DESTINATION if point.moment is not Moment.WITHIN]
_POINTS += [(point, True) for point in SHARED_DESTINATION if point.moment is not Moment.WITHIN]


@pytest.mark.parametrize(
    ("point", "shared"), _POINTS, ids=[f"{point}{'-shared' if shared else ''}" for point, shared in _POINTS]
)
def test_abort_ends_it_until_the_guest_is_handed_over(
    point: Checkpoint, shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)
    address = parse_address(f"unix:{tmp_path}/x")
    with (
        fake_machine() as source,
        fake_machine(boot=False) as guest,
        closing(Listener(address)) as listener,
    ):
        custody = Custody(source, guest)
        source.resume()
        incoming = IncomingMigration(guest, listener)
        install(point, incoming.abort, monkeypatch.setattr)
        outgoing = OutgoingMigration(source, address, Parameters(verify=True, share_memory=shared))
        sending = Task(outgoing.run)
        error = Task(incoming.run).error()
        if "Taken" in point.message:
            assert error is None
            sending.join()
            assert (source.state, guest.state) == (RunState.POSTMIGRATE, RunState.RUNNING)
        elif point.message == "Handover":  # the source cannot be told any more, so nobody runs the guest
            assert isinstance(error, CancelledError)
            assert isinstance(sending.error(), InDoubtError)
            assert (source.state, guest.state) == (RunState.POSTMIGRATE, RunState.INMIGRATE)
        elif str(point) == "destination:after-sending:Ready":
            sending.error()  # the source may have let go already; who runs the guest then depends on who was faster
        else:
            assert isinstance(error, CancelledError)
            assert isinstance(sending.error(), DisconnectedError)
            assert outgoing.status is Status.FAILED
            assert (source.state, guest.state) == (RunState.RUNNING, RunState.INMIGRATE)
        assert custody.most == 1
        if shared and isinstance(error, CancelledError):
            assert _is_empty(guest)
            assert not _is_empty(source)


def test_pages_sent_twice_end_as_they_were_sent_last(guest: FakeMachine, recording: Recording) -> None:
    pages, payload = (recording.source[first(recording.source, name)] for name in ("Pages", "payload"))
    assert isinstance(pages.message, Pages)
    error, _ = play_to_destination(guest, stream(replaced(recording.source, "Pages", pages, _ones(payload), pages)))
    assert error is None


def test_nobody_else_is_taken_in_once_a_source_has_come(
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    address = parse_address(f"unix:{path}")
    with closing(Listener(address)) as listener, socket.socket(socket.AF_UNIX) as peer:
        task = Task(IncomingMigration(guest, listener).run)
        peer.connect(str(path))
        greeting = first(recording.source, "Hello") + 1
        peer.sendall(stream(recording.source[:greeting]))
        wait_until(lambda: not path.exists(), "the destination took the first source")
        with pytest.raises(DisconnectedError, match="cannot connect to the destination"):
            connect(address)
        talk(peer, stream(recording.source[greeting:]))
        task.join()
    assert guest.state is RunState.RUNNING


_SHARED = Hello("fake", _FAKE_BLOCKS, False, 1, bytes(16), True, False)
_STATE = State(False, {"cpu0": {"place": struct.pack("<IQ", 16 * 4096, 0)}})


@contextmanager
def _source(guest: FakeMachine, hello: Hello = _SHARED) -> Iterator[tuple[Channel, Task]]:
    """A source that is to share its memory, welcomed by a guest's incoming migration."""
    one, other = socket.socketpair()
    with closing(PairListener(other)) as listener, Channel(one, Role.SOURCE) as source:
        task = Task(IncomingMigration(guest, listener).run)
        source.send(hello)
        source.expect(Welcome)
        yield source, task


@pytest.fixture
def memory() -> Iterator[list[MemfdMapping]]:
    """What the source has to share: 1 in all bytes of the first, 2 in those of the second."""
    with ExitStack() as stack:
        mappings = [stack.enter_context(closing(MemfdMapping(one.name, one.size))) for one in _FAKE_BLOCKS]
        for number, mapping in enumerate(mappings):
            mapping.array[:] = number + 1
        yield mappings


def _share(source: Channel, memory: list[MemfdMapping]) -> None:
    source.send(Shared(len(memory)))
    source.send_files([mapping.fd for mapping in memory])
    source.expect(PassDone)


def test_memory_that_is_shared_is_the_guests_once_it_is_handed_over(
    guest: FakeMachine, memory: list[MemfdMapping]
) -> None:
    with _source(guest) as (source, task):
        _share(source, memory)
        source.send(_STATE)
        source.expect(Ready)
        source.send(Handover())
        source.expect(Taken)
        task.join()
    assert guest.state is RunState.PAUSED
    guest.memory.blocks["rom"].array[:] = 5
    assert [set(mapping.array) for mapping in memory] == [{1}, {5}]


_Step = Callable[[Channel, list[MemfdMapping]], object]
_HOSTILE: dict[str, tuple[list[_Step], str]] = {
    "pages instead": (
        [lambda source, _: source.send(ZeroPages(0, np.array([[0, 1]], np.int64)))],
        "the source sent ZeroPages instead of Shared",
    ),
    "state instead": ([lambda source, _: source.send(_STATE)], "the source sent State instead of Shared"),
    "another number": (
        [lambda source, _: source.send(Shared(1))],
        "the source shares the memory of another number of blocks than it has",
    ),
    "no files": (
        [lambda source, _: source.send(Shared(2)), lambda source, _: source.send(_STATE)],
        "the source announced 2 files, and sent 0",
    ),
    "a file less": (
        [lambda source, _: source.send(Shared(2)), lambda source, memory: source.send_files([memory[0].fd])],
        "the source announced 2 files, and sent 1",
    ),
    "another order": (
        [
            lambda source, _: source.send(Shared(2)),
            lambda source, memory: source.send_files([memory[1].fd, memory[0].fd]),
        ],
        "the source shares memory that cannot be used: the memfd of 20480 bytes cannot stand in for 327680",
    ),
    "the second of another size": (
        [
            lambda source, _: source.send(Shared(2)),
            lambda source, memory: source.send_files([memory[0].fd, memory[0].fd]),
        ],
        "the source shares memory that cannot be used: the memfd of 327680 bytes cannot stand in for 20480",
    ),
    "no memory at all": (
        [
            lambda source, _: source.send(Shared(2)),
            lambda source, _: source.send_files([source.fileno(), source.fileno()]),
        ],
        "the source shares memory that cannot be used: the file to be mapped is no memfd",
    ),
    "pages afterwards": (
        [_share, lambda source, _: source._socket.sendall(encode(ZeroPages(0, np.array([[0, 1]], np.int64))))],
        "the source sent ZeroPages when SHARED",
    ),
    "twice": (
        [_share, lambda source, _: source._socket.sendall(encode(Shared(2)))],
        "the source sent Shared when SHARED",
    ),
    "digests that were not agreed on": (
        [_share, lambda source, _: source.send(Digests((bytes(32), bytes(32))))],
        "the source sent Digests instead of State",
    ),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_source_that_shares_something_wrong_is_refused_and_let_go_of(  # M5, M6
    guest: FakeMachine, memory: list[MemfdMapping], name: str
) -> None:
    steps, cause = _HOSTILE[name]
    before = open_descriptors()
    with _source(guest) as (source, task):
        for step in steps:
            step(source, memory)
        with pytest.raises(RefusedError, match=cause):
            source.expect(Ready)
    error = task.error()
    assert isinstance(error, ProtocolError)
    assert error.cause.startswith(cause)
    assert _never_started(guest)
    assert _is_empty(guest)
    assert [set(mapping.array) for mapping in memory] == [{1}, {2}]
    assert len(open_descriptors()) == len(before)


def test_digests_that_were_agreed_on_are_not_left_out_where_memory_is_shared(  # M5
    guest: FakeMachine, memory: list[MemfdMapping]
) -> None:
    hello = Hello("fake", _FAKE_BLOCKS, True, 1, bytes(16), True, False)
    with _source(guest, hello) as (source, task):
        _share(source, memory)
        source.send(_STATE)
    error = task.error()
    assert isinstance(error, ProtocolError)
    assert error.cause == "the source sent State instead of Digests"


def test_shared_memory_that_changed_since_it_was_digested_is_refused(  # M5
    guest: FakeMachine, memory: list[MemfdMapping]
) -> None:
    hello = Hello("fake", _FAKE_BLOCKS, True, 1, bytes(16), True, False)
    with _source(guest, hello) as (source, task):
        _share(source, memory)
        source.send(Digests((bytes(32), bytes(32))))
        with pytest.raises(RefusedError, match="memory differs from the source's at the switchover"):
            source.expect(Ready)
    assert isinstance(task.error(), ProtocolError)
    assert _is_empty(guest)


@pytest.mark.parametrize(("uri", "channels"), [("tcp:127.0.0.1:0", 1), ("unix:{}/x", 2)])
def test_memory_is_not_shared_over_the_network_or_on_several_channels(  # M5
    guest: FakeMachine, tmp_path: Path, uri: str, channels: int
) -> None:
    with closing(Listener(parse_address(uri.format(tmp_path)))) as listener:
        incoming = IncomingMigration(guest, listener)
        task = Task(incoming.run)
        with connect(listener.address) as source:
            source.send(Hello("fake", _FAKE_BLOCKS, False, channels, bytes(16), True, False))
            with pytest.raises(RefusedError, match="wants to share its memory on a connection that cannot do that"):
                source.expect(Welcome)
        assert task.running
        incoming.abort()
        assert isinstance(task.error(), CancelledError)


def test_nobody_else_is_taken_in_while_memory_is_shared(guest: FakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with closing(Listener(parse_address(f"unix:{path}"))) as listener:
        task = Task(IncomingMigration(guest, listener).run)
        with connect(listener.address) as source:
            source.send(_SHARED)
            source.expect(Welcome)
            wait_until(lambda: not path.exists(), "nobody is waited for any more")
        assert isinstance(task.error(), DisconnectedError)
    assert _never_started(guest)


class TestPostcopy:
    """A guest that does not write, all of whose memory comes after the handover unless said otherwise."""

    @staticmethod
    def _migrate(destination: PatientMachine, address: Address, *, at_once: bool = True) -> None:
        with fake_machine() as source, closing(Listener(address)) as listener:
            incoming = IncomingMigration(destination, listener)
            arriving = Task(incoming.run)
            outgoing = OutgoingMigration(source, address, Parameters(postcopy=True))
            if at_once:
                outgoing.start_postcopy()
            source.resume()
            outgoing.run()
            arriving.join()
            assert incoming.status is outgoing.status is Status.COMPLETED
            assert destination.state is RunState.RUNNING
            size = RAM_PAGES * PAGE_SIZE
            assert destination.system.read(0, size) == source.system.read(0, size)

    @pytest.fixture
    def destination(self) -> Iterator[PatientMachine]:
        machine = PatientMachine()
        yield machine
        machine.close()
        machine.memory.close()

    @pytest.fixture
    def address(self, tmp_path: Path) -> Address:
        return parse_address(f"unix:{tmp_path}/x")

    def test_memory_comes_after_the_guest(self, destination: PatientMachine, address: Address) -> None:  # D1
        self._migrate(destination, address)

    def test_guest_whose_memory_has_all_come_before_it_runs_is_complete(  # D1
        self, destination: PatientMachine, address: Address
    ) -> None:
        read: list[bytes] = []

        def touch_everything() -> None:
            for base, pages in ((0, RAM_PAGES), (1 << 32, ROM_PAGES)):
                read.append(destination.system.read(base, pages * PAGE_SIZE))

        destination.while_loading = touch_everything
        self._migrate(destination, address)
        assert len(read) == 2

    def test_it_is_not_needed_where_everything_was_sent_before(
        self, destination: PatientMachine, address: Address
    ) -> None:
        self._migrate(destination, address, at_once=False)

    def test_machine_that_cannot_wait_is_refused_and_the_guest_runs_on(self, address: Address) -> None:  # M2
        with (
            fake_machine() as source,
            fake_machine(boot=False) as destination,
            closing(Listener(address)) as listener,
        ):
            incoming = IncomingMigration(destination, listener)
            arriving = Task(incoming.run)
            source.resume()
            with pytest.raises(RefusedError, match="cannot run before all of its memory is there"):
                OutgoingMigration(source, address, Parameters(postcopy=True)).run()
            assert arriving.running
            incoming.abort()
            assert isinstance(arriving.error(), CancelledError)
            assert source.state is RunState.RUNNING

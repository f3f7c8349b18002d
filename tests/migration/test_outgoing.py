import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.custody import Custody
from support.fake_machine import FakeMachine
from support.streams import (
    Piece,
    Recording,
    fake_machine,
    first,
    piece,
    playing_destination,
    replaced,
    stream,
)
from support.waiting import BOUND, Task

from dirtylog.errors import (
    DirtylogError,
    DisconnectedError,
    InDoubtError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from dirtylog.linux.process import ProcessName
from dirtylog.machine import RunState
from dirtylog.memory import TrackingReason
from dirtylog.migration import (
    OutgoingMigration,
    Parameters,
    Status,
    letting_go,
    parse_address,
    remainder,
)
from dirtylog.migration import channel as channel_module
from dirtylog.migration import outgoing as outgoing_module
from dirtylog.migration.messages import HEAD, Failed, Handover, PassDone, Ready, Taken, Welcome

_VERIFY = Parameters(verify=True)


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The destinations here are threads of a process that lives: there is no point in waiting for its end."""
    monkeypatch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)


@pytest.fixture
def guest() -> Iterator[FakeMachine]:
    """A guest that runs without writing, so that two passes are enough, as in the recording."""
    with fake_machine() as guest:
        guest.resume()
        yield guest


def _play(
    guest: FakeMachine, directory: Path, data: bytes, parameters: Parameters = _VERIFY
) -> tuple[OutgoingMigration, BaseException | None, list[Status]]:
    """Migrate to somebody who plays a destination's stream."""
    statuses: list[Status] = []
    with playing_destination(directory, data) as uri:
        outgoing = OutgoingMigration(guest, parse_address(uri), parameters, observe=statuses.append)
        error = Task(outgoing.run).error()
    assert outgoing.error is error
    assert outgoing.ended
    with pytest.raises(UsageError, match="not logged for"):  # any more; while the guest stands still its end is put off
        guest.memory.stop_logging(TrackingReason.MIGRATION)
    return outgoing, error, statuses


def test_whole_stream_takes_the_guest_away(guest: FakeMachine, recording: Recording, tmp_path: Path) -> None:
    outgoing, error, statuses = _play(guest, tmp_path, stream(recording.destination))
    assert error is None
    assert guest.state is RunState.POSTMIGRATE
    assert statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert outgoing.status is Status.COMPLETED


def test_first_pass_counts_every_page(guest: FakeMachine, recording: Recording, tmp_path: Path) -> None:  # M3
    outgoing, _, _ = _play(guest, tmp_path, stream(recording.destination))
    statistics = outgoing.statistics
    assert statistics.total_bytes == 85 * 4096
    assert [one.number for one in statistics.passes] == [1, 2]
    assert statistics.passes[0].pages + statistics.passes[0].zero_pages == 85
    assert statistics.passes[1].pages + statistics.passes[1].zero_pages == 0
    assert statistics.remaining_pages == 0
    assert statistics.bytes > statistics.pages * 4096
    assert 0 < statistics.downtime < outgoing.elapsed == statistics.total_seconds
    parts = statistics.downtime_parts
    assert parts is not None
    assert statistics.downtime == pytest.approx(parts.stop + parts.final_pass + parts.state + parts.handover)
    assert statistics.downtime_bytes == statistics.passes[-1].bytes
    assert statistics.digests.keys() == {"ram", "rom"}


def test_each_pass_is_told_of_when_it_begins(guest: FakeMachine, recording: Recording, tmp_path: Path) -> None:
    told: list[int | Status] = []
    with playing_destination(tmp_path, stream(recording.destination)) as uri:
        OutgoingMigration(guest, parse_address(uri), _VERIFY, observe=told.append, observe_pass=told.append).run()
    assert told == [Status.SETUP, Status.ACTIVE, 1, Status.DEVICE, 2, Status.COMPLETED]


_PIECES = ["preamble", "Welcome", "PassDone", "Ready"]


@pytest.mark.parametrize("name", _PIECES)
def test_guest_runs_on_when_the_stream_ends_before_or_within_a_piece(  # M2
    recording: Recording, tmp_path: Path, name: str
) -> None:
    index = first(recording.destination, name)
    start, size = len(stream(recording.destination[:index])), len(recording.destination[index].data)
    for cut in sorted({0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 1, size // 2, size - 1}):
        with fake_machine() as guest:
            guest.resume()
            custody = Custody(guest)
            outgoing, error, _ = _play(guest, tmp_path, stream(recording.destination)[: start + cut])
            assert isinstance(error, DisconnectedError), cut
            assert not isinstance(error, InDoubtError), cut
            assert error.cause.startswith("the connection to the destination ended before the migration did")
            assert error.__cause__ is not error
            assert outgoing.status is Status.FAILED
            assert guest.state is RunState.RUNNING
            assert RunState.POSTMIGRATE not in custody.states[guest]


def _instead(name: str, *substitutes: Piece) -> Callable[[tuple[Piece, ...]], tuple[Piece, ...]]:
    return lambda pieces: replaced(pieces, name, *substitutes)


_NO_PROCESS = msgspec.msgpack.encode({"boot_id": "b", "pid": 1 << 62, "start_time": 1})

_REFUSED: dict[str, tuple[Callable[[tuple[Piece, ...]], tuple[Piece, ...]], type[DirtylogError], str]] = {
    "HTTP": (
        _instead("preamble", Piece("http", b"HTTP/1.1 400 Bad Request\r\n")),
        ProtocolError,
        "the destination does not speak dirtylog's migration protocol",
    ),
    "QEMU": (
        _instead("preamble", Piece("qemu", b"QEVM\0\0\0\3padding")),
        ProtocolError,
        "the destination does not speak dirtylog's migration protocol",
    ),
    "another version": (
        _instead("preamble", Piece("preamble", b"DIRTYLOG\x09\0\0\0")),
        ProtocolError,
        "the destination speaks version 9 of the migration protocol, this side 5",
    ),
    "not invited": (_instead("Welcome"), ProtocolError, "the destination sent PassDone when OFFERED"),
    "invited twice": (
        _instead("Welcome", *[piece(Welcome("boot", 1, 1))] * 2),
        ProtocolError,
        "the destination sent Welcome when PASS_ENDED",
    ),
    "process that cannot be": (
        _instead("Welcome", Piece("Welcome", HEAD.pack(2, 0, len(_NO_PROCESS)) + _NO_PROCESS)),
        ProtocolError,
        "not a Welcome message",
    ),
    "pass that was not sent": (
        _instead("PassDone", piece(PassDone(7, 0, 0, 0))),
        ProtocolError,
        "the destination has pass 7 when pass 1 was sent",
    ),
    "ready before the state": (_instead("PassDone", piece(Ready((), 0))), ProtocolError, "sent Ready when PASS_ENDED"),
    "other digests": (
        _instead("Ready", piece(Ready((bytes(32), bytes(32)), 0))),
        RefusedError,
        "the destination's memory differs from the source's at the switchover",
    ),
    "no digests": (_instead("Ready", piece(Ready((), 0))), RefusedError, "the destination's memory differs"),
    "message of a source": (_instead("Ready", piece(Handover())), ProtocolError, "sent Handover when STATE_SENT"),
    "taken before it was given": (_instead("Ready", piece(Taken())), ProtocolError, "sent Taken when STATE_SENT"),
    "unknown message": (_instead("PassDone", Piece("?", struct.pack("<HHI", 77, 0, 0))), ProtocolError, "type 77"),
    "gives up at once": (_instead("Welcome", piece(Failed("no room"))), RefusedError, "destination gave up: no room"),
    "gives up in a pass": (_instead("PassDone", piece(Failed("full"))), RefusedError, "destination gave up: full"),
    "gives up at the state": (_instead("Ready", piece(Failed("odd"))), RefusedError, "destination gave up: odd"),
    "gives up after the handover": (_instead("Taken", piece(Failed("oh"))), RefusedError, "destination gave up: oh"),
}  # fmt: skip


@pytest.mark.parametrize("name", _REFUSED)
def test_guest_runs_on_when_the_destination_says_something_wrong_or_refuses(  # M2, M5
    guest: FakeMachine, recording: Recording, tmp_path: Path, name: str
) -> None:
    change, kind, cause = _REFUSED[name]
    outgoing, error, statuses = _play(guest, tmp_path, stream(change(recording.destination)))
    assert type(error) is kind
    with pytest.raises(kind, match=cause):
        raise error
    assert outgoing.status is statuses[-1] is Status.FAILED
    assert guest.state is RunState.RUNNING


def test_guest_that_stood_still_stands_still_after_a_failure(  # M2
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    guest.pause()
    _, error, _ = _play(guest, tmp_path, stream(_instead("Ready")(recording.destination)))
    assert error is not None
    assert guest.state is RunState.PAUSED


def test_guest_can_be_migrated_after_a_failure(guest: FakeMachine, recording: Recording, tmp_path: Path) -> None:
    for name in _PIECES:
        data = stream(recording.destination[: first(recording.destination, name)])
        assert _play(guest, tmp_path, data)[1] is not None
    assert _play(guest, tmp_path, stream(recording.destination))[1] is None


def _without_taken(recording: Recording, destination: ProcessName) -> tuple[Piece, ...]:
    welcome = piece(Welcome(destination.boot_id, destination.pid, destination.start_time))
    return replaced(replaced(recording.destination, "Welcome", welcome), "Taken")


_OWN = ProcessName.own()


@pytest.mark.parametrize(
    "destination",
    [_OWN, replace(_OWN, boot_id="another host"), replace(_OWN, boot_id="", pid=1 << 22)],
    ids=["lives", "on another host", "dead on another host"],
)
@pytest.mark.parametrize(
    "rest", [b"", b"\x0b\0\0\0", b"garbage, not a message", HEAD.pack(Taken.TYPE, 0, 2) + b"\x80\x80"]
)
def test_guest_that_nobody_confirmed_stays_stopped(  # M1
    guest: FakeMachine, recording: Recording, tmp_path: Path, destination: ProcessName, rest: bytes
) -> None:
    data = stream(_without_taken(recording, destination)) + rest
    outgoing, error, statuses = _play(guest, tmp_path, data)
    assert isinstance(error, InDoubtError)
    assert error.remedy is not None
    assert "'cont' runs it here again" in error.remedy
    assert outgoing.status is statuses[-1] is Status.FAILED
    assert guest.state is RunState.POSTMIGRATE


def test_guest_is_taken_back_when_the_destinations_process_is_gone(  # M1
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    gone = replace(_OWN, start_time=_OWN.start_time + 1)  # its number was given to another process meanwhile
    _, error, _ = _play(guest, tmp_path, stream(_without_taken(recording, gone)))
    assert type(error) is DisconnectedError
    assert guest.state is RunState.RUNNING


@pytest.mark.parametrize("defect", [KeyboardInterrupt, OSError, MemoryError])
def test_whatever_goes_wrong_after_the_handover_leaves_the_guest_stopped(  # M1
    guest: FakeMachine,
    recording: Recording,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    defect: type[BaseException],
) -> None:
    expect = channel_module.Channel.expect

    def interrupted(self: channel_module.Channel, kind: type[Any]) -> Any:
        if kind is Taken:
            raise defect
        return expect(self, kind)

    monkeypatch.setattr(channel_module.Channel, "expect", interrupted)
    with playing_destination(tmp_path, stream(_without_taken(recording, _OWN)), end=False) as uri:
        outgoing = OutgoingMigration(guest, parse_address(uri), Parameters(verify=True))
        with pytest.raises((defect, DirtylogError)):
            outgoing.run()
    assert guest.state is RunState.POSTMIGRATE
    assert outgoing.status is Status.FAILED


def test_interrupted_migration_ends_and_brings_the_guest_back(  # M2
    guest: FakeMachine, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeMachine, "save_state", interrupted)
    with playing_destination(tmp_path, stream(recording.destination), end=False) as uri:
        outgoing = OutgoingMigration(guest, parse_address(uri), Parameters(verify=True))
        with pytest.raises(KeyboardInterrupt):
            outgoing.run()
    assert outgoing.ended
    assert guest.state is RunState.RUNNING


def test_memory_that_is_logged_for_a_migration_is_not_migrated_by_another(  # D7
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    guest.memory.start_logging(TrackingReason.MIGRATION)
    with playing_destination(tmp_path, stream(recording.destination)) as uri:
        error = Task(OutgoingMigration(guest, parse_address(uri), _VERIFY).run).error()
    assert isinstance(error, UsageError)
    assert TrackingReason.MIGRATION in guest.memory.tracking
    assert guest.state is RunState.RUNNING


def test_nobody_at_the_address_fails_it_before_anything_happens(guest: FakeMachine, tmp_path: Path) -> None:
    statuses: list[Status] = []
    outgoing = OutgoingMigration(guest, parse_address(f"unix:{tmp_path}/nobody"), Parameters(), observe=statuses.append)
    with pytest.raises(DisconnectedError, match="cannot connect to the destination"):
        outgoing.run()
    assert statuses == [Status.SETUP, Status.FAILED]
    assert guest.state is RunState.RUNNING


@pytest.mark.parametrize(("name", "pieces"), [("HANDSHAKE_TIMEOUT", 0), ("HANDSHAKE_TIMEOUT", 1), ("STALL_TIMEOUT", 2)])
def test_destination_that_falls_silent_is_given_up(  # M2
    guest: FakeMachine, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pieces: int
) -> None:
    for module in (channel_module, outgoing_module):
        monkeypatch.setattr(module, name, 0.05, raising=False)
    monkeypatch.setattr(channel_module, "_DRAIN_SECONDS", 0.02)
    with playing_destination(tmp_path, stream(recording.destination[:pieces]), end=False) as uri:
        outgoing = OutgoingMigration(guest, parse_address(uri), Parameters())
        with pytest.raises(DisconnectedError, match="has not moved a byte for a while and counts as gone"):
            outgoing.run()
    assert guest.state is RunState.RUNNING


def _late(monkeypatch: pytest.MonkeyPatch, directory: Path, recording: Recording, last: bytes) -> tuple[str, Task]:
    """A destination that says nothing where ``Taken`` is due, but when it is looked for, and then is gone."""
    for module in (outgoing_module, remainder):
        monkeypatch.setattr(module, "STALL_TIMEOUT", 0.05)
    asked, said = threading.Event(), threading.Event()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(directory / "late"))
    server.listen()

    def talk() -> None:
        with server, server.accept()[0] as connection:
            connection.sendall(stream(_without_taken(recording, _OWN)))
            assert asked.wait(BOUND)
            connection.sendall(last)
        said.set()

    def is_gone(*_: object) -> bool:
        asked.set()
        return said.wait(BOUND)

    monkeypatch.setattr(ProcessName, "is_gone", is_gone)
    return f"unix:{directory}/late", Task(talk)


def test_guest_is_not_taken_back_from_a_destination_that_took_it_late_before_it_ended(  # M1
    guest: FakeMachine, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, task = _late(monkeypatch, tmp_path, recording, piece(Taken()).data)
    outgoing = OutgoingMigration(guest, parse_address(uri), _VERIFY)
    outgoing.run()
    task.join()
    assert outgoing.status is Status.COMPLETED
    assert guest.state is RunState.POSTMIGRATE


@pytest.mark.parametrize(
    ("last", "kind", "cause"),
    [
        (b"", DisconnectedError, "counts as gone"),
        (piece(Taken()).data[:5], DisconnectedError, "counts as gone"),
        (b"garbage, not a message", DisconnectedError, "counts as gone"),
        (piece(Failed("no")).data, RefusedError, "the destination gave up: no"),
    ],
    ids=["nothing", "part of Taken", "garbage", "Failed"],
)
def test_guest_is_taken_back_from_a_destination_whose_last_words_were_others(  # M2
    guest: FakeMachine,
    recording: Recording,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: bytes,
    kind: type[DirtylogError],
    cause: str,
) -> None:
    uri, task = _late(monkeypatch, tmp_path, recording, last)
    outgoing = OutgoingMigration(guest, parse_address(uri), _VERIFY)
    with pytest.raises(kind, match=cause):
        outgoing.run()
    task.join()
    assert outgoing.status is Status.FAILED
    assert guest.state is RunState.RUNNING


_SHARED = Parameters(verify=True, share_memory=True)


def _for_shared(recording: Recording) -> tuple[Piece, ...]:
    """What a destination says where memory is shared."""
    return _one_pass_done(recording.destination)


def _one_pass_done(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    index = first(pieces, "PassDone")
    return (*pieces[: index + 1], *(one for one in pieces[index + 1 :] if one.name != "PassDone"))


def test_whole_stream_takes_the_guest_away_with_its_memory(
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    outgoing, error, statuses = _play(guest, tmp_path, stream(_for_shared(recording)), _SHARED)
    assert error is None
    assert guest.state is RunState.POSTMIGRATE
    assert statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert outgoing.statistics.digests.keys() == {"ram", "rom"}
    assert not any(block.array.any() for block in guest.memory.blocks.values())


@pytest.mark.parametrize("name", ["preamble", "Welcome", "PassDone", "Ready", "Taken"])
def test_guest_keeps_its_shared_memory_when_the_stream_ends_before_or_within_a_piece(  # M2
    recording: Recording, tmp_path: Path, name: str
) -> None:
    gone = replace(_OWN, start_time=_OWN.start_time + 1)
    welcome = piece(Welcome(gone.boot_id, gone.pid, gone.start_time))
    pieces = replaced(_for_shared(recording), "Welcome", welcome)
    index = first(pieces, name)
    start, size = len(stream(pieces[:index])), len(pieces[index].data)
    for cut in sorted({0, 1, HEAD.size, size - 1}):
        with fake_machine() as guest:
            guest.resume()
            contents = {block: block.array.copy() for block in guest.memory.blocks.values()}
            outgoing, error, _ = _play(guest, tmp_path, stream(pieces)[: start + cut], _SHARED)
            assert type(error) is DisconnectedError, cut
            assert outgoing.status is Status.FAILED
            assert guest.state is RunState.RUNNING
            assert all(bool((block.array == before).all()) for block, before in contents.items())


def test_shared_memory_stays_where_it_is_when_nobody_knows_who_has_the_guest(  # M1
    guest: FakeMachine, recording: Recording, tmp_path: Path
) -> None:
    pieces = _one_pass_done(_without_taken(recording, _OWN))
    _, error, _ = _play(guest, tmp_path, stream(pieces), _SHARED)
    assert isinstance(error, InDoubtError)
    assert guest.state is RunState.POSTMIGRATE
    assert guest.memory.blocks["ram"].array.any()

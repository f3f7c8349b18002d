from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.checkpoints import DESTINATION, SHARED_DESTINATION, SHARED_SOURCE, SOURCE, Checkpoint, Moment
from support.custody import Custody
from support.guests import Guest, check_memory, check_runs_on, machine, wait_for_rounds
from support.processes import child
from support.waiting import Task

from dirtylog.errors import DisconnectedError
from dirtylog.machine import RunState
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Parameters, Status, parse_address
from dirtylog.migration.protocol import Role

_COPIED = Parameters(verify=True)
_SHARED = Parameters(verify=True, share_memory=True)

_LET_GO = (
    Checkpoint(Role.SOURCE, Moment.AFTER_SENDING, "Handover"),
    Checkpoint(Role.SOURCE, Moment.AFTER_RECEIVING, "Taken"),
)
"""The guest is the destination's here."""
_TAKEN = Checkpoint(Role.DESTINATION, Moment.AFTER_SENDING, "Taken")
"""The destination has said that it runs the guest, and is killed before it does: nobody can bring that guest back."""

# Before it sends something, a side is where it was after what came last; so that is told apart once only.
_FIRST = Checkpoint(Role.SOURCE, Moment.BEFORE_SENDING, "Hello")
_POINTS = [_FIRST, *(point for point in SOURCE + DESTINATION if point.moment is not Moment.BEFORE_SENDING)]
_CASES = [("fake", point, _COPIED) for point in _POINTS]
_CASES += [("kvm", point, _COPIED) for point in _POINTS if point.moment is Moment.AFTER_RECEIVING]
_CASES += [("kvm", point, _COPIED) for point in (_LET_GO[0], _TAKEN)]
_CASES += [
    ("fake", point, _SHARED)
    for point in SHARED_SOURCE + SHARED_DESTINATION
    if point.moment is not Moment.BEFORE_SENDING or point.message == "Digests"  # the files are on their way
]
_CASES += [
    ("kvm", point, _SHARED)
    for point in (*_LET_GO, _TAKEN, *SHARED_DESTINATION)
    if point.message in ("State", "Handover", "Taken") and point.moment is not Moment.BEFORE_SENDING
]


def _where(side: Role, *, owner_is_source: bool) -> pytest.MarkDecorator:
    cases = [
        (kind, point, parameters)
        for kind, point, parameters in dict.fromkeys(_CASES)
        if point.side is side and (point not in (*_LET_GO, _TAKEN)) is owner_is_source
    ]
    ids = [f"{kind}-{point}{'-shared' if parameters is _SHARED else ''}" for kind, point, parameters in cases]
    return pytest.mark.parametrize(("kind", "point", "parameters"), cases, ids=ids)


@pytest.fixture(autouse=True)
def _host(request: pytest.FixtureRequest) -> None:
    """What the kind of machine needs."""
    if request.node.callspec.params.get("kind") == "kvm":
        request.getfixturevalue("kvm")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/migration"


@contextmanager
def _running_guest(kind: str) -> Iterator[Guest]:
    with machine(kind, boot=True) as guest:
        guest.resume()
        wait_for_rounds(guest)
        yield guest


def _migrate_to_killed(
    guest: Guest, kind: str, uri: str, point: Checkpoint, parameters: Parameters
) -> OutgoingMigration:
    """Migrate a guest to a process that is killed at a checkpoint."""
    with child("destination", kind, uri, point) as destination:
        destination.wait_for_line("listening")
        outgoing = OutgoingMigration(guest, parse_address(uri), parameters)
        task = Task(outgoing.run)
        destination.wait_for_line("halted")
        if point != _TAKEN:
            assert "running" not in destination.out.splitlines()
        destination.kill()
        task.error()
    return outgoing


@contextmanager
def _killed_source(
    kind: str, uri: str, point: Checkpoint, parameters: Parameters
) -> Iterator[tuple[Guest, Custody, Task]]:
    """A destination whose source is killed at a checkpoint, and its incoming migration."""
    with machine(kind, boot=False) as guest:
        custody = Custody(guest)
        listener = Listener(parse_address(uri))
        task = Task(IncomingMigration(guest, listener).run)
        try:
            with child("source", kind, uri, point, shared=parameters.share_memory) as source:
                source.wait_for_line("halted")
                if point in _LET_GO:
                    assert source.out.splitlines()[-2:] == ["finish-migrate", "halted"]
                source.kill()
            yield guest, custody, task
        finally:
            listener.abort()
            task.error()
            listener.close()


def _migrate_to_fresh(guest: Guest, kind: str, uri: str, parameters: Parameters) -> None:
    with machine(kind, boot=False) as destination:
        custody = Custody(guest, destination)
        listener = Listener(parse_address(uri))
        try:
            task = Task(IncomingMigration(destination, listener).run)
            OutgoingMigration(guest, parse_address(uri), parameters).run()
            task.join()
        finally:
            listener.close()
        assert guest.state is RunState.POSTMIGRATE
        check_runs_on(destination)
        assert custody.most == 1


@_where(Role.DESTINATION, owner_is_source=True)
def test_guest_runs_on_when_the_destination_is_killed(  # M2
    kind: str, point: Checkpoint, parameters: Parameters, uri: str
) -> None:
    with _running_guest(kind) as guest:
        outgoing = _migrate_to_killed(guest, kind, uri, point, parameters)
        assert outgoing.status is Status.FAILED
        assert isinstance(outgoing.error, DisconnectedError)
        assert "the connection to the destination ended before the migration did" in outgoing.error.cause
        check_runs_on(guest)
        _migrate_to_fresh(guest, kind, uri, parameters)


@_where(Role.DESTINATION, owner_is_source=False)
def test_guest_stays_stopped_when_the_destination_is_killed_after_it_took_the_guest(  # M1
    kind: str, point: Checkpoint, parameters: Parameters, uri: str
) -> None:
    with _running_guest(kind) as guest:
        outgoing = _migrate_to_killed(guest, kind, uri, point, parameters)
        assert outgoing.status is Status.COMPLETED
        assert guest.state is RunState.POSTMIGRATE
        if parameters.share_memory:  # it is gone with the destination
            assert not any(block.array.any() for block in guest.memory.blocks.values())
            return
        check_memory(guest)
        guest.resume()  # as the operator may
        check_runs_on(guest)


@_where(Role.SOURCE, owner_is_source=True)
def test_destination_never_starts_the_guest_when_the_source_is_killed(  # M6
    kind: str, point: Checkpoint, parameters: Parameters, uri: str
) -> None:
    with _killed_source(kind, uri, point, parameters) as (guest, custody, task):
        if point.message != "Hello":  # before that it is no source, and the next one may be waited for (M10)
            error = task.error()
            assert isinstance(error, DisconnectedError)
            assert "not started here" in error.cause
        assert guest.state is RunState.INMIGRATE
        assert custody.states[guest] == [RunState.INMIGRATE]
        if parameters.share_memory:
            assert not any(block.array.any() for block in guest.memory.blocks.values())


@_where(Role.SOURCE, owner_is_source=False)
def test_destination_runs_the_guest_when_the_source_is_killed_after_the_handover(  # M1
    kind: str, point: Checkpoint, parameters: Parameters, uri: str
) -> None:
    with _killed_source(kind, uri, point, parameters) as (guest, _, task):
        task.join()
        check_runs_on(guest)

"""Processes that are killed while a guest is handed over before its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.checkpoints import POSTCOPY_DESTINATION, POSTCOPY_SOURCE, Checkpoint, Moment
from support.guests import Guest, check_runs_on, machine, wait_for_rounds
from support.processes import child
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DisconnectedError
from dirtylog.linux.kvm import KVM
from dirtylog.machine import RunState
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Parameters, Status, parse_address
from dirtylog.migration.protocol import Role

_ON_ITS_WAY = ("Page", "Pages", "Request")
"""What is said once the guest is there, or may be even before."""


def _points(points: tuple[Checkpoint, ...], *, taken: bool) -> pytest.MarkDecorator:
    """Those by which the destination has said that it has the guest, as far as the killed side knows, or has not."""
    handover = Role.DESTINATION if points is POSTCOPY_DESTINATION else Role.SOURCE

    def is_taken(point: Checkpoint) -> bool:
        if handover is Role.DESTINATION:
            return point == Checkpoint(handover, Moment.AFTER_SENDING, "Taken")
        return point.message == "Taken" or point == Checkpoint(handover, Moment.AFTER_SENDING, "Handover")

    chosen = [point for point in points if point.message not in _ON_ITS_WAY and is_taken(point) is taken]
    return pytest.mark.parametrize("point", chosen, ids=str)


@pytest.fixture
def uri(kvm: KVM, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/m"


@contextmanager
def _to_killed(uri: str, point: Checkpoint) -> Iterator[tuple[Guest, OutgoingMigration, Task]]:
    """A guest on its way to a process that is killed at a checkpoint."""
    with machine("kvm", boot=True) as guest, child("destination", "kvm", uri, point) as destination:
        guest.resume()
        wait_for_rounds(guest)
        destination.wait_for_line("listening")
        outgoing = OutgoingMigration(guest, parse_address(uri), Parameters(postcopy=True))
        outgoing.start_postcopy()
        task = Task(outgoing.run)
        try:
            destination.wait_for_line("halted")
            destination.kill()
            yield guest, outgoing, task
        finally:
            outgoing.close()
            task.error()


@_points(POSTCOPY_DESTINATION, taken=False)
def test_guest_runs_on_when_the_destination_dies_before_it_took_the_guest(uri: str, point: Checkpoint) -> None:  # M2
    with _to_killed(uri, point) as (guest, outgoing, task):
        assert isinstance(task.error(), DisconnectedError)
        assert outgoing.status is Status.FAILED
        check_runs_on(guest)


@_points(POSTCOPY_DESTINATION, taken=True)
def test_source_stays_stopped_when_the_destination_dies_with_the_guest(uri: str, point: Checkpoint) -> None:  # M1, M8
    with _to_killed(uri, point) as (guest, outgoing, task):
        wait_until(lambda: outgoing.status is Status.POSTCOPY_PAUSED, "the source waits for another connection")
        assert outgoing.cancel()
        assert isinstance(task.error(), DisconnectedError)
        assert guest.state is RunState.POSTMIGRATE
        guest.resume()  # as the operator may, who has seen it die
        check_runs_on(guest)


@contextmanager
def _from_killed(uri: str, point: Checkpoint) -> Iterator[tuple[Guest, IncomingMigration, Task]]:
    """A machine whose source is killed at a checkpoint."""
    with machine("kvm", boot=False) as guest:
        incoming = IncomingMigration(guest, Listener(parse_address(uri)))
        task = Task(incoming.run)
        try:
            with child("source", "kvm", uri, point, postcopy=True) as source:
                source.wait_for_line("halted")
                source.kill()
            yield guest, incoming, task
        finally:
            incoming.abort()
            task.error()


@_points(POSTCOPY_SOURCE, taken=False)
def test_guest_never_starts_when_the_source_dies_before_the_handover(uri: str, point: Checkpoint) -> None:  # M6
    with _from_killed(uri, point) as (guest, incoming, task):
        assert isinstance(task.error(), DisconnectedError)
        assert guest.state is RunState.INMIGRATE
        assert incoming.status is not Status.POSTCOPY_PAUSED


@_points(POSTCOPY_SOURCE, taken=True)
def test_guest_waits_when_the_source_dies_with_its_memory(uri: str, point: Checkpoint) -> None:  # M8
    with _from_killed(uri, point) as (guest, incoming, task):
        wait_until(lambda: incoming.status is Status.POSTCOPY_PAUSED, "the destination waits for another connection")
        assert incoming.owed
        incoming.abort()
        assert isinstance(task.error(), CancelledError)
        assert guest.state is RunState.PAUSED

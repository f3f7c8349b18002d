"""Guests that are handed over with their memory, and when each side gives up what it has no use for any more."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from support.custody import Custody
from support.guests import Guest, check_runs_on, machine, wait_for_rounds
from support.kvm import open_descriptors
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.machine import RunState
from dirtylog.memory import Memory
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    parse_address,
    sharing,
)
from dirtylog.migration.channel import Channel
from dirtylog.migration.outgoing import StatusObserver

_SHARED = Parameters(share_memory=True)


@pytest.fixture(params=["fake", "kvm", "unicorn"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Guest, Guest]]:
    """A guest that runs, and a machine for it to arrive at."""
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    with machine(request.param, boot=True) as source, machine(request.param, boot=False) as destination:
        source.resume()
        wait_for_rounds(source)
        yield source, destination


@contextmanager
def _migration(
    pair: tuple[Guest, Guest], directory: os.PathLike[str], observe: StatusObserver | None = None
) -> Iterator[tuple[OutgoingMigration, Task]]:
    """A migration that has not begun, and what waits for it."""
    source, destination = pair
    custody = Custody(source, destination)
    with closing(Listener(parse_address(f"unix:{directory}/socket"))) as listener:
        arrival = Task(IncomingMigration(destination, listener).run)
        try:
            yield OutgoingMigration(source, listener.address, _SHARED, observe=observe), arrival
        finally:
            listener.abort()
            arrival.error()
    assert custody.most == 1  # M1


def _is_empty(guest: Guest) -> bool:
    return not any(block.array.any() for block in guest.memory.blocks.values())


def test_migration_has_completed_before_the_source_lets_go_of_memory_and_its_machine_is_held_until_then(  # M1
    pair: tuple[Guest, Guest], tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pair
    gate, let_go = threading.Event(), sharing.let_go

    def wait_and_let_go(memory: Memory) -> None:
        assert gate.wait(BOUND)
        let_go(memory)

    monkeypatch.setattr(sharing, "let_go", wait_and_let_go)
    with _migration(pair, tmp_path) as (outgoing, arrival):
        sending = Task(outgoing.run)
        wait_until(lambda: outgoing.ended, "the migration ended")
        arrival.join()
        wait_for_rounds(destination)
        assert (outgoing.status, source.state) == (Status.COMPLETED, RunState.FINISH_MIGRATE)
        for call in (source.resume, source.pause):
            with pytest.raises(UsageError, match="in the hands of a migration"):
                call()
        assert not outgoing.cancel()
        total = outgoing.statistics.total_seconds
        assert 0 < outgoing.statistics.downtime < total
        gate.set()
        sending.join()
    assert (outgoing.status, source.state) == (Status.COMPLETED, RunState.POSTMIGRATE)
    assert outgoing.elapsed == total
    assert _is_empty(source)
    check_runs_on(destination)


def test_machine_that_cannot_let_go_of_memory_has_ended_and_the_guest_runs_on_where_it_is(  # M1
    pair: tuple[Guest, Guest], tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pair

    def refuse(_: MemfdMapping) -> None:
        raise HostError("the host cannot map memory", remedy="wait")

    statuses: list[Status] = []
    with _migration(pair, tmp_path, statuses.append) as (outgoing, arrival):
        with monkeypatch.context() as patch:
            patch.setattr(MemfdMapping, "renew", refuse)
            with pytest.raises(HostError, match="the host cannot map memory") as caught:
                outgoing.run()
        arrival.join()
    assert statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert outgoing.error is None
    assert (source.state, source.failure) == (RunState.INTERNAL_ERROR, caught.value)
    with pytest.raises(UsageError, match="has ended"):
        source.resume()
    check_runs_on(destination)


def test_source_lets_go_of_memory_though_who_hears_of_the_end_fails(
    pair: tuple[Guest, Guest], tmp_path: os.PathLike[str]
) -> None:
    source, destination = pair

    def fail(status: Status) -> None:
        if status is Status.COMPLETED:
            raise HostError("nobody hears", remedy="listen")

    with _migration(pair, tmp_path, fail) as (outgoing, arrival):
        with pytest.raises(HostError, match="nobody hears"):
            outgoing.run()
        arrival.join()
    assert (outgoing.status, source.state) == (Status.COMPLETED, RunState.POSTMIGRATE)
    assert _is_empty(source)
    check_runs_on(destination)


def test_memory_that_the_destination_had_goes_when_the_guest_runs_and_the_source_has_heard_it(
    pair: tuple[Guest, Guest], tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, destination = pair
    blocks = destination.memory.blocks.values()
    own = {os.fstat(block.mapping.fd).st_ino for block in blocks if isinstance(block.mapping, MemfdMapping)}
    kept: list[tuple[str, bool]] = []
    finish = Channel.finish

    def finish_and_look(channel: Channel) -> None:
        finish(channel)
        kept.append(("the source has heard it", own <= _inodes()))

    def note(_: RunState, new: RunState) -> None:
        kept.append((new.value, own <= _inodes()))

    assert own
    destination.observers.append(note)
    monkeypatch.setattr(Channel, "finish", finish_and_look)
    with _migration(pair, tmp_path) as (outgoing, arrival):
        outgoing.run()
        arrival.join()
        assert kept == [("inmigrate", True), ("running", True), ("the source has heard it", True)]
        assert not own & _inodes()


def _inodes() -> set[int]:
    return {os.stat(f"/proc/self/fd/{number}").st_ino for number in open_descriptors()}

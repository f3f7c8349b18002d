"""Migrations in which something goes wrong at a place, and what must be true of them afterwards."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from support.custody import Custody
from support.economies import Fixed
from support.fault_table import Case
from support.guests import Guest, check_memory, check_runs_on, contents, machine, rest_of_memory, wait_for_rounds
from support.held_back import hold_back
from support.places import Boundary, Fault, Place, Step
from support.processes import child
from support.relay import Relay
from support.streams import refusals
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, PeerError, UsageError
from dirtylog.machine import RunState
from dirtylog.migration import (
    Compression,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    arrival,
    channel,
    custody,
    incoming,
    lanes,
    letting_go,
    outgoing,
    parse_address,
    postcopy,
    reception,
    remainder,
)
from dirtylog.migration.economy import Way
from dirtylog.migration.protocol import Role
from dirtylog.migration.sender import Sender

WAYS: Final = {
    "precopy": Parameters(verify=True, compression=Compression.NONE),
    "encoded": Parameters(verify=True),
    "channels": Parameters(channels=2, compression=Compression.NONE, downtime_limit=0.0),
    "shared": Parameters(verify=True, share_memory=True),
    "refused": Parameters(),
    "postcopy": Parameters(postcopy=True, downtime_limit=0.0),
    "recovery": Parameters(postcopy=True, downtime_limit=0.0),
}
"""``encoded``: all contents are compressed. ``channels``: passes go on until the fault has come about.

``refused``: the destination cannot load the state. ``postcopy``: all of memory is owed. ``recovery``: the same, and the
first connection was lost before ``Taken``; what is said on the next is what counts.
"""

_LOST: Final = Step(Place(Role.DESTINATION, "Taken", Boundary.BEFORE), Fault.CLOSE)
_SILENT: Final = (
    "has not moved a byte for a while",
    "did not say within",
    "further channels did not come",
    "pages are missing",
    "No Join came within",
    "this state is none of mine",
)
"""What tells of a side that was silent for too long; or had no more to say."""


def _shorten_timeouts(fault: Fault, seconds: float, patch: pytest.MonkeyPatch) -> None:
    """Have nobody wait for long for what will not come."""
    patch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)
    if fault in (Fault.SHORT, Fault.TWICE):
        return
    patch.setattr(channel, "_DRAIN_SECONDS", 0.02)
    patch.setattr(arrival, "_COMPLETE_TIMEOUT", seconds)
    for module in (channel, reception, incoming, arrival, postcopy):
        patch.setattr(module, "HANDSHAKE_TIMEOUT", seconds)
    if fault is Fault.STALL:
        for module in (outgoing, remainder, postcopy, arrival):
            patch.setattr(module, "STALL_TIMEOUT", seconds)


def _prepare(case: Case, step: Step, patch: pytest.MonkeyPatch) -> None:
    """Have the source say what the case is about."""
    if case.way == "encoded":
        patch.setattr(lanes, "Economy", lambda _: Fixed(Way.FAST))
    if case.way == "channels":
        _use_the_second(step, patch)
    if case.place.message in ("Request", "Page"):
        hold_back(patch, step.met.wait)


def _use_the_second(step: Step, patch: pytest.MonkeyPatch) -> None:
    """Have nothing sent on the first of two channels before the fault."""
    work = lanes.Lanes._work

    def late(all_lanes: lanes.Lanes, sender: Sender) -> None:
        if sender is all_lanes._senders[0]:
            assert step.met.wait(BOUND), "nothing was said on the second channel"
        work(all_lanes, sender)

    patch.setattr(lanes.Lanes, "_work", late)


class FaultyMigration:
    """A migration through a relay that does harm at one place, up to where both sides stand still.

    Args:
        stack: closes all in the end.
        kind: of machine.
        case: what is to happen.
        directory: for sockets.
        patience: seconds that a side waits for what will not come.

    Attributes:
        source: where the guest was.
        destination: where it was to be.
    """

    def __init__(self, stack: ExitStack, kind: str, case: Case, directory: Path, patience: float) -> None:
        self._stack, self._kind, self._case, self._directory = stack, kind, case, directory
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        self.source, self.destination = (stack.enter_context(machine(kind, boot=boot)) for boot in (True, False))
        self._rest = _started(self.source)
        self._custody = Custody(self.source, self.destination)
        self._step = Step(case.place, case.fault)
        self._lost = replace(_LOST, met=threading.Event())
        if case.way == "refused":
            patch.setattr(self.destination, "load_state", _refuse)
        _prepare(case, self._step, patch)
        self._short_timeouts = stack.enter_context(pytest.MonkeyPatch.context())
        _shorten_timeouts(case.fault, patience, self._short_timeouts)
        self._refused = stack.enter_context(refusals())
        unix = case.way == "shared" or case.fault is not Fault.RESET
        back = f"unix:{directory}/m" if unix else "tcp:127.0.0.1:0"
        self._listener = stack.enter_context(closing(Listener(parse_address(back))))
        steps = [self._lost, self._step] if case.way == "recovery" else [self._step]
        front = f"unix:{directory}/front" if unix else "tcp:127.0.0.1:0"
        self._relay = stack.enter_context(Relay(parse_address(front), self._listener.address, *steps))
        self._incoming = IncomingMigration(self.destination, self._listener)
        self._outgoing = OutgoingMigration(self.source, self._relay.address, WAYS[case.way])
        if WAYS[case.way].postcopy:
            self._outgoing.start_postcopy()
        self._arriving, self._leaving = Task(self._incoming.run), Task(self._outgoing.run)
        for task in (self._arriving, self._leaving):
            stack.callback(task.error)
        stack.callback(self._incoming.abort)
        stack.callback(self._outgoing.close)

    def settle(self) -> bool:
        """Wait for the fault, and until both sides have ended, or wait for somebody.

        Returns:
            Whether it came about. On a host that is very busy, a side may have lost its patience before.
        """
        if self._case.way == "recovery":
            wait_until(lambda: self._lost.met.is_set() and self._both_paused, "the connection was lost")
            self._recover("again", through_relay=True)
        wait_until(lambda: self._step.met.is_set() or self._source_stands, "the fault came about")
        if not self._step.met.is_set():
            return False
        self._outgoing.parameters = replace(self._outgoing.parameters, downtime_limit=1.0)
        wait_until(lambda: self._source_stands and self._destination_stands, "both sides stood still")
        return True

    @property
    def _source_stands(self) -> bool:
        return not self._leaving.running or self._outgoing.status is Status.POSTCOPY_PAUSED

    @property
    def _destination_stands(self) -> bool:
        return (
            not self._arriving.running
            or self._incoming.status is Status.POSTCOPY_PAUSED
            or (self._incoming._hello is None and bool(self._refused))
        )

    @property
    def _both_paused(self) -> bool:
        return self._outgoing.status is self._incoming.status is Status.POSTCOPY_PAUSED

    def _recover(self, name: str, *, through_relay: bool = False) -> None:
        """Have the destination wait elsewhere, as soon as it has seen that a source has gone which came before."""
        listener = Listener(parse_address(f"unix:{self._directory}/{name}"))  # the migration closes it

        def accepted() -> bool:
            try:
                self._incoming.recover(lambda: listener)
            except UsageError:
                return False
            return True

        wait_until(accepted, "the destination could be recovered")
        if through_relay:
            self._relay.target = listener.address
        self._outgoing.resume(self._relay.address if through_relay else listener.address)

    def operate(self) -> Guest:
        """Do what an operator does who looks at both sides; the one that has the guest, which runs there."""
        self._short_timeouts.undo()
        moved = _took(self._incoming)
        told = self._relay.delivered("Handover") > 0
        assert moved <= told
        assert moved or not told or self._case.place.link  # it hears of a lost urgent channel before the handover
        if self._case.fault in (Fault.SHORT, Fault.TWICE):
            if self._case.way != "refused":
                self._leaving.join()
                self._arriving.join()
            self._check_doubles()
        elif self._leaving.running and self._arriving.running:
            self._recover("last")
            self._leaving.join()
            self._arriving.join()
        elif self._leaving.running:
            assert self._outgoing.cancel()
        if not moved and self._leaving.error() is not None and self.source.state is RunState.POSTMIGRATE:
            assert isinstance(self._arriving.error(), PeerError)
            self.source.resume()  # the destination never will have it
        self._check_ends(moved=moved)
        return self.destination if moved else self.source

    def _check_ends(self, *, moved: bool) -> None:
        if moved:
            self._arriving.join()
        else:
            assert isinstance(self._leaving.error(), DirtylogError)
            assert self.destination.state is RunState.INMIGRATE
        if self._case.fault is Fault.STALL and not moved:
            said = [*self._reasons(), *self._refused]
            assert any(sign in text for text in said for sign in _SILENT), said

    def _reasons(self) -> Iterator[str]:
        """Why both ended, and why that."""
        for task in (self._leaving, self._arriving):
            error = None if task.running else task.error()
            while error is not None:
                yield str(error)
                error = error.__cause__

    def _check_doubles(self) -> None:
        """Who said again what the source had said was not let in."""
        self._relay.hang_up_doubles()
        for answer in self._relay.doubles:
            assert [piece.name for piece in answer] in (["preamble"], ["preamble", "Failed"], []), answer

    def check(self, owner: Guest) -> None:
        """The guest runs there and nowhere else, has lost nothing, and can be migrated again."""
        assert self._custody.most == 1
        assert [guest.state for guest in (self.source, self.destination)].count(RunState.RUNNING) == 1
        check_runs_on(owner)
        owner.pause()
        check_memory(owner)
        _check_same(rest_of_memory(owner), self._rest)
        if owner is self.source and self._arriving.running:
            _migrate(owner, self.destination, self._arriving, self._listener)
        else:
            _migrate_on(self._stack, self._kind, owner, self._directory)


class MigrationToKilled:
    """A migration through a relay to a process that is killed at a place."""

    def __init__(self, stack: ExitStack, kind: str, case: Case, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self._stack, self._kind, self._case, self._directory = stack, kind, case, directory
        destination = stack.enter_context(child("destination", kind, f"unix:{directory}/m", "-"))
        self._step = Step(case.place, case.fault, destination.kill, Role.DESTINATION)
        _prepare(case, self._step, patch)
        self._source = stack.enter_context(machine(kind, boot=True))
        self._rest = _started(self._source)
        destination.wait_for_line("listening")
        front, back = (parse_address(f"unix:{directory}/{name}") for name in ("front", "m"))
        self._relay = stack.enter_context(Relay(front, back, self._step))
        self._outgoing = OutgoingMigration(self._source, front, WAYS[case.way])
        if WAYS[case.way].postcopy:
            self._outgoing.start_postcopy()
        self._leaving = Task(self._outgoing.run)
        stack.callback(self._leaving.error)
        stack.callback(self._outgoing.close)

    def settle(self) -> None:
        """Wait for its death, and until the source has ended, or waits for somebody."""
        wait_until(self._step.met.is_set, "it was killed")
        wait_until(
            lambda: not self._leaving.running or self._outgoing.status is Status.POSTCOPY_PAUSED, "the source stood"
        )

    def check(self) -> None:
        """The guest runs on at the source by itself unless it was handed over, and can be migrated again."""
        if self._leaving.running:
            assert self._outgoing.cancel()
        error = self._leaving.error()
        if not self._relay.delivered("Handover"):
            assert isinstance(error, PeerError)
        elif self._relay.delivered("Taken"):
            assert self._source.state is RunState.POSTMIGRATE
        if self._relay.delivered("Handover") and self._source.state is RunState.POSTMIGRATE:
            self._source.resume()  # as the operator may, who has seen it die
        check_runs_on(self._source)
        self._source.pause()
        check_memory(self._source)
        _check_same(rest_of_memory(self._source), self._rest)
        _migrate_on(self._stack, self._kind, self._source, self._directory)


class MigrationFromKilled:
    """A migration through a relay from a process that is killed at a place."""

    def __init__(self, stack: ExitStack, kind: str, case: Case, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self._stack, self._kind, self._case, self._directory = stack, kind, case, directory
        self._refused = stack.enter_context(refusals())
        self._destination = stack.enter_context(machine(kind, boot=False))
        self._custody = Custody(self._destination)
        front, back = (parse_address(f"unix:{directory}/{name}") for name in ("front", "m"))
        self._incoming = IncomingMigration(self._destination, stack.enter_context(closing(Listener(back))))
        self._arriving = Task(self._incoming.run)
        stack.callback(self._arriving.error)
        stack.callback(self._incoming.abort)
        self._step = Step(case.place, case.fault, lambda: source.kill(), Role.SOURCE)
        self._relay = stack.enter_context(Relay(front, back, self._step))
        shared, late = case.way == "shared", case.way == "postcopy"
        source = stack.enter_context(child("source", kind, str(front), "-", shared=shared, postcopy=late))

    @property
    def _waits(self) -> bool:
        """Whether it waits for another source."""
        return self._incoming._hello is None and bool(self._refused)

    def settle(self) -> None:
        """Wait for its death, and until the destination has ended, or waits for somebody."""
        wait_until(self._step.met.is_set, "it was killed")
        wait_until(
            lambda: not self._arriving.running or self._waits or self._incoming.status is Status.POSTCOPY_PAUSED,
            "the destination stood",
        )

    def check(self) -> None:
        """The guest never ran there unless it was handed over; and runs there then, if all of its memory came."""
        if not _took(self._incoming):
            self._incoming.abort()
            assert isinstance(self._arriving.error(), CancelledError if self._waits else DisconnectedError)
            assert self._custody.states[self._destination] == [RunState.INMIGRATE]
        elif self._arriving.running:
            assert self._incoming.owed
            self._incoming.abort()
            assert isinstance(self._arriving.error(), CancelledError)
            assert self._destination.state is RunState.PAUSED
        else:
            self._arriving.join()
            check_runs_on(self._destination)
            self._destination.pause()
            _migrate_on(self._stack, self._kind, self._destination, self._directory)


def _took(migration: IncomingMigration) -> bool:
    """Whether the destination knows that the guest is there."""
    return migration._taking_over.custody is custody.Custody.MINE


def _migrate_on(stack: ExitStack, kind: str, owner: Guest, directory: Path) -> None:
    """Migrate a guest that stands still to a machine that is new."""
    third = stack.enter_context(machine(kind, boot=False))
    listener = stack.enter_context(closing(Listener(parse_address(f"unix:{directory}/next"))))
    _migrate(owner, third, Task(IncomingMigration(third, listener).run), listener)


def _migrate(owner: Guest, third: Guest, arriving: Task, listener: Listener) -> None:
    owners, before = Custody(owner, third), contents(owner)
    OutgoingMigration(owner, listener.address, Parameters(verify=True)).run()
    arriving.join()
    assert (owner.state, third.state) == (RunState.POSTMIGRATE, RunState.PAUSED)
    _check_same(contents(third), before)
    third.resume()
    check_runs_on(third)
    assert owners.most == 1


def _started(guest: Guest) -> dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """Start a guest; what it does not write."""
    guest.resume()
    wait_for_rounds(guest)
    guest.pause()
    rest = rest_of_memory(guest)
    guest.resume()
    return rest


def _check_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), f"{name}: {np.flatnonzero(array != other[name])[:10]}"


def _refuse(_: object) -> None:
    raise DirtylogError("this state is none of mine")

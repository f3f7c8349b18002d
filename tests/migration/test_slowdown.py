"""However a migration ends that has slowed its guest down, the guest is as fast as it can be."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import Checkpoint, Moment, install
from support.fake_machine import FakeMachine
from support.guests import check_runs_on, wait_for_rounds
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DirtylogError, UsageError
from dirtylog.machine import RunState
from dirtylog.memory import MemoryListener, MemoryRegionSection
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Slowdown,
    Status,
    parse_address,
)
from dirtylog.migration import governor as governor_module
from dirtylog.migration.protocol import Role

_SLOWDOWNS = [Slowdown.AUTO_CONVERGE, Slowdown.DIRTY_LIMIT]


class _Restless(MemoryListener):
    """Finds a page dirty at each sync, however fast the passes are."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        section.region.set_dirty(0, 1)


class Moving:
    """A migration of a guest that has been slowed down, as far as that can be, and does not converge."""

    def __init__(self, stack: ExitStack, directory: Path, slowdown: Slowdown) -> None:
        self.source, self.destination = FakeMachine(), FakeMachine()
        for machine in (self.source, self.destination):
            stack.callback(machine.memory.close)
            stack.callback(machine.close)
        self.source.can_limit = True
        self.source.boot()
        self.source.resume()
        wait_for_rounds(self.source)
        self.source.memory.register(_Restless(), self.source.system)
        listener = stack.enter_context(closing(Listener(parse_address(f"unix:{directory}/socket"))))
        self.incoming = IncomingMigration(self.destination, listener)
        self.arrival = Task(self.incoming.run)
        stack.callback(self.incoming.abort)
        parameters = Parameters(downtime_limit=0.0, slowdown=slowdown)
        self.outgoing = OutgoingMigration(self.source, listener.address, parameters)
        self.task = Task(self.outgoing.run)
        wait_until(lambda: self.source.throttled or self.source.limits, "the guest was slowed down")
        if slowdown is Slowdown.AUTO_CONVERGE:
            wait_until(lambda: self.outgoing.statistics.throttle == 99, "it was slowed down as far as can be")
            assert self.source.throttled == 0.99

    def converge(self) -> None:
        self.outgoing.parameters = replace(self.outgoing.parameters, downtime_limit=1.0)

    def check_free(self) -> None:
        assert self.source.throttled == 0
        assert [quota for quota, _ in self.source.limits[-1:]] in ([], [0])
        assert self.outgoing.statistics.throttle == 0
        assert self.outgoing.dirty_limits == ()


@pytest.fixture(params=_SLOWDOWNS, ids=lambda slowdown: slowdown.value)
def moving(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moving]:
    monkeypatch.setattr(governor_module, "PERIOD", 0.0)
    with ExitStack() as stack:
        yield Moving(stack, tmp_path, request.param)


def test_completed_migration_leaves_neither_side_slowed_down(moving: Moving) -> None:
    moving.converge()
    moving.task.join()
    moving.arrival.join()
    moving.check_free()
    check_runs_on(moving.destination)
    assert (moving.destination.throttled, moving.destination.limits) == (0, [])


def test_cancelled_migration_leaves_the_guest_free(moving: Moving) -> None:
    assert moving.outgoing.cancel()
    assert isinstance(moving.task.error(), CancelledError)
    moving.arrival.error()
    moving.check_free()
    check_runs_on(moving.source)


def test_guest_is_free_when_the_destination_is_gone(moving: Moving) -> None:
    moving.incoming.abort()
    assert isinstance(moving.task.error(), DirtylogError)
    moving.arrival.error()
    assert moving.outgoing.status is Status.FAILED
    moving.check_free()
    check_runs_on(moving.source)


@pytest.mark.parametrize("end", ["cancelled", "gone"])
@pytest.mark.parametrize("message", ["PassEnd", "State", "Handover"])
def test_guest_is_free_whatever_ends_the_switchover(
    moving: Moving, message: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        acts: dict[str, Callable[[], object]] = {"cancelled": moving.outgoing.cancel, "gone": moving.incoming.abort}
        acts[end]()

    install(Checkpoint(Role.SOURCE, Moment.BEFORE_SENDING, message), act, monkeypatch.setattr)
    moving.converge()
    error = moving.task.error()
    moving.arrival.error()  # however that ended
    moving.check_free()
    if error is None:  # it was too late
        assert moving.source.state is RunState.POSTMIGRATE
    elif moving.source.state is RunState.RUNNING:
        check_runs_on(moving.source)


def test_destination_is_not_asked_when_the_guest_cannot_be_slowed_down() -> None:
    machine = FakeMachine()
    with pytest.raises(UsageError, match="does not know which vCPU writes"):
        OutgoingMigration(machine, parse_address("unix:/nowhere"), Parameters(slowdown=Slowdown.DIRTY_LIMIT))
    machine.close()
    machine.memory.close()

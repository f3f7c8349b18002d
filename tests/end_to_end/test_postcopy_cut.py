"""Connections that are cut at each message of a migration whose guest runs before its memory is there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.checkpoints import POSTCOPY_DESTINATION, POSTCOPY_SOURCE, Checkpoint, install
from support.custody import Custody
from support.running import FIRST, LAST, RunningPC
from support.waiting import Task, wait_until

from dirtylog.guests.dirtier import COUNTER_ADDRESS, check_pages
from dirtylog.machine import KVMMachine, PCMachine, RunState, UnicornMachine
from dirtylog.machine.pc import RAM_NAME
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    letting_go,
    parse_address,
)
from dirtylog.units import MIB, PAGE_SIZE

_MACHINES: dict[str, Callable[..., PCMachine]] = {"kvm": KVMMachine, "unicorn": UnicornMachine}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _machine(stack: ExitStack, kind: str) -> RunningPC:
    running = RunningPC(_MACHINES[kind], 8 * MIB)
    stack.callback(running.machine.close)
    return running


def _migrate(
    stack: ExitStack, source: RunningPC, destination: RunningPC, uri: str
) -> tuple[OutgoingMigration, IncomingMigration, Task, Task]:
    """All of memory is owed."""
    listener = stack.enter_context(closing(Listener(parse_address(uri))))
    incoming = IncomingMigration(destination.machine, listener)
    outgoing = OutgoingMigration(source.machine, listener.address, Parameters(downtime_limit=0.0, postcopy=True))
    outgoing.start_postcopy()
    arriving, leaving = Task(incoming.run), Task(outgoing.run)
    for task in (arriving, leaving):
        stack.callback(task.error)
    stack.callback(incoming.abort)
    stack.callback(outgoing.close)
    return outgoing, incoming, leaving, arriving


def _check(running: RunningPC) -> None:
    """The guest runs there, and has lost nothing; it runs on."""
    running.wait_for_rounds()
    running.machine.pause()
    rounds = int.from_bytes(running.system.read(COUNTER_ADDRESS, 8), "little")
    assert check_pages(running.memory.blocks[RAM_NAME].array[FIRST:LAST:PAGE_SIZE], rounds) is None
    running.machine.resume()


@pytest.mark.parametrize("point", POSTCOPY_SOURCE + POSTCOPY_DESTINATION, ids=str)
@pytest.mark.parametrize("kind", _MACHINES)
def test_cut_connection_costs_nothing_and_leaves_one_owner(  # D1, M1, M2
    request: pytest.FixtureRequest,
    stack: ExitStack,
    kind: str,
    point: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "kvm":
        request.getfixturevalue("kvm")
    monkeypatch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)
    source, destination, third = (_machine(stack, kind) for _ in range(3))
    custody = Custody(source.machine, destination.machine, third.machine)
    source.boot_dirtier()
    source.machine.resume()
    source.wait_for_rounds()
    current: list[OutgoingMigration] = []
    with monkeypatch.context() as patch:
        install(point, lambda: current[0]._connections.cut(), patch.setattr)
        patch.setattr(OutgoingMigration, "run", _told(current, OutgoingMigration.run))
        outgoing, incoming, leaving, arriving = _migrate(stack, source, destination, f"unix:{tmp_path}/first")
        wait_until(
            lambda: (
                not leaving.running
                or (
                    outgoing.status is Status.POSTCOPY_PAUSED
                    and (incoming.status is Status.POSTCOPY_PAUSED or not arriving.running)
                )
            ),
            "the cut was noticed",
        )
    if leaving.running and arriving.running:
        listener = Listener(parse_address(f"unix:{tmp_path}/again"))
        incoming.recover(lambda: listener)
        outgoing.resume(listener.address)
        leaving.join()
        arriving.join()
    elif leaving.running:  # the source cannot know: the operator sees whether the destination has the guest, or failed
        assert outgoing.cancel()
        assert leaving.error() is not None
        if arriving.error() is not None:
            source.machine.resume()
    owner = source if source.machine.state is RunState.RUNNING else destination
    assert arriving.error() is None or owner is source
    _check(owner)
    _, _, leaving, arriving = _migrate(stack, owner, third, f"unix:{tmp_path}/second")
    leaving.join()
    arriving.join()
    _check(third)
    assert custody.most == 1


def _told(current: list[OutgoingMigration], run: Callable[[OutgoingMigration], None]) -> Callable[..., None]:
    """Have it known before it begins."""

    def told(outgoing: OutgoingMigration) -> None:
        current.append(outgoing)
        run(outgoing)

    return told

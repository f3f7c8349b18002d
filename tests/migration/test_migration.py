import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from support.checkpoints import (
    DESTINATION,
    SHARED_DESTINATION,
    SHARED_SOURCE,
    SIDE,
    SOURCE,
    Checkpoint,
    Moment,
    install,
)
from support.custody import Custody
from support.descriptors import few_descriptors
from support.economies import Fickle
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import check_memory, check_runs_on, rounds, same_memory, wait_for_rounds
from support.kvm import open_descriptors
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DirtylogError, ProtocolError, RefusedError, UsageError
from dirtylog.machine import RunState
from dirtylog.memory import Client, MemoryListener, MemoryRegionSection
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    letting_go,
    parse_address,
)
from dirtylog.migration import lanes as lanes_module
from dirtylog.migration.economy import Way
from dirtylog.migration.parameters import Compression
from dirtylog.migration.protocol import Role
from dirtylog.migration.statistics import ENDED
from dirtylog.trackers import KVMLogMode

_NEVER = Parameters(downtime_limit=0.0)
"""Memory that is still written is not switched over with these."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _machine(
    stack: ExitStack, *, mode: KVMLogMode = KVMLogMode.MANUAL, ram_pages: int = RAM_PAGES, running: bool = False
) -> FakeMachine:
    made = FakeMachine(ram_pages, mode=mode)
    stack.callback(made.memory.close)
    stack.callback(made.close)
    if running:
        made.boot()
        made.resume()
        wait_for_rounds(made)
    return made


@contextmanager
def _arrival(machine: FakeMachine, uri: str) -> Iterator[tuple[Task, str]]:
    """An incoming migration, and the URI where it waits."""
    with closing(Listener(parse_address(uri))) as listener:
        task = Task(IncomingMigration(machine, listener).run)
        try:
            yield task, str(listener.address)
        finally:
            listener.abort()
            task.error()


def _migrate(
    source: FakeMachine, destination: FakeMachine, uri: str, parameters: Parameters | None = None
) -> OutgoingMigration:
    custody = Custody(source, destination)
    with _arrival(destination, uri) as (task, address):
        outgoing = OutgoingMigration(source, parse_address(address), parameters or Parameters())
        outgoing.run()
        task.join()
    assert custody.most <= 1  # M1
    assert source.state is RunState.POSTMIGRATE
    return outgoing


@pytest.fixture(params=["unix", "tcp"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/socket" if request.param == "unix" else "tcp:127.0.0.1:0"


@pytest.fixture
def unix(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/socket"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = ("channel", "side-channel", "prepare")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(names)] == []


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("mode", KVMLogMode, ids=lambda mode: mode.value)
def test_running_guest_moves_and_runs_on(stack: ExitStack, uri: str, mode: KVMLogMode, verify: bool) -> None:
    source, destination = _machine(stack, mode=mode, running=True), _machine(stack, mode=mode)
    outgoing = _migrate(source, destination, uri, Parameters(verify=verify))
    assert outgoing.status is Status.COMPLETED
    assert bool(outgoing.statistics.digests) is verify
    assert rounds(destination) >= rounds(source)
    check_memory(source)
    check_runs_on(destination)


class _Fickle(Fickle):
    """Fickle in all that it is allowed."""

    def __init__(self, ways: tuple[Way, ...]) -> None:
        super().__init__(ways, next(_SEEDS))


_SEEDS = count()
_MANY = Parameters(channels=3, compression=Compression.AUTO, delta_cache=20 * 4096, verify=True)
"""All at once; the cache is too small for all pages."""


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory so small is always sent plain: here any way is taken."""
    monkeypatch.setattr(lanes_module, "Economy", _Fickle)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("delta_cache", [0, 4096, 1 << 20])
@pytest.mark.parametrize("compression", Compression)
@pytest.mark.usefixtures("fickle")
def test_guest_loses_nothing_whatever_way_its_memory_takes(
    stack: ExitStack, unix: str, channels: int, compression: Compression, delta_cache: int
) -> None:
    parameters = Parameters(
        downtime_limit=0.0, verify=True, channels=channels, compression=compression, delta_cache=delta_cache
    )
    endless = _Endless(stack, unix, parameters)
    wait_until(lambda: len(endless.outgoing.statistics.passes) > 8, "some more passes were sent")
    endless.outgoing.parameters = replace(parameters, downtime_limit=1.0)
    endless.task.join()
    endless.arrival.join()
    assert endless.custody.most == 1  # M1
    statistics = endless.outgoing.statistics
    ways = {Way.PLAIN, *(_COMPRESSED if compression is Compression.AUTO else ()), *([Way.DELTA] if delta_cache else ())}
    assert statistics.ways.keys() <= ways
    assert sum(pages for pages, _ in statistics.ways.values()) == statistics.pages
    assert endless.outgoing.agreed.channels == channels
    check_runs_on(endless.destination)


_COMPRESSED = (Way.FAST, Way.THOROUGH)


@pytest.mark.usefixtures("fickle")
def test_guest_moves_on_and_back_in_all_ways_at_once(stack: ExitStack, unix: str) -> None:
    there = _machine(stack, running=True)
    for _ in range(5):
        here = _machine(stack)
        _migrate(there, here, unix, _MANY)
        check_runs_on(here)
        there = here


@pytest.mark.usefixtures("fickle")
def test_next_migration_knows_nothing_of_what_the_last_destination_had(stack: ExitStack, unix: str) -> None:  # D7
    endless = _Endless(stack, unix, replace(_MANY, downtime_limit=0.0))
    assert endless.outgoing.cancel()
    assert isinstance(endless.task.error(), CancelledError)
    destination = _machine(stack)
    for block in destination.memory.blocks.values():
        block.array[:] = 0xEE
    endless.arrival.error()
    _migrate(endless.source, destination, unix, _MANY)
    check_runs_on(destination)


def test_paused_guest_moves_byte_for_byte_and_stays_paused(stack: ExitStack, uri: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    for block in destination.memory.blocks.values():
        block.array[:] = 0xEE
    source.pause()
    _migrate(source, destination, uri)
    assert destination.state is RunState.PAUSED
    assert same_memory(source, destination)
    check_memory(destination)
    destination.resume()
    check_runs_on(destination)


def test_guest_that_was_not_started_yet_can_be_moved(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack), _machine(stack)
    source.boot()
    _migrate(source, destination, unix)
    assert destination.state is RunState.PAUSED
    assert same_memory(source, destination)


def test_guest_moves_on_and_back_between_machines_with_different_logs(stack: ExitStack, unix: str) -> None:
    there = _machine(stack, mode=KVMLogMode.LEGACY, running=True)
    for mode in (KVMLogMode.INITIALLY_SET, KVMLogMode.MANUAL, KVMLogMode.LEGACY):
        here = _machine(stack, mode=mode)
        _migrate(there, here, unix, Parameters(verify=True))
        check_runs_on(here)
        there = here


def test_guest_that_was_taken_back_can_be_moved_again(stack: ExitStack, unix: str) -> None:
    source = _machine(stack, running=True)
    _migrate(source, _machine(stack), unix)
    source.resume()
    destination = _machine(stack)
    _migrate(source, destination, unix, Parameters(verify=True))
    check_runs_on(destination)


def test_migration_costs_other_clients_no_page(stack: ExitStack, unix: str) -> None:  # D4
    source, destination = _machine(stack, running=True), _machine(stack)
    region = source.memory.ram_regions[0]
    region.start_logging_display()
    region.snapshot_and_clear_dirty(0, region.size, Client.DISPLAY)
    wait_for_rounds(source)
    _migrate(source, destination, unix)
    assert region.snapshot_and_clear_dirty(0, region.size, Client.DISPLAY).is_dirty(16 * 4096, 32 * 4096)
    region.stop_logging_display()


@pytest.mark.parametrize("clear_chunk", [1, 256 << 10, 1 << 40])
def test_any_clear_chunk_loses_nothing(stack: ExitStack, unix: str, clear_chunk: int) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    _migrate(source, destination, unix, Parameters(clear_chunk=clear_chunk, verify=True))
    check_runs_on(destination)


def test_machines_with_different_memory_do_not_migrate(stack: ExitStack, unix: str) -> None:  # M2, M6
    source, destination = _machine(stack, running=True), _machine(stack, ram_pages=RAM_PAGES * 2)
    with _arrival(destination, unix) as (task, address):
        outgoing = OutgoingMigration(source, parse_address(address), Parameters())
        with pytest.raises(RefusedError, match=r"the destination gave up: the source's memory is ram of 320\.0 KiB"):
            outgoing.run()
        assert task.running  # M10
    assert destination.state is RunState.INMIGRATE
    check_runs_on(source)


def test_two_migrations_in_one_process_do_not_meet(stack: ExitStack, tmp_path: Path) -> None:
    pairs = [(_machine(stack, running=True), _machine(stack)) for _ in range(2)]
    tasks = [
        Task(partial(_migrate, source, destination, f"unix:{tmp_path}/{n}", Parameters(verify=True)))
        for n, (source, destination) in enumerate(pairs)
    ]
    for task in tasks:
        task.join()
    for _, destination in pairs:
        check_runs_on(destination)


def test_machine_is_in_the_migrations_hands_while_it_is_switched_over(
    stack: ExitStack, unix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    refused: list[str] = []

    def meddle() -> None:
        for method in (source.resume, source.pause, destination.resume, destination.pause):
            with pytest.raises(UsageError, match="in the hands of a migration") as caught:
                method()
            refused.append(caught.value.cause)

    install(SOURCE[-2], meddle, monkeypatch.setattr)
    assert str(SOURCE[-2]) == "source:after-receiving:Ready"
    _migrate(source, destination, unix)
    assert len(refused) == 4
    check_runs_on(destination)


class _Restless(MemoryListener):
    """Somebody in the host who writes a page whenever it is asked what was written."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        section.region.set_dirty(section.offset_within_region, 1)


class _Endless:
    """A migration that does not converge until its parameters change, or it is cancelled."""

    def __init__(self, stack: ExitStack, uri: str, parameters: Parameters = _NEVER) -> None:
        self.source, self.destination = _machine(stack, running=True), _machine(stack)
        self.source.memory.register(_Restless(), self.source.system)
        self.custody = Custody(self.source, self.destination)
        self.arrival, address = stack.enter_context(_arrival(self.destination, uri))
        self.statuses: list[Status] = []
        self.outgoing = OutgoingMigration(self.source, parse_address(address), parameters, observe=self.statuses.append)
        self.task = Task(self.outgoing.run)
        wait_until(lambda: len(self.outgoing.statistics.passes) > 2, "some passes were sent")


def test_new_downtime_limit_holds_at_once(stack: ExitStack, unix: str) -> None:
    endless = _Endless(stack, unix)
    assert endless.outgoing.status is Status.ACTIVE
    endless.outgoing.parameters = Parameters()
    endless.task.join()
    endless.arrival.join()
    assert endless.statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert endless.custody.most == 1
    check_runs_on(endless.destination)


def test_what_was_agreed_on_at_the_start_cannot_be_changed_later(stack: ExitStack, unix: str) -> None:
    endless = _Endless(stack, unix)
    endless.outgoing.parameters = Parameters(verify=True, clear_chunk=1)
    endless.task.join()
    endless.arrival.join()
    assert endless.outgoing.statistics.digests == {}
    check_runs_on(endless.destination)


def test_bandwidth_limit_slows_the_passes_down_but_not_the_last(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    rate = 4 << 20
    outgoing = _migrate(source, destination, unix, Parameters(max_bandwidth=rate))
    passes = outgoing.statistics.passes
    assert passes[0].bytes / passes[0].seconds <= rate * 1.01
    assert outgoing.elapsed >= passes[0].bytes / rate
    assert passes[-1].bytes / passes[-1].seconds > rate


def test_cancelled_migration_leaves_the_guest_running(stack: ExitStack, uri: str) -> None:  # M2
    endless = _Endless(stack, uri)
    assert endless.outgoing.cancel()
    assert isinstance(endless.task.error(), CancelledError)
    assert isinstance(endless.outgoing.error, CancelledError)
    assert endless.statuses == [Status.SETUP, Status.ACTIVE, Status.CANCELLING, Status.CANCELLED]
    assert endless.arrival.error() is not None
    assert endless.custody.states[endless.destination] == [RunState.INMIGRATE]  # M6
    assert not endless.outgoing.cancel()
    check_runs_on(endless.source)


def test_migration_cancelled_while_it_waits_for_bandwidth_ends_at_once(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    with _arrival(destination, unix) as (_, address):
        outgoing = OutgoingMigration(source, parse_address(address), Parameters(max_bandwidth=1))
        task = Task(outgoing.run)
        wait_until(lambda: outgoing.statistics.bytes, "something was sent")
        outgoing.cancel()
        assert isinstance(task.error(), CancelledError)
    assert outgoing.elapsed < 20
    check_runs_on(source)


def test_migration_cancelled_before_it_began_does_nothing(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    with _arrival(destination, unix) as (_, address):
        outgoing = OutgoingMigration(source, parse_address(address), Parameters())
        assert outgoing.cancel()
        with pytest.raises(CancelledError):
            outgoing.run()
    assert outgoing.status is Status.CANCELLED
    assert outgoing.statistics.passes == []
    assert destination.state is RunState.INMIGRATE
    check_runs_on(source)


_SHARED = Parameters(share_memory=True, verify=True)


def _is_empty(machine: FakeMachine) -> bool:
    return not any(block.array.any() for block in machine.memory.blocks.values())


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("mode", KVMLogMode, ids=lambda mode: mode.value)
def test_running_guest_moves_with_its_memory_and_runs_on(
    stack: ExitStack, unix: str, mode: KVMLogMode, verify: bool
) -> None:
    source, destination = _machine(stack, mode=mode, running=True), _machine(stack, mode=mode)
    for block in destination.memory.blocks.values():
        block.array[:] = 0xEE
    before = rounds(source)
    outgoing = _migrate(source, destination, unix, Parameters(share_memory=True, verify=verify))
    assert outgoing.status is Status.COMPLETED
    assert bool(outgoing.statistics.digests) is verify
    assert rounds(destination) >= before
    assert _is_empty(source)
    check_runs_on(destination)


def test_shared_memory_is_that_of_the_destination_only_and_nothing_was_copied(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    source.pause()
    contents = {name: block.array.copy() for name, block in source.memory.blocks.items()}
    places = {name: block.mapping.address for name, block in destination.memory.blocks.items()}
    arrays = {name: block.array for name, block in destination.memory.blocks.items()}
    outgoing = _migrate(source, destination, unix, _SHARED)
    assert destination.state is RunState.PAUSED
    for name, block in destination.memory.blocks.items():
        assert block.mapping.address == places[name]
        assert (arrays[name] == contents[name]).all()
    arrays["ram"][:] = 7
    assert _is_empty(source)
    source.memory.blocks["ram"].array[:] = 8
    assert arrays["ram"].min() == arrays["ram"].max() == 7
    statistics = outgoing.statistics
    assert (statistics.passes, statistics.bytes, statistics.downtime_bytes) == ([], 0, 0)
    assert 0 < statistics.downtime < statistics.total_seconds
    parts = statistics.downtime_parts
    assert parts is not None
    assert statistics.downtime == pytest.approx(parts.stop + parts.final_pass + parts.state + parts.handover)


def test_statuses_of_a_migration_with_shared_memory(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    statuses: list[Status] = []
    passes: list[int] = []
    with _arrival(destination, unix) as (task, address):
        OutgoingMigration(
            source, parse_address(address), _SHARED, observe=statuses.append, observe_pass=passes.append
        ).run()
        task.join()
    assert statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert passes == []


def test_guest_moves_on_and_back_with_its_memory_and_no_descriptor_is_left(stack: ExitStack, unix: str) -> None:
    there = _machine(stack, running=True)
    for turn in range(6):
        here = _machine(stack)
        before = open_descriptors()
        _migrate(there, here, unix, (_SHARED, Parameters(verify=True))[turn % 3 == 2])
        assert len(open_descriptors()) == len(before)
        check_runs_on(here)
        there = here


@pytest.mark.parametrize("parameters", [_SHARED, Parameters(verify=True)], ids=["shared", "copied"])
def test_guest_whose_memory_was_shared_loses_no_write_afterwards(  # D1
    stack: ExitStack, unix: str, parameters: Parameters
) -> None:
    first, second, third = _machine(stack, running=True), _machine(stack), _machine(stack)
    region = second.memory.ram_regions[0]
    region.start_logging_display()
    _migrate(first, second, unix, _SHARED)
    region.snapshot_and_clear_dirty(0, region.size, Client.DISPLAY)
    wait_for_rounds(second, 2)
    assert region.snapshot_and_clear_dirty(0, region.size, Client.DISPLAY).is_dirty(16 * 4096, 32 * 4096)
    _migrate(second, third, unix, parameters)
    check_runs_on(third)
    region.stop_logging_display()


def test_source_has_let_go_of_shared_memory_before_it_can_run_again(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    empty: list[bool] = []
    source.observers.append(lambda _, new: empty.append(_is_empty(source)) if new is RunState.POSTMIGRATE else None)
    _migrate(source, destination, unix, _SHARED)
    assert empty == [True]


def test_descriptors_that_the_destination_may_not_open_leave_the_guest_where_it_was(  # M2
    stack: ExitStack, unix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)
    with _arrival(destination, unix) as (task, address):
        outgoing = OutgoingMigration(source, parse_address(address), _SHARED)
        with monkeypatch.context() as patch:
            point = Checkpoint(Role.DESTINATION, Moment.AFTER_RECEIVING, "Shared")
            install(point, lambda: stack.enter_context(few_descriptors(1)), patch.setattr)
            with pytest.raises(RefusedError, match="the source announced 2 files, and sent 1"):
                outgoing.run()
            assert isinstance(task.error(), ProtocolError)
    assert (destination.state, _is_empty(destination)) == (RunState.INMIGRATE, True)
    check_runs_on(source)


def test_guest_that_has_started_keeps_its_shared_memory_whatever_fails_then(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, running=True), _machine(stack)

    def fail(_: RunState, new: RunState) -> None:
        if new is RunState.RUNNING:
            raise OSError

    destination.observers.append(fail)
    with _arrival(destination, unix) as (task, address):
        OutgoingMigration(source, parse_address(address), _SHARED).run()
        assert isinstance(task.error(), OSError)
    destination.observers.remove(fail)
    check_runs_on(destination)


def test_network_address_and_several_channels_are_refused_at_once(stack: ExitStack, unix: str) -> None:
    source = _machine(stack, running=True)
    for uri, parameters in (("tcp:127.0.0.1:1", _SHARED), (unix, replace(_SHARED, channels=2))):
        with pytest.raises(UsageError, match="memory"):
            OutgoingMigration(source, parse_address(uri), parameters)
    check_runs_on(source)


def test_memory_cannot_be_shared_when_it_was_not_agreed_on_at_the_start(stack: ExitStack, unix: str) -> None:
    endless = _Endless(stack, unix)
    endless.outgoing.parameters = _SHARED
    endless.task.join()
    endless.arrival.join()
    assert endless.outgoing.statistics.bytes > 0
    check_memory(endless.source)
    check_runs_on(endless.destination)


def test_finished_migration_cannot_be_cancelled(stack: ExitStack, unix: str) -> None:
    outgoing = _migrate(_machine(stack, running=True), _machine(stack), unix)
    assert not outgoing.cancel()
    assert outgoing.status is Status.COMPLETED


_WHOLE = [point for point in SOURCE + DESTINATION if point.moment is not Moment.WITHIN]
_CANCELLED = [(point, Parameters(verify=True)) for point in _WHOLE]
_CANCELLED += [(point, _SHARED) for point in SHARED_SOURCE + SHARED_DESTINATION if point.moment is not Moment.WITHIN]
_CANCELLED += [(point, _MANY) for point in (*_WHOLE, *SIDE) if point.moment is not Moment.WITHIN]


@pytest.mark.parametrize(
    ("point", "parameters"),
    _CANCELLED,
    ids=[f"{point}-{'shared' if parameters.share_memory else parameters.channels}" for point, parameters in _CANCELLED],
)
def test_cancel_at_any_moment_leaves_the_guest_with_one_owner(  # M1, M2
    stack: ExitStack, unix: str, point: Checkpoint, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)
    source, destination = _machine(stack, running=True), _machine(stack)
    custody = Custody(source, destination)
    agreed: list[bool] = []
    with monkeypatch.context() as patch, _arrival(destination, unix) as (arrival, address):
        outgoing = OutgoingMigration(source, parse_address(address), parameters)
        install(point, lambda: agreed.append(outgoing.cancel()), patch.setattr)
        error = Task(outgoing.run).error()
    arrived = arrival.error()  # a source that had not greeted by then was no source, and the next was waited for
    assert outgoing.status in ENDED
    if agreed[0]:
        assert isinstance(error, CancelledError)
        assert outgoing.status is Status.CANCELLED
        assert isinstance(arrived, DirtylogError)
        assert destination.state is RunState.INMIGRATE
        if parameters.share_memory:
            assert _is_empty(destination)
        check_runs_on(source)
        _migrate(source, _machine(stack), unix, parameters)
    else:
        assert error is None
        assert arrived is None
        assert source.state is RunState.POSTMIGRATE
        check_runs_on(destination)
    assert custody.most == 1
    handed_over = ("Handover", "Taken")
    if point.message in handed_over or str(point) == "destination:after-sending:Ready":
        return  # from the moment when the source lets go, and not before, cancelling is refused
    assert agreed == [True]


def test_memory_the_size_of_many_batches_moves_whole(stack: ExitStack, unix: str) -> None:
    source, destination = _machine(stack, ram_pages=9000), _machine(stack, ram_pages=9000)
    source.boot()
    array = source.memory.blocks["ram"].array
    array[100 * 4096 :: 3 * 4096] = 9
    array[5000 * 4096 : 8000 * 4096] = 7
    outgoing = _migrate(source, destination, unix, replace(Parameters(), verify=True))
    assert same_memory(source, destination)
    assert outgoing.statistics.passes[0].pages + outgoing.statistics.passes[0].zero_pages == 9000 + ROM_PAGES

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.custody import Custody
from support.fake_machine import FakeMachine
from support.guests import check_memory, check_runs_on, wait_for_rounds
from support.waiting import BOUND, Task, wait_until

from dirtylog.control import controller as controller_module
from dirtylog.control.controller import Controller, ShutdownCause
from dirtylog.control.settings import Capability
from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, GuestError, HostError, UsageError
from dirtylog.machine import RunState
from dirtylog.memory import Memory
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Status, connect, parse_address, sharing
from dirtylog.migration.agreement import block_infos
from dirtylog.migration.messages import Hello, Welcome
from dirtylog.units import MIB


@contextmanager
def _controlled(*, boot: bool = True) -> Iterator[Controller]:
    machine = FakeMachine()
    if boot:
        machine.boot()
    controller = Controller(machine)
    try:
        yield controller
    finally:
        controller.close()
        machine.memory.close()


@pytest.fixture
def controller() -> Iterator[Controller]:
    with _controlled() as controlled:
        yield controlled


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/migration"


@pytest.fixture
def silent(uri: str) -> Iterator[Listener]:
    """Whoever connects to it waits, for it never answers."""
    listener = Listener(parse_address(uri))
    yield listener
    listener.close()


@contextmanager
def _receiver(uri: str) -> Iterator[Controller]:
    listener = Listener(parse_address(uri))
    try:
        with _controlled(boot=False) as receiver:
            receiver.receive(listener)
            yield receiver
    finally:
        listener.close()


def _outgoing(controller: Controller) -> OutgoingMigration:
    assert controller.outgoing is not None
    return controller.outgoing


def _wait_ended(controller: Controller) -> OutgoingMigration:
    outgoing = _outgoing(controller)
    wait_until(lambda: outgoing.ended, "the migration ended")
    return outgoing


def _causes(controller: Controller) -> list[ShutdownCause]:
    causes: list[ShutdownCause] = []
    controller.shutdown_observers.append(causes.append)
    return causes


class TestWait:
    @pytest.mark.parametrize("cause", [ShutdownCause.HOST_QMP_QUIT, ShutdownCause.HOST_SIGNAL])
    def test_quit_ends_it_and_the_cause_is_told(self, controller: Controller, cause: ShutdownCause) -> None:
        causes = _causes(controller)
        waiting = Task(controller.wait)
        controller.quit(cause)
        waiting.join()
        assert causes == [cause]
        assert not cause.by_guest

    def test_quit_from_a_signals_handler_ends_it(self, controller: Controller) -> None:
        previous = signal.signal(signal.SIGUSR1, lambda *_: controller.quit(ShutdownCause.HOST_SIGNAL))
        try:
            signal.raise_signal(signal.SIGUSR1)
            controller.wait()
        finally:
            signal.signal(signal.SIGUSR1, previous)

    def test_failure_is_raised(self, controller: Controller) -> None:
        causes = _causes(controller)
        controller.fail(HostError("no more disks"))
        with pytest.raises(HostError, match="no more disks"):
            controller.wait()
        assert causes == [ShutdownCause.HOST_ERROR]

    @pytest.mark.parametrize(
        ("state", "cause"),
        [
            (RunState.SHUTDOWN, ShutdownCause.GUEST_SHUTDOWN),
            (RunState.INTERNAL_ERROR, ShutdownCause.HOST_ERROR),
        ],
    )
    def test_end_of_the_guest_is_raised(self, controller: Controller, state: RunState, cause: ShutdownCause) -> None:
        causes = _causes(controller)
        controller.machine._end(state, GuestError("a triple fault"))
        with pytest.raises(GuestError, match="a triple fault"):
            controller.wait()
        assert causes == [cause]
        assert cause.by_guest is (state is RunState.SHUTDOWN)

    def test_what_came_first_counts(self, controller: Controller) -> None:
        controller.quit(ShutdownCause.HOST_SIGNAL)
        controller.fail(HostError("too late"))
        controller.wait()


class TestMigrate:
    def test_guest_moves_and_runs_on(self, controller: Controller, uri: str) -> None:
        with _receiver(uri) as receiver:
            custody = Custody(controller.machine, receiver.machine)
            statuses: list[Status] = []
            controller.migration_observers.append(statuses.append)
            controller.machine.resume()
            controller.migrate(uri)
            assert _wait_ended(controller).error is None
            wait_until(lambda: receiver.machine.state is RunState.RUNNING, "the guest runs there")
            assert custody.most == 1
            assert statuses == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
            assert isinstance(receiver.machine, FakeMachine)
            check_runs_on(receiver.machine)

    def test_it_has_its_first_status_at_once(self, controller: Controller, silent: Listener, uri: str) -> None:
        statuses: list[Status] = []
        controller.migration_observers.append(statuses.append)
        controller.migrate(uri)
        assert statuses == [Status.SETUP]
        assert 0 <= _outgoing(controller).elapsed < BOUND

    @pytest.mark.parametrize("bad", ["", "unix:", "tcp:host", "exec:cat", "unix:" + "x" * 200])
    def test_bad_address_is_refused(self, controller: Controller, bad: str) -> None:
        with pytest.raises(UsageError):
            controller.migrate(bad)
        assert controller.outgoing is None

    def test_nobody_listening_fails_it_and_the_guest_runs_on(self, controller: Controller, uri: str) -> None:
        controller.machine.resume()
        controller.migrate(uri)
        outgoing = _wait_ended(controller)
        assert outgoing.status is Status.FAILED
        assert isinstance(outgoing.error, DisconnectedError)
        assert isinstance(controller.machine, FakeMachine)
        check_runs_on(controller.machine)

    def test_second_one_is_refused_while_the_first_is_under_way(
        self, controller: Controller, silent: Listener, uri: str
    ) -> None:
        controller.migrate(uri)
        first = controller.outgoing
        with pytest.raises(UsageError, match="a migration is under way; wait for it, or cancel it"):
            controller.migrate(uri)
        assert controller.outgoing is first

    def test_cancel_leaves_the_guest_and_another_one_works(self, controller: Controller, uri: str) -> None:
        controller.machine.resume()
        listener = Listener(parse_address(uri))
        try:
            controller.migrate(uri)
            controller.cancel_migration()
            assert _wait_ended(controller).status is Status.CANCELLED
            assert isinstance(_outgoing(controller).error, CancelledError)
        finally:
            listener.close()
        assert isinstance(controller.machine, FakeMachine)
        wait_for_rounds(controller.machine)
        with _receiver(uri) as receiver:
            controller.migrate(uri)
            assert _wait_ended(controller).status is Status.COMPLETED
            wait_until(lambda: receiver.machine.state is RunState.RUNNING, "the guest runs there")
        check_memory(controller.machine)

    def test_cancel_without_a_migration_does_nothing(self, controller: Controller) -> None:
        controller.cancel_migration()
        assert controller.outgoing is None

    def test_guest_that_was_migrated_away_is_refused(self, controller: Controller, uri: str) -> None:
        with _receiver(uri):
            controller.migrate(uri)
            _wait_ended(controller)
            with pytest.raises(UsageError, match="migrated away already"):
                controller.migrate(uri)

    def test_guest_whose_memory_is_still_let_go_of_is_refused(
        self, controller: Controller, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, let_go = threading.Event(), sharing.let_go

        def wait_and_let_go(memory: Memory) -> None:
            assert gate.wait(BOUND)
            let_go(memory)

        monkeypatch.setattr(sharing, "let_go", wait_and_let_go)
        controller.change_parameters(share_memory=True)
        with _receiver(uri):
            controller.migrate(uri)
            assert _wait_ended(controller).status is Status.COMPLETED
            assert controller.machine.state is RunState.FINISH_MIGRATE
            with pytest.raises(UsageError, match="migrated away already"):
                controller.migrate(uri)
            gate.set()
            wait_until(lambda: controller.machine.state is RunState.POSTMIGRATE, "the memory was let go of")

    def test_guest_that_has_not_arrived_is_refused(self, uri: str) -> None:
        with _receiver(uri) as receiver, pytest.raises(UsageError, match="has not arrived here yet"):
            receiver.migrate(uri)

    def test_guest_that_has_ended_is_refused(self, controller: Controller, uri: str) -> None:
        controller.machine._end(RunState.SHUTDOWN, GuestError("a triple fault"))
        with pytest.raises(UsageError, match=r"the guest has ended \(shutdown\)"):
            controller.migrate(uri)

    def test_ended_threads_are_not_kept(self, controller: Controller, uri: str) -> None:
        for _ in range(5):
            controller.migrate(uri)
            _wait_ended(controller)
            wait_until(lambda: not _threads("migration"), "the thread ended")
        assert len(controller._threads) == 1


class TestParameters:
    def test_change_reaches_the_migration_under_way_and_later_ones(
        self, controller: Controller, silent: Listener, uri: str
    ) -> None:
        controller.change_parameters(max_bandwidth=1000)
        controller.migrate(uri)
        assert _outgoing(controller).parameters.max_bandwidth == 1000
        controller.change_parameters(downtime_limit=1.5)
        parameters = controller.settings.effective
        assert _outgoing(controller).parameters == parameters
        assert (parameters.downtime_limit, parameters.max_bandwidth) == (1.5, 1000)

    def test_bad_value_changes_nothing(self, controller: Controller) -> None:
        before = controller.settings
        with pytest.raises(UsageError, match="a downtime limit of -1 s"):
            controller.change_parameters(max_bandwidth=5, downtime_limit=-1)
        assert controller.settings is before

    def test_what_comes_too_late_for_the_migration_under_way_is_refused(
        self, controller: Controller, silent: Listener, uri: str
    ) -> None:
        controller.migrate(uri)
        before = controller.settings
        with pytest.raises(UsageError, match="the verify of a migration that is under way cannot be changed"):
            controller.change_parameters(downtime_limit=1.5, verify=True)
        assert controller.settings is before
        controller.change_parameters(verify=False, delta_cache=MIB)  # no change, and none that counts now
        controller.cancel_migration()
        _wait_ended(controller)
        controller.change_parameters(verify=True)
        assert controller.settings.effective.verify

    def test_capabilities_are_refused_while_a_migration_is_under_way(
        self, controller: Controller, silent: Listener, uri: str
    ) -> None:
        controller.change_capabilities({Capability.MULTIFD: True, Capability.EVENTS: True})
        controller.change_capabilities({Capability.MULTIFD: False, Capability.XBZRLE: False})
        assert controller.settings.capabilities == {Capability.EVENTS}
        controller.migrate(uri)
        with pytest.raises(UsageError, match="a migration is under way"):
            controller.change_capabilities({Capability.EVENTS: False})
        assert controller.settings.capabilities == {Capability.EVENTS}


class TestReceive:
    def test_source_of_another_size_is_told_and_the_next_is_waited_for(self, uri: str) -> None:
        big = FakeMachine(ram_pages=160)
        source = Controller(big)
        try:
            with _receiver(uri) as receiver:
                source.migrate(uri)
                _wait_ended(source)
                assert "the source's memory is" in str(_outgoing(source).error)
                assert _threads("incoming-migration")
                assert receiver.machine.state is RunState.INMIGRATE
        finally:
            source.close()
            big.memory.close()

    def test_source_that_goes_away_ends_it(self, uri: str) -> None:
        with _receiver(uri) as receiver, connect(parse_address(uri)) as source:
            source.send(Hello("fake", block_infos(receiver.machine), False, 1, bytes(16), False, False))
            source.expect(Welcome)
            source.close()
            with pytest.raises(DisconnectedError, match="is not started here"):
                receiver.wait()

    def test_defect_ends_it_with_its_cause(self, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(migration: IncomingMigration) -> None:
            raise ZeroDivisionError("division by zero")

        monkeypatch.setattr(IncomingMigration, "run", fail)
        with _receiver(uri) as receiver, pytest.raises(DirtylogError, match="a defect in dirtylog") as caught:
            receiver.wait()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class TestClose:
    def test_it_ends_a_migration_under_way(self, controller: Controller, silent: Listener, uri: str) -> None:
        controller.migrate(uri)
        controller.close()
        assert _outgoing(controller).status is Status.CANCELLED
        assert not _threads("migration")

    def test_it_ends_waiting_for_a_guest(self, uri: str) -> None:
        with _receiver(uri) as receiver:
            assert _threads("incoming-migration")
            receiver.close()
            assert not _threads("incoming-migration")

    def test_twice_is_fine(self, controller: Controller) -> None:
        controller.close()
        controller.close()

    def test_thread_that_does_not_end_is_reported(
        self, controller: Controller, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = threading.Event()
        monkeypatch.setattr(OutgoingMigration, "run", _run_that_waits_for(release))
        monkeypatch.setattr(controller_module, "_JOIN_TIMEOUT", 0.01)
        controller.migrate(uri)
        try:
            with pytest.raises(HostError, match="migration did not end within"):
                controller.close()
        finally:
            release.set()
            wait_until(lambda: not _threads("migration"), "the thread ended")


def _run_that_waits_for(release: threading.Event) -> Callable[[OutgoingMigration], None]:
    def run(migration: OutgoingMigration) -> None:
        migration._enter(Status.SETUP)
        assert release.wait(BOUND)

    return run


def _threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]

"""One machine in the hands of its operators: its migrations, and how it ends."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from queue import SimpleQueue
from typing import Any, Final

from dirtylog.control.settings import Capability, Settings
from dirtylog.display import DirtyRateMeter, WriteSampler
from dirtylog.errors import DirtylogError, HostError, UsageError
from dirtylog.machine import Machine, RunState
from dirtylog.machine.machine import ENDED
from dirtylog.migration import (
    IncomingFile,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Role,
    Status,
    credentials_for,
    parse_address,
)

_JOIN_TIMEOUT: Final = 15.0


class ShutdownCause(Enum):
    """Why a machine ends, in QEMU's words."""

    HOST_ERROR = "host-error"
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"
    GUEST_SHUTDOWN = "guest-shutdown"

    @property
    def by_guest(self) -> bool:
        """Whether the guest itself did it."""
        return self is ShutdownCause.GUEST_SHUTDOWN


class Controller:
    """What may be done to a machine, whoever asks: a person, QMP, a signal. Owns the machine.

    Attributes:
        machine: what it controls.
        sampler: tells which pages it writes.
        rate_meter: tells how fast it writes.
        settings: of the migration under way and of later ones.
        outgoing: the last migration away from here, or None.
        incoming: the migration that brings the machine here, or brought it, or None.
        migration_observers: told each new status of a migration away from here, or to here.
        pass_observers: told the number of each pass of one.
        shutdown_observers: told by `wait` why it returns.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.sampler = WriteSampler(machine.memory)
        self.rate_meter = DirtyRateMeter(machine, self.sampler)
        self.settings = Settings()
        self.outgoing: OutgoingMigration | None = None
        self.migration_observers: list[Callable[[Status], None]] = []
        self.pass_observers: list[Callable[[int], None]] = []
        self.shutdown_observers: list[Callable[[ShutdownCause], None]] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.incoming: IncomingMigration | IncomingFile | None = None
        self._endings: SimpleQueue[tuple[ShutdownCause, DirtylogError | None]] = SimpleQueue()
        machine.observers.append(self._machine_changed)

    def quit(self, cause: ShutdownCause) -> None:
        """Have `wait` return. May be called from any thread."""
        self._endings.put((cause, None))

    def fail(self, error: DirtylogError) -> None:
        """Have `wait` raise an error."""
        self._endings.put((ShutdownCause.HOST_ERROR, error))

    def wait(self) -> None:
        """Wait until somebody quits, or the machine cannot go on.

        Raises:
            DirtylogError: why it cannot.
        """
        cause, error = self._endings.get()
        for observer in tuple(self.shutdown_observers):
            observer(cause)
        if error is not None:
            raise error

    def close(self) -> None:
        """Cancel migrations, end the machine, give its memory up; idempotent."""
        if self.outgoing is not None:
            self.outgoing.close()
        if self.incoming is not None:
            self.incoming.abort()
        try:
            for thread in self._threads:
                thread.join(_JOIN_TIMEOUT)
                if thread.is_alive():
                    raise HostError(f"{thread.name} did not end within {_JOIN_TIMEOUT:.0f} s")
            self.rate_meter.close()
        finally:
            self.machine.close()

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Begin to migrate the machine away, or go on with that. It has its first status when this returns.

        Raises:
            UsageError: the address is none, or the machine is not in a state to be migrated.
        """
        address = parse_address(uri)
        if resume:
            self._outgoing("resumed").resume(address)
            return
        begun = threading.Event()

        def observe(status: Status) -> None:
            try:
                self._observe_migration(status)
            finally:
                begun.set()

        with self._lock:
            self._check_migratable()
            outgoing = OutgoingMigration(
                self.machine, address, self.settings.effective, observe=observe, observe_pass=self._pass_began
            )
            self.outgoing = outgoing
            self._start("migration", lambda: _send(outgoing))
        begun.wait()

    def cancel_migration(self) -> None:
        """Cancel the migration away from here, if there is one and it has not let go of the guest."""
        if self.outgoing is not None:
            self.outgoing.cancel()

    def start_postcopy(self) -> None:
        """See `OutgoingMigration.start_postcopy`.

        Raises:
            UsageError: the migration under way cannot do that, or there is none.
        """
        self._outgoing("handed over").start_postcopy()

    def continue_migration(self) -> None:
        """See `OutgoingMigration.go_on`.

        Raises:
            UsageError: no migration waits for it.
        """
        self._outgoing("continued").go_on()

    def pause_migration(self) -> None:
        """Cut the connections of postcopy that is under way, from here or to here.

        Raises:
            UsageError: there is none.
        """
        if isinstance(self.incoming, IncomingMigration) and self.incoming.owed:
            self.incoming.pause()
        else:
            self._outgoing("paused").pause()

    def recover_migration(self, uri: str) -> None:
        """Wait for the source at another address, after postcopy to here lost its connections.

        Raises:
            UsageError: it did not.
            HostError: the address cannot be listened at.
        """
        if not isinstance(self.incoming, IncomingMigration):
            raise UsageError("no migration to here can be recovered")
        address = parse_address(uri)
        creds = self.settings.parameters.tls_creds
        self.incoming.recover(lambda: Listener(address, credentials_for(address, creds, Role.DESTINATION)))

    def _outgoing(self, what: str) -> OutgoingMigration:
        if self.outgoing is None:
            raise UsageError(f"there is no migration to be {what}")
        return self.outgoing

    def change_parameters(self, **changes: Any) -> None:
        """Change some of the parameters, of a migration under way too.

        Raises:
            UsageError: a value is out of range, or too late for the migration under way; nothing has changed then.
        """
        with self._lock:
            settings = self.settings.with_parameters(**changes)
            if self._is_migrating:
                self.settings.check_change(settings)
            self.settings = settings
            if self.outgoing is not None:
                self.outgoing.parameters = settings.effective

    def change_capabilities(self, changes: Mapping[Capability, bool]) -> None:
        """Switch some capabilities on or off, for later migrations.

        Raises:
            UsageError: a migration is under way, they exclude each other, or this machine cannot do that.
        """
        with self._lock:
            if self._is_migrating:
                raise UsageError("a migration is under way", remedy="wait for it, or cancel it with migrate_cancel")
            if changes.get(Capability.DIRTY_LIMIT):
                self.machine.check_dirty_limit()
            self.settings = self.settings.with_capabilities(changes)

    def limit_dirty_rate(self, quota: int, cpu: int | None) -> None:
        """See `Machine.limit_dirty_rate`.

        Raises:
            UsageError: a migration limits it, there is no such vCPU, or this machine cannot do that.
        """
        with self._lock:
            if self._is_migrating and Capability.DIRTY_LIMIT in self.settings.capabilities:
                raise UsageError(
                    "the migration under way limits vCPUs",
                    remedy="set its vcpu-dirty-limit with migrate-set-parameters, or wait for its end",
                )
            self.machine.limit_dirty_rate(quota, cpu)

    def receive(self, listener: Listener) -> None:
        """Wait for a machine to arrive here; `wait` raises if that fails."""
        with self._lock:
            incoming = IncomingMigration(self.machine, listener, observe=self._observe_migration)
            self.incoming = incoming
            self._start("incoming-migration", lambda: self._take_over(incoming))

    def receive_file(self, path: str) -> None:
        """Take a machine over from a file; `wait` raises if that fails.

        Raises:
            DirtylogError: there is none that fits.
        """
        with self._lock:
            incoming = IncomingFile(self.machine, path)
            self.incoming = incoming
            self._start("incoming-file", lambda: self._take_over(incoming))

    @property
    def _is_migrating(self) -> bool:
        return self.outgoing is not None and not self.outgoing.ended

    def _observe_migration(self, status: Status) -> None:
        for observer in tuple(self.migration_observers):
            observer(status)

    def _pass_began(self, number: int) -> None:
        for observer in tuple(self.pass_observers):
            observer(number)

    def _check_migratable(self) -> None:
        if self._is_migrating:
            raise UsageError("a migration is under way", remedy="wait for it, or cancel it with migrate_cancel")
        if self.machine.state is RunState.INMIGRATE:
            raise UsageError("the guest has not arrived here yet", remedy="wait for the incoming migration to end")
        if isinstance(self.incoming, IncomingMigration) and self.incoming.owed:
            raise UsageError("some of the guest's memory has not arrived here yet", remedy="wait for it")
        if self.machine.state in (RunState.POSTMIGRATE, RunState.FINISH_MIGRATE):  # it may be letting go of memory
            raise UsageError(
                "the guest was migrated away already", remedy="'cont' takes it back if it does not run there"
            )
        if self.machine.state in ENDED:
            raise UsageError(f"the guest has ended ({self.machine.state.value})")

    def _start(self, name: str, target: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _take_over(self, incoming: IncomingMigration | IncomingFile) -> None:
        try:
            incoming.run()
        except DirtylogError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave it waiting for ever
            failure = DirtylogError(f"a defect in dirtylog ended the incoming migration: {error!r}")
            failure.__cause__ = error
            self.fail(failure)

    def _machine_changed(self, old: RunState, new: RunState) -> None:
        del old
        if new in ENDED:
            cause = ShutdownCause.GUEST_SHUTDOWN if new is RunState.SHUTDOWN else ShutdownCause.HOST_ERROR
            self._endings.put((cause, self.machine.failure))


def _send(outgoing: OutgoingMigration) -> None:
    with contextlib.suppress(DirtylogError):  # it holds the error itself, for whoever asks, and the guest goes on
        outgoing.run()

"""The source of a migration. How it lets go of the guest: see `letting_go`."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    DisconnectedError,
    InDoubtError,
    UsageError,
)
from dirtylog.linux.process import ProcessName
from dirtylog.machine import DirtyLimit, Machine, RunState
from dirtylog.migration import postcopy, sharing
from dirtylog.migration.address import Address, FileAddress
from dirtylog.migration.agreement import greet
from dirtylog.migration.channel import STALL_TIMEOUT
from dirtylog.migration.connections import Connections
from dirtylog.migration.custody import Custody, Event
from dirtylog.migration.governor import Governor
from dirtylog.migration.lanes import Lanes, senders
from dirtylog.migration.letting_go import LettingGo
from dirtylog.migration.messages import PassDone
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.parameters import Compression, Parameters, Slowdown
from dirtylog.migration.postcopy import Postcopy
from dirtylog.migration.precopy import Precopy
from dirtylog.migration.remainder import send_state
from dirtylog.migration.statistics import ENDED, DowntimeParts, Statistics, Status
from dirtylog.migration.switchover import should_switch_over

StatusObserver = Callable[[Status], None]
"""Told each new status, in the migration's thread or in that of `OutgoingMigration.cancel`."""
PassObserver = Callable[[int], None]
"""Told the number of each pass that begins, in the migration's thread."""


class OutgoingMigration:
    """Moves a machine away while it runs. `run` does it in the calling thread; the rest may be used from any.

    Attributes:
        parameters: may be replaced at any time; what is in `Parameters.AGREED` counts as it was at the beginning.
        agreed: the parameters as they were when it began.
        status: how it stands.
        statistics: what it has done.
        error: why it failed, if it did.

    Raises:
        UsageError: the machine cannot be slowed down, or its memory not be shared, as the parameters want; or the
            credentials for TLS cannot be used.
    """

    def __init__(
        self,
        machine: Machine,
        address: Address,
        parameters: Parameters,
        *,
        observe: StatusObserver | None = None,
        observe_pass: PassObserver | None = None,
    ) -> None:
        self.parameters = parameters
        self.agreed = parameters
        self.status = Status.NONE
        self.statistics = Statistics(total_bytes=sum(block.size for block in machine.memory.blocks.values()))
        self.error: DirtylogError | None = None
        self._machine = machine
        self._address = address
        self._observe = observe
        self._observe_pass = observe_pass
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._letting_go = LettingGo()
        self._postcopy: Postcopy | None = None
        self._postcopy_wanted = threading.Event()
        self._switchover_allowed = threading.Event()
        if parameters.share_memory:
            sharing.check(machine.memory, address, parameters.channels)
        if parameters.postcopy:
            postcopy.check(address, parameters)
        if isinstance(address, FileAddress) and parameters.channels > 1:
            raise UsageError("a file is written on one channel", remedy="leave further channels out")
        self._governor = Governor(machine, self.statistics, parameters.slowdown)
        self._session = os.urandom(16)
        self._connections = Connections(parameters.tls_creds, parameters.tls_hostname)
        self._connections.check(address)
        self._began = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether it is over, one way or another."""
        return self.status in ENDED

    @property
    def elapsed(self) -> float:
        """Seconds since it began, or that it took."""
        return self.statistics.total_seconds if self.ended else time.monotonic() - self._began

    @property
    def dirty_limits(self) -> tuple[DirtyLimit, ...]:
        """How vCPUs are limited for this migration, while it lasts."""
        mine = self.agreed.slowdown is Slowdown.DIRTY_LIMIT and not self.ended
        return self._machine.dirty_limits if mine else ()

    @property
    def lost(self) -> DirtylogError | None:
        """Why there is no connection; None while there is, or if the guest was not handed over before its memory."""
        return None if self._postcopy is None else self._postcopy.lost

    def cancel(self) -> bool:
        """Ask it to stop, and to leave the guest where it is.

        Postcopy whose connection is lost is given up instead: the guest stays stopped here.

        Returns:
            Whether it will: not if it has ended, or has let go of the guest already.
        """
        if self._postcopy is not None and self.status is Status.POSTCOPY_PAUSED:
            self._postcopy.give_up()
            return True
        with self._lock:
            if self._letting_go.custody is not Custody.MINE or self.ended:
                return False
            self._cancelled.set()
            self._switchover_allowed.set()
            self._connections.abort()
            self._set_status(Status.CANCELLING)
            return True

    def close(self) -> None:
        """End it, whatever becomes of the guest: one that lacks memory that is here cannot go on without it."""
        if not self.cancel() and self._postcopy is not None:
            self._postcopy.give_up()

    def start_postcopy(self) -> None:
        """Hand the guest over as soon as can be, before all of its memory.

        Raises:
            UsageError: that was not agreed on, or the migration has ended.
        """
        if not self.agreed.postcopy:
            raise UsageError(
                "this migration cannot hand its guest over before all of its memory",
                remedy="switch postcopy-ram on before it begins",
            )
        if self.ended:
            raise UsageError("the migration has ended")
        self._postcopy_wanted.set()

    def go_on(self) -> None:
        """Switch over, where that waits for it.

        Raises:
            UsageError: it does not wait.
        """
        if self.status is not Status.PRE_SWITCHOVER:
            raise UsageError(f"the migration does not wait before its switchover ({self.status.value})")
        self._switchover_allowed.set()

    def pause(self) -> None:
        """Cut the connections of a migration whose guest was handed over before its memory.

        Raises:
            UsageError: it is another one, or has none.
        """
        if self._postcopy is None or self.status is not Status.POSTCOPY_ACTIVE:
            raise UsageError(
                f"only postcopy can be paused ({self.status.value})",
                remedy="cancel a migration that has not come so far",
            )
        self._postcopy.pause()

    def resume(self, address: Address) -> None:
        """Go on over other connections, to where the destination waits for that.

        Raises:
            UsageError: there is nothing to be resumed, or not there.
        """
        if self._postcopy is None or self.status is not Status.POSTCOPY_PAUSED:
            raise UsageError(f"only postcopy that was paused can be resumed ({self.status.value})")
        postcopy.check(address, self.agreed)
        self._connections.check(address)
        self._postcopy.resume(address)

    def run(self) -> None:
        """Migrate. When this returns, the destination runs the guest.

        Where memory is shared it has completed already when the destination runs the guest. The machine is held until
        the memory has been let go of as well.

        Raises:
            CancelledError: `cancel` was called; the guest is as it was.
            InDoubtError: the guest was handed over, and nobody confirmed it; it stays stopped here.
            DirtylogError: it failed; the guest is as it was. Or it has completed, and this machine has ended, as it
                could not let go of its memory.
        """
        self._began = time.monotonic()
        try:
            self._enter(Status.SETUP)
            try:
                self._migrate(self._connections.open(self._address))
            finally:
                self._connections.close()
        except BaseException as error:
            failure = self._failed(error)
            if failure is error or not isinstance(error, Exception):
                raise
            raise failure from error
        if not self.ended:
            self._end(Status.COMPLETED)

    def _failed(self, error: BaseException) -> DirtylogError:
        """Note that it ended before its time, unless it had completed; the error that tells why."""
        cancelled = self._cancelled.is_set()
        if cancelled:
            failure: DirtylogError = CancelledError("the migration was cancelled")
        elif isinstance(error, DirtylogError):
            failure = error
        elif isinstance(error, Exception):
            failure = DirtylogError(f"a defect in dirtylog ended the migration: {error!r}")
        else:
            failure = DirtylogError(f"the thread of the migration was interrupted by {type(error).__name__}")
        if not self.ended:
            self.error = failure
            self._end(Status.CANCELLED if cancelled else Status.FAILED)
        return failure

    def _migrate(self, channel: Outlet) -> None:
        try:
            destination = self._agree(channel)
            if self.agreed.share_memory:
                self._share(channel, destination)
                return
            channels = [channel, *(self._joined() for _ in range(1, self.agreed.channels))]
            urgent = self._joined() if self.agreed.postcopy else None
            for each in channels:
                each.set_timeout(STALL_TIMEOUT)
            self.statistics.setup_seconds = time.monotonic() - self._began
            self._send_all(channels, urgent, destination)
        except DisconnectedError as error:
            if self._letting_go.custody is not Custody.MINE:
                raise
            words = channel.last_words()
            if words is None:
                if self._postcopy is not None:
                    self._postcopy.check()
                raise
            raise words from error

    def _joined(self) -> Outlet:
        return self._connections.join(self._address, self._session)

    def _send_all(self, channels: list[Outlet], urgent: Outlet | None, destination: ProcessName) -> None:
        blocks = tuple(self._machine.memory.blocks.values())
        lanes = Lanes(senders(channels, blocks, self.agreed))
        precopy = Precopy(self._machine.memory, lanes, self.statistics, lambda: self.parameters, self._cancelled)
        try:
            with self._governor:
                self._send_while_running(precopy)
                self._switch_over(
                    channels[0], destination, send_rest=lambda: self._send_rest(precopy, channels[0], urgent)
                )
                self._send_owed()
        except BaseException:
            if len(channels) > 1:  # their threads may wait for the destination, which may have last words
                for each in channels:
                    each.stop_sending()
            raise
        finally:
            precopy.stop()
            lanes.close()

    def _share(self, channel: Outlet, destination: ProcessName) -> None:
        memory = self._machine.memory
        sharing.offer(channel, memory)
        channel.set_timeout(STALL_TIMEOUT)
        channel.expect(PassDone)  # mapping takes the longer the larger it is, and the guest need not wait for that
        self.statistics.setup_seconds = time.monotonic() - self._began
        self._enter(Status.ACTIVE)
        self._switch_over(channel, destination)
        try:
            self._connections.close()
            self._end(Status.COMPLETED)
        finally:
            sharing.release(self._machine)  # neither the guest, which runs, nor who waits for the end waits for this

    def _agree(self, channel: Outlet) -> ProcessName:
        self.agreed = self.parameters
        if isinstance(self._address, FileAddress):  # where each page has its place, whatever it is made of
            self.agreed = replace(self.parameters, compression=Compression.NONE, delta_cache=0)
        return greet(channel, self._machine, self.agreed, self._session)

    def _send_while_running(self, precopy: Precopy) -> None:
        self._enter(Status.ACTIVE)
        precopy.start()
        while True:
            self._send_pass(precopy, paced=True)
            estimate, parameters = precopy.estimate(), self.parameters
            self._governor.judge(estimate, parameters)
            if should_switch_over(estimate, parameters.downtime_limit) or self._postcopy_is_due(parameters):
                return
            self._governor.slow_down(parameters)

    def _postcopy_is_due(self, parameters: Parameters) -> bool:
        if self.agreed.postcopy and 0 < parameters.postcopy_after <= self.statistics.pass_count:
            self._postcopy_wanted.set()
        return self._postcopy_wanted.is_set()

    def _send_pass(self, precopy: Precopy, *, paced: bool) -> None:
        if self._observe_pass is not None:
            self._observe_pass(self.statistics.pass_count + 1)
        if paced:
            precopy.send_pass(paced=True, stop=self._postcopy_wanted.is_set)
        else:
            precopy.send_pass(paced=False)

    def _send_rest(self, precopy: Precopy, main: Outlet, urgent: Outlet | None) -> None:
        """What was dirty at last; or say that it comes later."""
        precopy.sync(last_stage=True)
        if self._postcopy_wanted.is_set() and urgent is not None and self.statistics.remaining_pages:
            owed = OwedPages([block.owed() for block in precopy.blocks])
            self._postcopy = Postcopy(
                owed,
                self.statistics,
                self._connections,
                self._session,
                self._enter,
                lambda: self.parameters.max_postcopy_bandwidth,
            )
            self._postcopy.begin(main, urgent)
            return
        self._send_pass(precopy, paced=False)
        self.statistics.downtime_bytes = self.statistics.passes[-1].bytes

    def _switch_over(
        self, channel: Outlet, destination: ProcessName, *, send_rest: Callable[[], None] = lambda: None
    ) -> None:
        """Stop the guest, send the rest, hand over. The machine is still held then.

        Whatever goes wrong before the guest is let go brings it back; after that only proof that it is nowhere else.
        """
        moments = [time.monotonic()]
        before = self._machine.hold(RunState.FINISH_MIGRATE)
        try:
            self._wait_before_switchover()
            moments.append(time.monotonic())
            self._enter(Status.DEVICE)
            send_rest()
            moments.append(time.monotonic())
            send_state(
                channel, self._machine, self.statistics, running=before is RunState.RUNNING, verify=self.agreed.verify
            )
            moments.append(time.monotonic() - self.statistics.verify_seconds)
            self._hand_over(channel, destination)
            moments.append(time.monotonic() - self.statistics.verify_seconds)
        except BaseException:
            self._machine.release(before if self._letting_go.custody is Custody.MINE else RunState.POSTMIGRATE)
            raise
        self.statistics.downtime = moments[-1] - moments[0]
        self.statistics.downtime_parts = DowntimeParts(*(end - start for start, end in pairwise(moments)))

    def _send_owed(self) -> None:
        """Send what the guest lacks at the destination, if it does, and let others have the machine."""
        try:
            if self._postcopy is not None:
                self._postcopy.run()
                if self._letting_go.custody is Custody.DOUBTFUL:
                    self._letting_go.note(Event.TAKEN)
        finally:
            self._machine.release(RunState.POSTMIGRATE)

    def _wait_before_switchover(self) -> None:
        if self.parameters.pause_before_switchover:
            self._enter(Status.PRE_SWITCHOVER)
            self._switchover_allowed.wait()
            if self._cancelled.is_set():
                raise CancelledError("the migration was cancelled")

    def _hand_over(self, channel: Outlet, destination: ProcessName) -> None:
        with self._lock:
            if self._cancelled.is_set():
                raise CancelledError("the migration was cancelled")
            self._letting_go.note(Event.HANDOVER)
        try:
            self._letting_go.hand_over(channel, destination)
        except InDoubtError as error:
            if self._postcopy is None:
                raise
            self._postcopy.lost = error  # a destination that answers when it is resumed has taken the guest

    def _enter(self, status: Status) -> None:
        with self._lock:
            if not self._cancelled.is_set():
                self._set_status(status)

    def _end(self, status: Status) -> None:
        self.statistics.total_seconds = time.monotonic() - self._began
        with self._lock:
            self._set_status(status)

    def _set_status(self, status: Status) -> None:
        self.status = status
        if self._observe is not None:
            self._observe(status)

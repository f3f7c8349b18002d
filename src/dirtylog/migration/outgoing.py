"""The source of a migration.

The guest changes hands in three messages. ``Ready``: the destination could run it, and waits. ``Handover``: the source
has let go, for good. ``Taken``: the destination starts it now. Up to the handover a failure of any kind leaves the
guest here, and the destination, which was never told, does not start it.

After the handover the source cannot know, if the connection ends before ``Taken``, whether the destination runs the
guest. Two running copies would be worse than none, so it does not guess: it takes the guest back only if the
destination says that it gave up, or if the destination's process is known to have ended without having said ``Taken``,
which can be seen where both are on one host. Otherwise the guest stays stopped here and the operator, who can look at
the destination, decides.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Final

from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    DisconnectedError,
    HostError,
    InDoubtError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from dirtylog.linux.process import ProcessName
from dirtylog.machine import DirtyLimit, Machine, RunState
from dirtylog.migration import sharing
from dirtylog.migration.address import Address, FileAddress
from dirtylog.migration.agreement import block_infos
from dirtylog.migration.channel import STALL_TIMEOUT, connect
from dirtylog.migration.digest import block_digest
from dirtylog.migration.file import FileOutlet
from dirtylog.migration.governor import Governor
from dirtylog.migration.lanes import Lanes, senders
from dirtylog.migration.messages import Digests, Handover, Hello, Join, Joined, PassDone, Ready, State, Taken, Welcome
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.parameters import Compression, Parameters, Slowdown
from dirtylog.migration.precopy import Precopy
from dirtylog.migration.statistics import ENDED, DowntimeParts, Statistics, Status
from dirtylog.migration.switchover import should_switch_over
from dirtylog.units import MIB

StatusObserver = Callable[[Status], None]
"""Told each new status, in the migration's thread or in that of `OutgoingMigration.cancel`."""
PassObserver = Callable[[int], None]
"""Told the number of each pass that begins, in the migration's thread."""

_GONE_TIMEOUT: Final = 2.0
_SLOW_DIGEST: Final = 200 * MIB
"""Bytes a second that a destination computes digests at, at the very least."""


class OutgoingMigration:
    """Moves a machine away while it runs. `run` does it in the calling thread; the rest may be used from any.

    Attributes:
        parameters: may be replaced at any time; what is in `Parameters.AGREED` counts as it was at the beginning.
        agreed: the parameters as they were when it began.
        status: how it stands.
        statistics: what it has done.
        error: why it failed, if it did.

    Raises:
        UsageError: the machine cannot be slowed down, or its memory not be shared, as the parameters want.
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
        self._let_go = False
        self._came_back = False
        if parameters.share_memory:
            sharing.check(machine.memory, address, parameters.channels)
        if isinstance(address, FileAddress) and parameters.channels > 1:
            raise UsageError("a file is written on one channel", remedy="leave further channels out")
        self._governor = Governor(machine, self.statistics, parameters.slowdown)
        self._session = os.urandom(16)
        self._channels: list[Outlet] = []
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

    def cancel(self) -> bool:
        """Ask it to stop, and to leave the guest where it is.

        Returns:
            Whether it will: not if it has ended, or has let go of the guest already.
        """
        with self._lock:
            if self._let_go or self.ended:
                return False
            self._cancelled.set()
            for channel in self._channels:
                channel.abort()
            self._set_status(Status.CANCELLING)
            return True

    def run(self) -> None:
        """Migrate. When this returns, the destination runs the guest.

        Raises:
            CancelledError: `cancel` was called; the guest is as it was.
            InDoubtError: the guest was handed over, and nobody confirmed it; it stays stopped here.
            DirtylogError: it failed; the guest is as it was.
        """
        self._began = time.monotonic()
        try:
            self._enter(Status.SETUP)
            try:
                self._migrate(self._connected())
            finally:
                self._close_channels()
        except BaseException as error:
            failure = self._failed(error)
            if failure is error or not isinstance(error, Exception):
                raise
            raise failure from error
        self._end(Status.COMPLETED)

    def _failed(self, error: BaseException) -> DirtylogError:
        """Note that it ended before its time; the error that tells why."""
        cancelled = self._cancelled.is_set()
        if cancelled:
            failure: DirtylogError = CancelledError("the migration was cancelled")
        elif isinstance(error, DirtylogError):
            failure = error
        elif isinstance(error, Exception):
            failure = DirtylogError(f"a defect in dirtylog ended the migration: {error!r}")
        else:
            failure = DirtylogError(f"the thread of the migration was interrupted by {type(error).__name__}")
        self.error = failure
        self._end(Status.CANCELLED if cancelled else Status.FAILED)
        return failure

    def _close_channels(self) -> None:
        """Disown them before: from then on their descriptors' numbers may be others'."""
        with self._lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()

    def _connected(self) -> Outlet:
        address = self._address
        channel = FileOutlet(address.path) if isinstance(address, FileAddress) else connect(address)
        with self._lock:
            self._channels.append(channel)
            if self._cancelled.is_set():
                channel.abort()
        return channel

    def _migrate(self, channel: Outlet) -> None:
        try:
            destination = self._agree(channel)
            if self.agreed.share_memory:
                self._share(channel, destination)
                return
            channels = [channel, *(self._joined() for _ in range(1, self.agreed.channels))]
            for each in channels:
                each.set_timeout(STALL_TIMEOUT)
            self.statistics.setup_seconds = time.monotonic() - self._began
            self._send_all(channels, destination)
        except DisconnectedError as error:
            if isinstance(error, InDoubtError):
                raise
            raise channel.last_words() or error from error

    def _joined(self) -> Outlet:
        """One more channel."""
        channel = self._connected()
        channel.send(Join(self._session))
        channel.expect(Joined)
        return channel

    def _send_all(self, channels: list[Outlet], destination: ProcessName) -> None:
        blocks = tuple(self._machine.memory.blocks.values())
        lanes = Lanes(senders(channels, blocks, self.agreed))
        precopy = Precopy(self._machine.memory, lanes, self.statistics, lambda: self.parameters, self._cancelled)
        try:
            with self._governor:
                self._send_while_running(precopy)
                self._switch_over(channels[0], destination, send_rest=lambda: self._send_rest(precopy))
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
        self._switch_over(channel, destination, let_go=lambda: sharing.let_go(memory))

    def _agree(self, channel: Outlet) -> ProcessName:
        self.agreed = self.parameters
        if isinstance(self._address, FileAddress):  # where each page has its place, whatever it is made of
            self.agreed = replace(self.parameters, compression=Compression.NONE, delta_cache=0)
        channel.send(
            Hello(
                self._machine.kind,
                block_infos(self._machine),
                self.agreed.verify,
                self.agreed.channels,
                self._session,
                self.agreed.share_memory,
            )
        )
        welcome = channel.expect(Welcome)
        return ProcessName(welcome.boot_id, welcome.pid, welcome.start_time)

    def _send_while_running(self, precopy: Precopy) -> None:
        self._enter(Status.ACTIVE)
        precopy.start()
        while True:
            self._send_pass(precopy, paced=True)
            estimate, parameters = precopy.estimate(), self.parameters
            self._governor.judge(estimate, parameters)
            if should_switch_over(estimate, parameters.downtime_limit):
                return
            self._governor.slow_down(parameters)

    def _send_pass(self, precopy: Precopy, *, paced: bool) -> None:
        if self._observe_pass is not None:
            self._observe_pass(self.statistics.pass_count + 1)
        precopy.send_pass(paced=paced)

    def _send_rest(self, precopy: Precopy) -> None:
        precopy.sync(last_stage=True)
        self._send_pass(precopy, paced=False)
        self.statistics.downtime_bytes = self.statistics.passes[-1].bytes

    def _switch_over(
        self,
        channel: Outlet,
        destination: ProcessName,
        *,
        send_rest: Callable[[], None] = lambda: None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """Stop the guest, send the rest, hand over; let go of what the destination has now.

        Whatever goes wrong before the guest is let go brings it back; after that only proof that it is nowhere else.
        """
        moments = [time.monotonic()]
        before = self._machine.hold(RunState.FINISH_MIGRATE)
        try:
            moments.append(time.monotonic())
            self._enter(Status.DEVICE)
            send_rest()
            moments.append(time.monotonic())
            self._send_state(channel, running=before is RunState.RUNNING)
            moments.append(time.monotonic() - self.statistics.verify_seconds)
            self._hand_over(channel, destination)
            moments.append(time.monotonic() - self.statistics.verify_seconds)
            let_go()
        except BaseException:
            gone = self._let_go and not self._came_back
            self._machine.release(RunState.POSTMIGRATE if gone else before)
            raise
        self.statistics.downtime = moments[-1] - moments[0]
        self.statistics.downtime_parts = DowntimeParts(*(end - start for start, end in pairwise(moments)))
        self._machine.release(RunState.POSTMIGRATE)

    def _send_state(self, channel: Outlet, *, running: bool) -> None:
        """Send what is not memory, and wait until the destination has loaded everything."""
        blocks = self._machine.memory.blocks.values()
        digests: tuple[bytes, ...] = ()
        asked = 0.0
        if self.agreed.verify:
            began = time.monotonic()
            digests = tuple(block_digest(block) for block in blocks)
            asked = time.monotonic()
            self.statistics.verify_seconds = asked - began
            channel.send(Digests(digests))
            channel.set_timeout(STALL_TIMEOUT + self.statistics.total_bytes / _SLOW_DIGEST)
        channel.send(State(running, self._machine.save_state()))
        ready = channel.expect(Ready)
        if ready.digests != digests:
            raise RefusedError("the destination's memory differs from the source's at the switchover")
        if self.agreed.verify:  # the destination cannot have compared for longer than we waited, whatever it says
            self.statistics.verify_seconds += min(ready.verify_ns / 1e9, time.monotonic() - asked)
        self.statistics.digests = dict(zip((block.name for block in blocks), digests, strict=False))

    def _hand_over(self, channel: Outlet, destination: ProcessName) -> None:
        with self._lock:
            if self._cancelled.is_set():
                raise CancelledError("the migration was cancelled")
            self._let_go = True
        try:
            channel.send(Handover())
        except (DisconnectedError, HostError):
            self._came_back = True  # nothing of the message has left: the destination was not told, the file not made
            raise
        try:
            channel.expect(Taken)
        except RefusedError:
            self._came_back = True
            raise
        except (DisconnectedError, ProtocolError) as error:
            if not destination.is_gone(_GONE_TIMEOUT):
                raise InDoubtError(
                    "the connection ended after the guest was handed over, before the destination confirmed that it"
                    " runs",
                    remedy="look at the destination: if it never will run the guest, 'cont' runs it here again",
                ) from error
            if not self._was_taken(channel):
                raise

    def _was_taken(self, channel: Outlet) -> bool:
        """Whether a destination that is gone said that it starts the guest, after it was no longer waited for.

        If not, the guest comes back.
        """
        channel.set_timeout(_GONE_TIMEOUT)
        try:
            channel.expect(Taken)
        except RefusedError:
            self._came_back = True
            raise
        except DirtylogError:  # nothing, or nothing whole
            self._came_back = True
            return False
        return True

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

"""The destination of a migration."""

import contextlib
import hmac
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dirtylog.errors import (
    DirtylogError,
    DisconnectedError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from dirtylog.linux.process import ProcessName
from dirtylog.machine import Machine, RunState
from dirtylog.migration import sharing
from dirtylog.migration.agreement import check_fits
from dirtylog.migration.arrival import Arrival, check_machine
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.channel import HANDSHAKE_TIMEOUT, Channel
from dirtylog.migration.custody import Custody, Event
from dirtylog.migration.digest import block_digest
from dirtylog.migration.filler import Filler, SideFiller
from dirtylog.migration.listener import Listener
from dirtylog.migration.messages import (
    Digests,
    Failed,
    Handover,
    Hello,
    Join,
    Joined,
    Message,
    Owed,
    PassDone,
    Ready,
    State,
    Welcome,
)
from dirtylog.migration.prepare import Preparer
from dirtylog.migration.ram import IncomingRAM
from dirtylog.migration.reception import Reception
from dirtylog.migration.statistics import Status
from dirtylog.migration.taking_over import TakingOver


class IncomingMigration:
    """Receives a machine into one that never ran, of the same kind and size, and runs it once the source let go.

    The source is the first connection whose greeting fits. All others are turned away, told why, and logged (logger
    ``dirtylog.migration``); what they do ends nothing.

    Args:
        machine: held in state ``inmigrate`` until it is handed over.
        listener: where the source will connect. Closed once all its channels have: nobody else is taken in.
    """

    def __init__(
        self, machine: Machine, listener: Listener, *, observe: Callable[[Status], None] = lambda _: None
    ) -> None:
        self.status = Status.SETUP
        self._observer = observe
        self._machine = machine
        self._listener = listener
        self._reception: Reception | None = None
        self._hello: Hello | None = None
        self._joined = 0
        self._blocks = tuple(machine.memory.blocks.values())
        self._ram = IncomingRAM(self._blocks)
        self._verify = False
        self._digests: tuple[bytes, ...] = ()
        self._verify_ns = 0
        self._lock = threading.Lock()
        self._taking_over = TakingOver()
        self._channels: list[Channel] = []
        self._preparer = Preparer(self._blocks, self._ram.ready)
        self._arrival: Arrival | None = None
        machine.hold(RunState.INMIGRATE)

    def abort(self) -> None:
        """Make `run` give up, unless the guest was handed over already."""
        with self._lock:
            self._taking_over.note(Event.GIVEN_UP)
            if self._reception is not None:
                self._reception.abort()
            for channel in self._channels:
                channel.abort()
            if self._arrival is not None:
                self._arrival.abort()

    @property
    def blocktime(self) -> Blocktime | None:
        """How long the guest waited for its memory; None unless it may run without."""
        return None if self._arrival is None else self._arrival.blocktime

    @property
    def owed(self) -> int:
        """Pages that the guest, which runs here, lacks."""
        return 0 if self._arrival is None else self._arrival.pages

    @property
    def lost(self) -> DirtylogError | None:
        """Why there is no connection over which the rest could come; None while there is, or if nothing is owed."""
        return None if self._arrival is None else self._arrival.lost

    def recover(self, listen: Callable[[], Listener]) -> None:
        """Take what the guest lacks over a new connection, which the source will make where ``listen`` waits for it.

        Raises:
            UsageError: nothing is lost.
        """
        if self._arrival is None or self.status is not Status.POSTCOPY_PAUSED:
            raise UsageError(f"only postcopy that was paused can be recovered ({self.status.value})")
        self._arrival.recover(listen())

    def pause(self) -> None:
        """Cut the connections of a migration whose guest runs here before its memory has come.

        Raises:
            UsageError: it is another one, or has none.
        """
        if self._arrival is None or self.status is not Status.POSTCOPY_ACTIVE:
            raise UsageError(f"only postcopy can be paused ({self.status.value})")
        self._arrival.pause()

    def _observe(self, status: Status) -> None:
        self.status = status
        self._observer(status)

    def run(self) -> None:
        """Wait for a source and take its machine over. When this returns, the guest is here, and runs if it did there.

        Raises:
            DirtylogError: it failed. The guest was not started here, and the machine cannot be used any more.
        """
        self._preparer.start()
        try:
            with self._open_reception() as reception:
                channel, hello = reception.take(Hello)
                with channel:
                    self._preparer.stop()
                    self._adopt(channel)
                    self._converse(channel, hello, reception)
        except DisconnectedError as error:
            raise DisconnectedError(
                f"{error.cause}; the guest was not handed over and is not started here",
                remedy="start this side again, then the migration",
            ) from error
        finally:
            self._preparer.stop()
            self._preparer.join()

    def _open_reception(self) -> Reception:
        with self._lock:
            self._reception = Reception(self._listener, self._judge)
            if self._taking_over.custody is Custody.NEVER:
                self._reception.abort()
            return self._reception

    def _judge(self, channel: Channel, message: Message) -> None:
        """Who is let in: one source whose machine fits, and then its further channels. Called one at a time."""
        if isinstance(message, Hello):
            if self._hello is not None:
                raise UsageError("another source is here already", remedy="migrate to another destination")
            check_fits(self._machine, message.machine, message.blocks)
            if message.shared and (message.channels > 1 or not channel.passes_files):
                raise ProtocolError("the source wants to share its memory on a connection that cannot do that")
            if message.postcopy:
                check_machine(self._machine)
            self._hello = message
        elif isinstance(message, Join):
            hello = self._hello
            if hello is None or not hmac.compare_digest(message.session, hello.session):
                raise ProtocolError("it wants to join a session that is not here")
            if self._joined >= hello.channels - 1 + hello.postcopy:
                raise ProtocolError("all channels of the session are here already")
            self._joined += 1
        elif isinstance(message, Failed):
            raise RefusedError(f"it gave up: {message.reason}")
        else:
            raise ProtocolError(f"it began with {type(message).__name__}")

    def _adopt(self, channel: Channel) -> None:
        with self._lock:
            self._channels.append(channel)
            if self._taking_over.custody is Custody.NEVER:
                channel.abort()

    def _converse(self, channel: Channel, hello: Hello, reception: Reception) -> None:
        try:
            self._receive(channel, hello, reception)
        except BaseException as error:
            with self._lock:
                self._taking_over.fail(error)
            if isinstance(error, DirtylogError):
                channel.give_up(error)
            raise

    def _receive(self, channel: Channel, hello: Hello, reception: Reception) -> None:
        with contextlib.ExitStack() as stack:
            if hello.postcopy:
                self._arrival = stack.enter_context(Arrival(self._machine, hello.session, self._observe))
            self._verify = hello.verify
            name = ProcessName.own()
            channel.send(Welcome(name.boot_id, name.pid, name.start_time))
            if hello.shared:
                reception.close()
                state = self._receive_shared(channel, stack)
            else:
                state = self._receive_copied(channel, hello, reception, stack)
            self._taking_over.confirm(channel)
            self._machine.release(RunState.RUNNING if state.running else RunState.PAUSED)
            if self._arrival is not None and self._arrival.begun:
                self._arrival.run(channel)
            if hello.shared:
                channel.finish()  # the source is to hear that the guest runs before this side takes time to free memory
        self._observe(Status.COMPLETED)

    def _receive_copied(
        self, channel: Channel, hello: Hello, reception: Reception, stack: contextlib.ExitStack
    ) -> State:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        with self._side_channels(channel, hello, reception, deadline) as sides:
            urgent: Channel | None = None
            if hello.postcopy:
                urgent = stack.enter_context(self._accept_side(channel, reception, deadline))
            reception.close()
            channel.set_timeout(0)
            message = self._fill(channel, sides)
        if not isinstance(message, Owed):
            return self._prepare(channel, message)
        if self._arrival is None or urgent is None:
            raise ProtocolError("the source owes memory, which was not agreed on")
        state = self._arrival.begin(channel, urgent, message)
        try:
            return self._prepare(channel, state)
        except DisconnectedError:
            self._arrival.check()
            raise

    def _receive_shared(self, channel: Channel, stack: contextlib.ExitStack) -> State:
        """Use the source's own memory, unless it is not handed over in the end. What was here goes with ``stack``."""
        self._preparer.join()
        try:
            sharing.take(channel, self._machine.memory, stack)
            channel.send(PassDone(0, 0, 0, 0))
            channel.set_timeout(0)
            return self._prepare(channel, channel.expect(Digests) if self._verify else channel.expect(State))
        except BaseException:
            sharing.let_go(self._machine.memory)
            raise

    def _prepare(self, channel: Channel, message: Digests | State) -> State:
        """Load what is not memory, and wait until the guest is handed over."""
        state = self._compare(channel, message) if isinstance(message, Digests) else message
        self._load(state)
        channel.send(Ready(self._digests, self._verify_ns))
        channel.expect(Handover)
        with self._lock:
            self._taking_over.take()
            self._channels.clear()
        return state

    def _fill(self, channel: Channel, sides: Sequence[SideFiller]) -> Digests | State | Owed:
        """Take what comes on the main channel, until memory is complete."""
        filler = Filler(channel, self._ram)
        while not isinstance(message := channel.receive(), Digests | State | Owed):
            filler.take(message)
            for side in sides:
                side.check()
        return message

    @contextlib.contextmanager
    def _side_channels(
        self, main: Channel, hello: Hello, reception: Reception, deadline: float
    ) -> Iterator[list[SideFiller]]:
        """The further channels of a source, each with a thread of its own, until memory is complete.

        A source that keeps to the protocol has nothing more to say there then. Whatever one says, it does not reach
        memory any more: it has been compared by then, or is about to run.
        """
        fillers: list[SideFiller] = []
        try:
            while len(fillers) < hello.channels - 1:
                side = self._accept_side(main, reception, deadline)
                fillers.append(SideFiller(side, self._ram, self._side_failed))
            yield fillers
        finally:
            for filler in fillers:
                filler.close()
            for filler in fillers:  # what went wrong there explains what went wrong here
                filler.check()

    def _accept_side(self, main: Channel, reception: Reception, deadline: float) -> Channel:
        """The next further channel, as long as the source can wait."""
        try:
            side, _ = reception.take(Join, deadline - time.monotonic(), unless=main)
        except DisconnectedError as error:
            main.check_quiet()  # it may be the one that has gone
            raise ProtocolError(
                "the source's further channels did not come", remedy="see who else connects here"
            ) from error
        with contextlib.ExitStack() as stack:
            stack.enter_context(side)
            self._adopt(side)
            side.send(Joined())
            side.set_timeout(0)
            stack.pop_all()
        return side

    def _side_failed(self) -> None:
        """Wake the main channel's thread, which raises the error when the side channels are closed."""
        with self._lock:
            for channel in self._channels[:1]:
                channel.stop_receiving()

    def _compare(self, channel: Channel, digests: Digests) -> State:
        """Compare memory with the source's; the state, which comes next."""
        if not self._verify:
            raise ProtocolError("the source sent digests that were not agreed on")
        began = time.monotonic_ns()
        self._digests = tuple(block_digest(block) for block in self._blocks)
        self._verify_ns = time.monotonic_ns() - began
        if self._digests != digests.blocks:
            raise ProtocolError("memory differs from the source's at the switchover")
        return channel.expect(State)

    def _load(self, state: State) -> None:
        if self._verify and not self._digests:
            raise ProtocolError("the source sent its state without the digests that were agreed on")
        self._machine.load_state(state.parts)

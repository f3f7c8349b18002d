"""The destination of a migration."""

import contextlib
import threading
import time

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, ProtocolError, RefusedError, UsageError
from dirtylog.linux.process import ProcessName, thread_starved_ns
from dirtylog.machine import Machine, RunState
from dirtylog.migration.channel import Channel, Listener
from dirtylog.migration.digest import block_digest
from dirtylog.migration.messages import (
    BlockInfo,
    Digests,
    Failed,
    Handover,
    Hello,
    Message,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    State,
    Taken,
    Welcome,
    ZeroPages,
)
from dirtylog.migration.ram import IncomingRAM
from dirtylog.units import PAGE_SIZE, format_size


class IncomingMigration:
    """Receives a machine into one that never ran, of the same kind and size, and runs it once the source let go.

    Args:
        machine: held in state ``inmigrate`` until it is handed over.
        listener: where the source will connect. Closed once one has: nobody else is taken in.
    """

    def __init__(self, machine: Machine, listener: Listener) -> None:
        self._machine = machine
        self._listener = listener
        self._blocks = tuple(machine.memory.blocks.values())
        self._ram = IncomingRAM(self._blocks)
        self._verify = False
        self._digests: tuple[bytes, ...] = ()
        self._verify_ns = 0
        self._starved = 0
        self._lock = threading.Lock()
        self._aborted = False
        self._channel: Channel | None = None
        machine.hold(RunState.INMIGRATE)

    def abort(self) -> None:
        """Make `run` give up, unless the guest was handed over already."""
        with self._lock:
            self._aborted = True
            self._listener.abort()
            if self._channel is not None:
                self._channel.abort()

    def run(self) -> None:
        """Wait for a source and take its machine over. When this returns, the guest is here, and runs if it did there.

        Raises:
            DirtylogError: it failed. The guest was not started here, and the machine cannot be used any more.
        """
        try:
            with self._listener.accept() as channel:
                self._listener.close()
                self._adopt(channel)
                self._converse(channel)
        except DisconnectedError as error:
            raise DisconnectedError(
                f"{error.cause}; the guest was not handed over and is not started here",
                remedy="start this side again, then the migration",
            ) from error

    def _adopt(self, channel: Channel) -> None:
        with self._lock:
            self._channel = channel
            if self._aborted:
                channel.abort()

    def _converse(self, channel: Channel) -> None:
        try:
            self._receive(channel)
        except DirtylogError as error:
            _tell(channel, error)
            raise

    def _receive(self, channel: Channel) -> None:
        self._welcome(channel, channel.expect(Hello))
        channel.set_timeout(0)
        self._starved = thread_starved_ns()
        while True:
            message = channel.receive()
            if isinstance(message, State):
                break
            self._take(channel, message)
        self._load(message)
        channel.send(Ready(self._digests, self._verify_ns))
        channel.expect(Handover)
        with self._lock:
            self._channel = None
        # The source has let go for good: if it is gone by now, the guest runs here all the same.
        with contextlib.suppress(CancelledError, DisconnectedError):
            channel.send(Taken())
        self._machine.release(RunState.RUNNING if message.running else RunState.PAUSED)

    def _welcome(self, channel: Channel, hello: Hello) -> None:
        own = tuple(BlockInfo(block.name, block.size, PAGE_SIZE) for block in self._blocks)
        if hello.machine != self._machine.kind:
            raise UsageError(
                f"the source is a machine of kind {hello.machine!r}, this one of kind {self._machine.kind!r}",
                remedy="use the same --accel on both sides",
            )
        if hello.blocks != own:
            raise UsageError(
                f"the source's memory is {_describe(hello.blocks)}, this machine's is {_describe(own)}",
                remedy="start both sides with the same --memory",
            )
        self._verify = hello.verify
        name = ProcessName.own()
        channel.send(Welcome(name.boot_id, name.pid, name.start_time))

    def _take(self, channel: Channel, message: Message) -> None:
        if isinstance(message, Pages):
            channel.receive_into(self._ram.place(message))
        elif isinstance(message, ZeroPages):
            self._ram.zero(message)
        elif isinstance(message, PassEnd):
            starved = thread_starved_ns()
            channel.send(PassDone(message.number, starved - self._starved))
            self._starved = starved
        elif isinstance(message, Digests):
            self._compare(message)
        elif isinstance(message, Failed):
            raise RefusedError(f"the source gave up: {message.reason}")

    def _compare(self, digests: Digests) -> None:
        if not self._verify:
            raise ProtocolError("the source sent digests that were not agreed on")
        began = time.monotonic_ns()
        self._digests = tuple(block_digest(block) for block in self._blocks)
        self._verify_ns = time.monotonic_ns() - began
        if self._digests != digests.blocks:
            raise ProtocolError("memory differs from the source's at the switchover")

    def _load(self, state: State) -> None:
        if self._verify and not self._digests:
            raise ProtocolError("the source sent its state without the digests that were agreed on")
        self._machine.load_state(state.parts)


def _tell(channel: Channel, error: DirtylogError) -> None:
    """Let the source know why; it may be gone."""
    if isinstance(error, CancelledError | DisconnectedError | RefusedError):
        return
    try:
        channel.send(Failed(str(error)[:4096]))
    except DirtylogError:  # the error that matters is on its way already
        return
    channel.finish()


def _describe(blocks: tuple[BlockInfo, ...]) -> str:
    return ", ".join(
        f"{block.name} of {format_size(block.size)}"
        + (f" in pages of {format_size(block.page_size)}" if block.page_size != PAGE_SIZE else "")
        for block in blocks
    )

"""The destination of a migration whose guest runs before all of its memory has arrived."""

import contextlib
import hmac
import mmap
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Self

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, PeerError, ProtocolError
from dirtylog.linux.mapping import BufferMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.machine import Machine, RunState
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.attention import Attention
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.channel import HANDSHAKE_TIMEOUT, STALL_TIMEOUT, Channel
from dirtylog.migration.fault_service import FaultService
from dirtylog.migration.listener import Listener
from dirtylog.migration.messages import (
    Join,
    Joined,
    Message,
    Owed,
    Pages,
    PassDone,
    PassEnd,
    Resume,
    Resumed,
    State,
    ZeroPages,
)
from dirtylog.migration.reception import Reception
from dirtylog.migration.statistics import Status
from dirtylog.units import KIB

_BUFFER_SIZE: Final = 64 * KIB
"""So little that it is in a CPU's cache when it is put in place."""
_COMPLETE_TIMEOUT: Final = 10.0
"""Seconds that what was sent on the urgent channel may be later than the end of the other."""
_STOP_TIMEOUT: Final = 0.5
"""Seconds until a guest that was told to stop, and does not, must be one that waits for a page."""


class Arrival:
    """Takes what is owed, over one pair of connections after another.

    Args:
        machine: which receives it.
        session: the migration's secret.
        observe: told each new status.

    Attributes:
        begun: whether the source said that it owes anything.
        blocktime: how long the guest waited.
        lost: why there is no connection; None while there is.

    Raises:
        HostError: this host does not serve page faults.
    """

    def __init__(self, machine: Machine, session: bytes, observe: Callable[[Status], None]) -> None:
        self.begun = False
        self.lost: DirtylogError | None = None
        self._machine = machine
        self._session = session
        self._observe = observe
        self._listeners: SimpleQueue[Listener | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._aborted = False
        self._current: Reception | Channel | None = None
        self._service: FaultService | None = None
        self.blocktime = Blocktime(machine.writer_threads)
        self._ram = AbsentRAM(tuple(machine.memory.blocks.values()), MissingFaults(), self.blocktime)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pages(self) -> int:
        """How many are owed."""
        return self._ram.pages

    def begin(self, main: Channel, urgent: Channel, message: Owed) -> State:
        """Take note of what is owed, and have pages fetched from here on; the state, which comes next."""
        self.begun = True
        following: Message = message
        while isinstance(following, Owed):
            self._ram.owe(following)
            following = main.receive()
        if not isinstance(following, State):
            raise main.unexpected(following, "where its state is expected")
        self._ram.begin()
        self._serve_faults(main, urgent)
        return following

    def check(self) -> None:
        """Raise what ended the urgent channel before `run`, if anything did: it explains what ended the other."""
        if self._service is not None:
            self._service.check()

    def run(self, main: Channel) -> None:
        """Take the rest. Once that is here it does not matter whether the source knows.

        Raises:
            CancelledError: `abort` was called.
        """
        while True:
            self._observe(Status.POSTCOPY_ACTIVE)
            with main:
                try:
                    self._take(main)
                    return
                except PeerError as error:
                    if not self.pages:
                        return
                    self.lost = error
            main = self._reconnected()
            self.lost = None

    def recover(self, listener: Listener) -> None:
        """Wait for the source elsewhere, after the connection was lost, and there only.

        The listener is owned here from now on.
        """
        with self._lock:
            self._listeners.put(listener)
            if isinstance(self._current, Reception):
                self._current.abort()

    def pause(self) -> None:
        """Cut the connection."""
        with self._lock:
            if isinstance(self._current, Channel):
                self._current.cut()
            if self._service is not None:
                self._service.cut()

    def abort(self) -> None:
        """Make `run` fail."""
        with self._lock:
            self._aborted = True
            if self._current is not None:
                self._current.abort()
            if self._service is not None:
                self._service.abort()
        self._listeners.put(None)

    def close(self) -> None:
        """Fetch no more. If something is missing still, the guest is stopped first, as it cannot go on. Idempotent."""
        self._end_service()
        if self._ram.pages and self._machine.state is RunState.RUNNING:
            self._stop_guest()
        self._ram.close()

    def _stop_guest(self) -> None:
        """Ask it to stop. An emulator that waits for a page can be told to, but does only once it has the page."""

        def stop() -> None:
            with contextlib.suppress(DirtylogError):  # it has ended by itself, or it waits
                self._machine.pause()

        thread = threading.Thread(target=stop, name="stop", daemon=True)
        thread.start()
        thread.join(_STOP_TIMEOUT)
        self._ram.close()
        thread.join()

    def _serve_faults(self, main: Channel, urgent: Channel) -> None:
        self._use(main)
        urgent.set_timeout(STALL_TIMEOUT)
        service = FaultService(urgent, self._ram, main.cut)
        with self._lock:
            self._service = service
            if self._aborted:
                service.abort()

    def _end_service(self) -> None:
        with self._lock:
            service, self._service = self._service, None
        if service is not None:
            service.close()

    def _use(self, current: Reception | Channel) -> None:
        """What `abort` is to end from now on."""
        with self._lock:
            self._current = current
            if self._aborted or (isinstance(current, Reception) and not self._listeners.empty()):
                current.abort()

    def _take(self, main: Channel) -> None:
        if self._service is None:
            raise DisconnectedError("there is no connection")
        try:
            attention = self._service.join()
            main.attend(attention)
            self._take_all(main, attention)
        finally:
            main.attend(None)  # whatever is said there still must not look at descriptors that are closed
            self._end_service()

    def _take_all(self, main: Channel, attention: Attention) -> None:
        buffer = BufferMapping(memoryview(mmap.mmap(-1, _BUFFER_SIZE)))
        while not isinstance(message := main.receive(), PassEnd):
            if isinstance(message, Pages):
                self._ram.receive(main, message, buffer, attention.serve)
            elif isinstance(message, ZeroPages):
                self._ram.zero(message)
            else:
                raise main.unexpected(message, "where only pages are expected")
        if not attention.until(lambda: not self._ram.pages, _COMPLETE_TIMEOUT):
            raise ProtocolError(f"the source says that it sent all, and {self._ram.pages} pages are missing")
        main.send(PassDone(message.number, 0, 0, 0))

    def _reconnected(self) -> Channel:
        while True:
            self._observe(Status.POSTCOPY_PAUSED)
            listener = self._listeners.get()
            if listener is None:
                raise CancelledError("the rest of the guest's memory was not waited for")
            try:
                with Reception(listener, self._judge) as reception:
                    return self._resumed(reception)
            except CancelledError:
                if self._aborted:
                    raise

    def _judge(self, channel: Channel, message: Message) -> None:
        """Let nobody in but the source."""
        del channel
        if not isinstance(message, Resume | Join) or not hmac.compare_digest(message.session, self._session):
            raise ProtocolError("this is not the migration that is to be resumed")

    def _resumed(self, reception: Reception) -> Channel:
        self._use(reception)
        while True:
            with contextlib.suppress(PeerError), contextlib.ExitStack() as stack:
                main, _ = reception.take(Resume)
                stack.enter_context(main)
                self._observe(Status.POSTCOPY_RECOVER)
                for message in self._ram.lacking():
                    main.send(message)
                main.send(Resumed())
                urgent = stack.enter_context(self._take_urgent(reception, main))
                main.set_timeout(0)
                self._ram.ask_again()
                self._serve_faults(main, urgent)
                stack.pop_all()
                return main
            self._observe(Status.POSTCOPY_PAUSED)

    def _take_urgent(self, reception: Reception, main: Channel) -> Channel:
        """The urgent channel that belongs to ``main``. One of an attempt that failed has been left by the source."""
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        while True:
            urgent, _ = reception.take(Join, deadline - time.monotonic(), unless=main)
            with contextlib.suppress(PeerError), contextlib.ExitStack() as stack:
                stack.enter_context(urgent)
                urgent.check_quiet()
                urgent.send(Joined())
                stack.pop_all()
                return urgent


def check_machine(machine: Machine) -> None:
    """Find out whether a machine can run here before all of its memory is.

    Raises:
        UsageError: it cannot.
        HostError: this host does not let it.
    """
    with MissingFaults() as faults:
        machine.check_postcopy(of_kernel=faults.of_kernel)

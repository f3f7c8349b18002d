"""The source of a migration whose guest is handed over before all of its memory.

The guest runs on the destination then, and what it lacks is here and nowhere else. So a connection that is lost ends
nothing: both sides keep what they have, and go on over another once they are told where it is.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from dirtylog.errors import (
    CancelledError,
    DirtylogError,
    DisconnectedError,
    PeerError,
    ProtocolError,
    UsageError,
)
from dirtylog.migration.address import Address, FileAddress
from dirtylog.migration.channel import HANDSHAKE_TIMEOUT, STALL_TIMEOUT, Channel
from dirtylog.migration.connections import Connections
from dirtylog.migration.economy import Economy
from dirtylog.migration.messages import Lacking, PassDone, PassEnd, Resume, Resumed
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.pacer import Pacer
from dirtylog.migration.parameters import Parameters
from dirtylog.migration.sender import Sender
from dirtylog.migration.statistics import Statistics, Status
from dirtylog.migration.urgent import Tally, UrgentAnswers


def check(address: Address, parameters: Parameters) -> None:
    """Find out whether a guest can be handed over before its memory.

    Raises:
        UsageError: to a file it cannot, and memory that is elsewhere already cannot be shared or compared.
    """
    if isinstance(address, FileAddress):
        raise UsageError("a file runs no guest before it has its memory", remedy="leave postcopy out")
    if parameters.share_memory or parameters.verify:
        raise UsageError("postcopy goes together with neither shared memory nor verification", remedy="leave one out")


class Postcopy:
    """Sends what is owed, over one pair of connections after another. Its thread calls `run`; the rest any may.

    Args:
        owed: nobody writes it any more.
        statistics: kept up to date. What is sent here counts as one more pass.
        connections: where further ones are opened.
        session: the migration's secret.
        enter: told each new status.
        rate: bytes a second that may be sent unasked; 0 for no limit.

    Attributes:
        lost: why there is no connection; None while there is.
    """

    def __init__(
        self,
        owed: OwedPages,
        statistics: Statistics,
        connections: Connections,
        session: bytes,
        enter: Callable[[Status], None],
        rate: Callable[[], int],
    ) -> None:
        self.lost: DirtylogError | None = None
        self._owed = owed
        self._tally = Tally(statistics)
        self._connections = connections
        self._session = session
        self._enter = enter
        self._rate = rate
        self._given_up = threading.Event()
        self._addresses: SimpleQueue[Address | None] = SimpleQueue()
        self._main: Channel | None = None
        self._urgent: UrgentAnswers | None = None

    def begin(self, main: Outlet, urgent: Outlet) -> None:
        """Say what is owed, and answer what is asked for from here on: loading the guest's state may touch memory."""
        self._adopt(main, urgent)
        for message in self._owed.announcements():
            main.send(message)

    def check(self) -> None:
        """Raise what ended the urgent channel, if anything did: it explains what ended the other."""
        if self._urgent is not None:
            self._urgent.check()

    def resume(self, address: Address) -> None:
        """Go on over new connections, as the old ones are lost."""
        self._enter(Status.POSTCOPY_RECOVER)
        self._addresses.put(address)

    def pause(self) -> None:
        """Cut the connections."""
        self._connections.cut()

    def give_up(self) -> None:
        """Have `run` fail; what the destination does not have by then it never will."""
        self._given_up.set()
        self._connections.abort()
        self._addresses.put(None)

    def run(self) -> None:
        """Send all that is owed; the destination has it when this returns.

        Raises:
            DisconnectedError: `give_up` was called.
        """
        while True:
            if self.lost is None:
                self._enter(Status.POSTCOPY_ACTIVE)
                try:
                    self._serve()
                    return
                except PeerError as error:
                    self.lost = error
                except CancelledError as error:
                    raise _unsent(error) from error
            self._reconnect(self.lost)

    def _adopt(self, main: Outlet, urgent: Outlet) -> None:
        if not isinstance(main, Channel) or not isinstance(urgent, Channel):
            raise UsageError("only a process can run a guest before it has its memory")
        self._main = main
        for channel in (main, urgent):
            channel.set_timeout(STALL_TIMEOUT)
        self._urgent = UrgentAnswers(urgent, self._owed, self._tally, main)

    def _serve(self) -> None:
        if self._main is None or self._urgent is None:
            raise DisconnectedError("there is no connection")
        try:
            self._send(self._main, self._urgent)
        except PeerError:
            self.check()
            raise

    def _send(self, main: Channel, urgent: UrgentAnswers) -> None:
        began = time.monotonic()
        sender: Final = Sender(main, (), Economy(()), None)
        pacer: Final = Pacer(urgent.wait, self._rate)
        pacer.begin()
        while batch := self._owed.take():
            sent = sender.send(batch)
            self._tally.count(batch, sent)
            pacer.pace(sent.bytes)
            self._tally.took(time.monotonic() - began)
        main.send(PassEnd(self._tally.number))
        done = main.expect(PassDone)
        if done.number != self._tally.number:
            raise ProtocolError(f"the destination has pass {done.number} when pass {self._tally.number} was sent")

    def _reconnect(self, lost: DirtylogError) -> None:
        while self.lost is not None:
            self._connections.close()
            self._enter(Status.POSTCOPY_PAUSED)
            address = self._addresses.get()
            if address is None or self._given_up.is_set():
                raise _unsent(lost) from lost
            try:
                self._go_on(address)
            except CancelledError as error:
                raise _unsent(error) from error
            except DirtylogError as error:  # of any kind: another address may do
                self.lost = error
            else:
                self.lost = None

    def _go_on(self, address: Address) -> None:
        """Find out what the destination lacks."""
        main = self._connections.open(address)
        if not isinstance(main, Channel):
            raise ProtocolError("nobody can answer in a file")
        main.set_timeout(HANDSHAKE_TIMEOUT)
        main.send(Resume(self._session))
        lacking: list[Lacking] = []
        left = self._owed.total
        while not isinstance(message := main.receive(), Resumed):
            if not isinstance(message, Lacking):
                raise main.unexpected(message, "instead of what it lacks")
            lacking.append(message)
            left -= len(message.runs)  # each has a page at least, and no page is named twice
            if left < 0:
                raise ProtocolError("the destination lacks more pages than there are")
        self._owed.replace(lacking)
        self._tally.owe(self._owed.pages)
        self._adopt(main, self._connections.join(address, self._session))


def _unsent(why: DirtylogError) -> DisconnectedError:
    return DisconnectedError(
        f"the rest of the guest's memory was not sent: {why.cause}",
        remedy="the guest cannot go on without it where it is",
    )

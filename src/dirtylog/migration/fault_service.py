"""What a destination does so that its guest gets what it waits for."""

import select
import threading
from collections.abc import Callable

from dirtylog.linux.wakeup import Wakeup
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.attention import Attention
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Request
from dirtylog.migration.protocol import Role
from dirtylog.migration.urgent_channel import UrgentChannel


class FaultService:
    """Asks the source for pages on the urgent channel, and takes them from there.

    At first it has a thread for that: whoever loads the guest's state may touch memory that is absent. Later the thread
    that takes all the other pages does that, too, see `join`.

    Args:
        channel: owned here from now on.
        ram: what is served.
        on_failure: told in the thread that it cannot go on.
    """

    def __init__(self, channel: Channel, ram: AbsentRAM, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._ram = ram
        self._on_failure = on_failure
        self._error: Exception | None = None
        self._closing = False
        self._stop = Wakeup()
        self._pages = UrgentChannel(channel, Role.DESTINATION)
        self._attention = Attention()
        self._attention.add(ram, self._ask)
        self._attention.add(ram.wakeup, self._wake)
        self._attention.add(channel, self._take)
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()

    def join(self) -> Attention:
        """End the thread; what it did is done from now on by who waits with this.

        Raises:
            DirtylogError: it could not go on.
        """
        self._stop.set()
        self._thread.join()
        self.check()
        return self._attention

    def check(self) -> None:
        """Raise what ended the thread, if anything did before `join`."""
        if self._error is not None:
            raise self._error

    def cut(self) -> None:
        """See `Channel.cut`."""
        self._channel.cut()

    def abort(self) -> None:
        """See `Channel.abort`."""
        self._channel.abort()

    def close(self) -> None:
        """End the thread and the channel; idempotent."""
        if not self._closing:
            self._closing = True
            self._stop.set()
            self._channel.abort()
            self._thread.join()
            self._channel.close()
            self._stop.close()

    def _run(self) -> None:
        try:
            self._ask()
            self._attention.wait(self._stop, select.POLLIN, 0)
        except Exception as error:  # noqa: BLE001 - raised by `check`
            if not self._closing:
                self._error = error
                self._on_failure()

    def _wake(self) -> None:
        self._ram.wakeup.clear()
        self._ask()

    def _ask(self) -> None:
        self._ram.serve(self._request)

    def _request(self, block: int, page: int) -> None:
        self._pages.send(Request, block, page)

    def _take(self) -> None:
        for block, page, contents in self._pages.receive():
            self._ram.answered(block, page, contents)
        self._ram.ask(self._request)

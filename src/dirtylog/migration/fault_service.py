"""What a destination does so that its guest gets what it waits for."""

import select
import threading
from collections.abc import Callable

import numpy as np

from dirtylog.errors import ProtocolError
from dirtylog.linux.wakeup import Wakeup
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.attention import Attention
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Page, Request, ZeroPages
from dirtylog.units import PAGE_SIZE


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
        self._buffer = np.empty(PAGE_SIZE, np.uint8)
        self._attention = Attention()
        self._attention.add(ram, self._ask)
        self._attention.add(ram.wakeup, self._wake)
        self._attention.add(channel, self._take_all)
        channel.read_ahead()
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
        self._send(self._ram.requests())

    def _send(self, requests: list[Request]) -> None:
        for request in requests:
            self._channel.send(request)

    def _take_all(self) -> None:
        self._take()
        while self._channel.has_buffered:
            self._take()
        self._send(self._ram.held_back())

    def _take(self) -> None:
        message = self._channel.receive()
        if isinstance(message, Page):
            self._ram.receive_page(self._channel, message, self._buffer)
        elif isinstance(message, ZeroPages):
            self._ram.zero_page(message)
        else:
            raise ProtocolError(f"the source sent {type(message).__name__} where only pages are expected")

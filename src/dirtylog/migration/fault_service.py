"""The destination's thread that has fetched what its guest waits for."""

import select
import threading
from collections.abc import Callable

import numpy as np

from dirtylog.errors import ProtocolError
from dirtylog.linux.wakeup import Wakeup
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Page, ZeroPages
from dirtylog.units import PAGE_SIZE


class FaultService:
    """Asks the source for pages on the urgent channel, and takes them from there.

    One thread does both: each change of threads would cost the guest as much as the network.

    Args:
        channel: owned here from now on.
        ram: what is served.
        on_failure: told in the thread that it cannot go on.
    """

    def __init__(self, channel: Channel, ram: AbsentRAM, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._ram = ram
        self._on_failure = on_failure
        self._closing = False
        self._error: Exception | None = None
        self._stop = Wakeup()
        self._buffer = np.empty(PAGE_SIZE, np.uint8)
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and the channel; idempotent."""
        if not self._closing:
            self._closing = True
            self._stop.set()
            self._channel.abort()
            self._thread.join()
            self._channel.close()
            self._stop.close()

    def check(self) -> None:
        """Raise what ended it, if anything but `close` did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - raised by `check`
            if not self._closing:
                self._error = error
                self._on_failure()

    def _serve(self) -> None:
        poll = select.poll()
        for file in (self._ram, self._ram.wakeup, self._channel, self._stop):
            poll.register(file.fileno(), select.POLLIN)
        self._ask()
        while not self._closing:
            while self._channel.has_buffered:
                self._take()
            for fd, _ in poll.poll():
                if fd == self._channel.fileno():
                    self._take()
                elif fd != self._stop.fileno():
                    self._ram.wakeup.clear()
                    self._ask()

    def _ask(self) -> None:
        for request in self._ram.requests():
            self._channel.send(request)

    def _take(self) -> None:
        message = self._channel.receive()
        if isinstance(message, Page):
            self._ram.receive_page(self._channel, message, self._buffer)
        elif isinstance(message, ZeroPages):
            self._ram.zero_page(message)
        else:
            raise ProtocolError(f"the source sent {type(message).__name__} where only pages are expected")

"""What a destination does with messages about memory, channel by channel."""

import threading
import time
from collections.abc import Callable

from dirtylog.linux.process import thread_starved_ns
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import EncodedPages, Message, Pages, PassDone, PassEnd, ZeroPages
from dirtylog.migration.ram import IncomingRAM
from dirtylog.units import PAGE_SIZE


class Filler:
    """Takes one channel's messages, in the one thread that uses the channel."""

    def __init__(self, channel: Channel, ram: IncomingRAM) -> None:
        self._channel = channel
        self._ram = ram
        self._starved = thread_starved_ns()
        self._decoded = 0
        self._decode_ns = 0

    def take(self, message: Message) -> None:
        """Do what a message says, and receive what follows it.

        Raises:
            RefusedError: the source gives up.
            ProtocolError: the message is not about memory, or about memory that is not there.
        """
        if isinstance(message, Pages):
            self._channel.receive_into(self._ram.place(message))
        elif isinstance(message, EncodedPages):
            self._decode(message)
        elif isinstance(message, ZeroPages):
            self._ram.zero(message)
        elif isinstance(message, PassEnd):
            self._end_pass(message.number)
        else:
            raise self._channel.unexpected(message, "where only memory is expected")

    def _decode(self, message: EncodedPages) -> None:
        data = bytearray(message.size)
        self._channel.receive_into([memoryview(data)])
        began = time.monotonic_ns()
        self._ram.decode(message, data)
        self._decode_ns += time.monotonic_ns() - began
        self._decoded += message.pages * PAGE_SIZE

    def _end_pass(self, number: int) -> None:
        starved = thread_starved_ns()
        self._channel.send(PassDone(number, starved - self._starved, self._decoded, self._decode_ns))
        self._starved, self._decoded, self._decode_ns = starved, 0, 0


class SideFiller:
    """A further channel and the thread that serves it.

    Args:
        channel: owned here from now on.
        ram: what it fills.
        on_failure: told in the thread that it cannot go on.
    """

    def __init__(self, channel: Channel, ram: IncomingRAM, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._ram = ram
        self._on_failure = on_failure
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="side-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the conversation and the thread; nothing is written to memory afterwards. Idempotent."""
        self._closing = True
        self._channel.abort()
        self._thread.join()
        self._channel.close()

    def check(self) -> None:
        """Raise what ended it, if anything but `close` did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            filler = Filler(self._channel, self._ram)
            while True:
                filler.take(self._channel.receive())
        except Exception as error:  # noqa: BLE001 - raised by `check`
            if not self._closing:
                self._error = error
                self._on_failure()

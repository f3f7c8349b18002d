"""When a guest was last heard of in one place, and first in another: its serial output, read as it comes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dirtylog.errors import GuestError, PeerError

ARRIVAL_SECONDS: Final = 15.0
"""How long what a guest sent may take to be heard after its migration."""

_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Pulse:
    """A character.

    Attributes:
        at: when it was read, by `time.monotonic`.
        character: which.
    """

    at: float
    character: int


class Listener:
    """What was heard of a guest; see `listening`.

    Attributes:
        first: the first character; None before it has come.
        last: the last one until now.
    """

    def __init__(self) -> None:
        self.first: Pulse | None = None
        self.last: Pulse | None = None
        self._heard = threading.Condition()

    def listen(self, fd: int) -> None:
        """Read until nobody can write any more."""
        while data := os.read(fd, _PIECE):
            now = time.monotonic()
            with self._heard:
                self.first = self.first or Pulse(now, data[0])
                self.last = Pulse(now, data[-1])
                self._heard.notify_all()

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until what was heard fulfils a condition; False if it never does."""
        with self._heard:
            return self._heard.wait_for(condition, ARRIVAL_SECONDS)


@contextmanager
def listening(path: Path) -> Iterator[Listener]:
    """Make a FIFO, and read it in a thread of its own; whoever else writes there has to end before the block does."""
    os.mkfifo(path)
    with ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else the kernel waits here for a writer
        stack.callback(os.close, fd)
        os.set_blocking(fd, True)
        pool = stack.enter_context(ThreadPoolExecutor(1, "listener"))
        listener = Listener()
        with path.open("wb"):  # as long as we could write, it has no end
            listened = pool.submit(listener.listen, fd)
            yield listener
        listened.result()


def silence(source: Listener, destination: Listener) -> float:
    """Seconds from the last character of a guest on the source to its first on the destination, where it runs now.

    Raises:
        GuestError: that is not the one after.
        PeerError: it is not heard there.
    """
    destination.until(lambda: destination.first is not None)
    first = destination.first
    if first is None:
        raise PeerError(f"nothing was heard of the guest within {ARRIVAL_SECONDS:.0f} s after its migration")
    before = (first.character - 1) % 256
    # On a busy host, what was sent first may be heard second.
    source.until(lambda: source.last is not None and source.last.character == before)
    last = source.last
    if last is None or last.character != before:
        raise GuestError(f"the guest was heard last as {last}, and then as {first}, which is not the next character")
    return first.at - last.at

"""Ending a command that polls, on signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts(*numbers: int) -> Iterator[threading.Event]:
    """An event that signals set. An exception could come in the midst of a reply, and lose a part of it.

    Args:
        numbers: of the signals; SIGINT and SIGTERM if there are none.
    """
    interrupted = threading.Event()
    numbers = numbers or (signal.SIGINT, signal.SIGTERM)
    previous = [(number, signal.signal(number, lambda *_: interrupted.set())) for number in numbers]
    try:
        yield interrupted
    finally:
        for number, handler in previous:
            signal.signal(number, handler)

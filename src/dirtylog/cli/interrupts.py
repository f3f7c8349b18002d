"""Ending a command that polls, on SIGINT and SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. An exception could come in the midst of a reply, and lose a part of it."""
    interrupted = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [(number, signal.signal(number, lambda *_: interrupted.set())) for number in numbers]
    try:
        yield interrupted
    finally:
        for number, handler in previous:
            signal.signal(number, handler)

"""Processes that are started here, and end with what they are for."""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Final

_END_SECONDS: Final = 5.0


@contextmanager
def running(
    command: Sequence[str],
    log: IO[bytes],
    *,
    stdin: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process whose output goes to a log, and end it with the block; in the main thread only.

    It gets a session of its own, so that Ctrl-C reaches the benchmark alone, which then ends it.
    """
    with ExitStack() as stack:
        with _signals_deferred():
            process = subprocess.Popen(
                list(command), stdin=stdin, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            stack.callback(_end, process)
        yield process


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Act on SIGINT and SIGTERM after the block, which else could lose a process that it has just started."""
    arrived: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for each in arrived:
        signal.raise_signal(each)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()

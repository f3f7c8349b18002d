"""Those who write stamps, without a pause, until they are told to stand still.

Each loop of a writer takes from the board which pages to write and the least stamp of the round, counts on from there
or from its own last stamp, stores what it counts in pages, and then notes the last of it on the board.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from dirtylog.errors import HostError
from dirtylog.testing.board import FIRST, LAST_COUNT, LEAST, SPAN, STAMPED, STANDING, STILL, Board
from dirtylog.testing.contract import Case

BOUND: Final = 60.0
"""Seconds until writers that do not do what they are to are given up. It takes milliseconds; the rest is for a busy
host."""

WRITERS: Final = 2

_POLL_SECONDS: Final = 5e-5
_EAGER_POLLS: Final = 20
_FAULTS: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_PROCESS: Final = Path(__file__).with_name("stamping_process.py")


class Writers(ABC):
    """Some that write at the same time. They stand still at first.

    Attributes:
        count: how many.
    """

    count: int

    @abstractmethod
    def resume(self) -> None:
        """Let them write."""

    @abstractmethod
    def stand(self) -> None:
        """Return once they stand still.

        Raises:
            HostError: they do not within `BOUND`.
            Exception: what ended one of them.
        """

    @abstractmethod
    def close(self) -> None:
        """End them; idempotent."""

    @abstractmethod
    def check(self) -> None:
        """See that all are there.

        Raises:
            Exception: what ended one of them.
        """

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have them stand still while the context is entered."""
        self.stand()
        yield
        self.resume()

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for what they do.

        Raises:
            HostError: they do not within `BOUND`; ``what`` says what.
            Exception: what ended one of them.
        """
        deadline = time.monotonic() + BOUND
        polls = 0
        while not done():
            self.check()
            if time.monotonic() > deadline:
                raise HostError(f"writers did not {what} within {BOUND:.0f} s", remedy="the host is overloaded")
            polls += 1
            time.sleep(0 if polls < _EAGER_POLLS else _POLL_SECONDS)


class WriterThreads(Writers):
    """Writers with a thread each.

    Args:
        board: theirs.
        count: how many.
        write: called with a writer's number; to return soon after the board says that they are to stand still.
        close: called once they have ended.
    """

    def __init__(
        self, board: Board, count: int, write: Callable[[int], None], close: Callable[[], None] = lambda: None
    ) -> None:
        self.count = count
        self._board = board
        self._write = write
        self._close = close
        self._changed = threading.Condition()
        self._turn = 0
        self._writing = 0
        self._ended = False
        self._error: Exception | None = None
        board.still = True
        self._threads = [
            threading.Thread(target=self._main, args=(index,), name=f"writer{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        """Let them write."""
        self.check()
        self._board.still = False
        with self._changed:
            self._turn += 1
            self._writing = self.count
            self._changed.notify_all()

    def stand(self) -> None:
        """Return once they stand still."""
        self._board.still = True
        with self._changed:
            if not self._changed.wait_for(lambda: not self._writing, BOUND):
                raise HostError(f"writers did not stand still within {BOUND:.0f} s", remedy="the host is overloaded")
        self.check()

    def check(self) -> None:
        """See that all are there."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End them; idempotent."""
        if self._ended:
            return
        self._board.still = True
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(BOUND)
            if thread.is_alive():
                raise HostError(f"{thread.name} did not end within {BOUND:.0f} s", remedy="the host is overloaded")
        self._close()

    def _main(self, index: int) -> None:
        # Others than the main thread should leave signals alone: Python's handlers run there only.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        turn = 0
        while self._wait_for_turn(turn):
            turn += 1
            try:
                self._write(index)
            except Exception as error:  # noqa: BLE001 - raised by their owner
                self._error = error
            with self._changed:
                self._writing -= 1
                self._changed.notify_all()

    def _wait_for_turn(self, last: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._turn > last or self._ended)
            return not self._ended


class WriterProcesses(Writers):
    """Processes that share the memory.

    Args:
        fd: the memory's descriptor.
        board: theirs.
        place: the index of the first one's stamp among a page's 32-bit words.
        seed: chooses pages.
    """

    count = WRITERS

    def __init__(self, fd: int, board: Board, place: int, seed: int) -> None:
        self._board = board
        board.still = True
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        try:
            for index in range(self.count):
                self._start(fd, place + index, seed + index, index)
        except BaseException:
            self.close()
            raise

    def _start(self, fd: int, place: int, seed: int, index: int) -> None:
        board, pages = self._board.mapping.fd, self._board.pages
        words = (LEAST, STILL, FIRST, SPAN, STAMPED + 16 * index, STANDING + 16 * index)
        theirs, ours = os.pipe()
        self._pipes.append(ours)
        try:
            process = subprocess.Popen(
                [sys.executable, "-IS", _PROCESS, *map(str, (fd, board, pages, place, seed, os.getpid(), *words))],
                pass_fds=(fd, board),
                stdin=theirs,
                start_new_session=True,  # Ctrl-C is for its owner
            )
        finally:
            os.close(theirs)
        self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Their numbers."""
        return [process.pid for process in self._processes]

    def resume(self) -> None:
        """Let them write."""
        self.stand()
        self._board.still = False
        for pipe in self._pipes:
            os.write(pipe, b"\0")
        self.wait_until(lambda: self._board.standing(self.count) == 0, "begin")

    def stand(self) -> None:
        """Return once they stand still."""
        self._board.still = True
        self.wait_until(lambda: self._board.standing(self.count) == self.count, "stand still")

    def check(self) -> None:
        """See that all are there."""
        for process in self._processes:
            if process.poll() is not None:
                raise HostError(f"a process that writes ended with status {process.returncode}")

    def close(self) -> None:
        """End them; idempotent."""
        while self._pipes:
            os.close(self._pipes.pop())
        for process in self._processes:
            process.kill()
            process.wait()


def stores(case: Case, board: Board, place: int, seed: int) -> Callable[[int], None]:
    """What a `WriterThreads` calls to have this process's threads stamp a case's pages.

    Args:
        case: whose.
        board: theirs.
        place: the index of the first one's stamp among a page's 32-bit words; the others' follow.
        seed: chooses pages.
    """
    counts = np.arange(1, case.stores_at_once + 1)
    choices = [np.random.default_rng((seed, index)) for index in range(WRITERS)]

    def write(writer: int) -> None:
        choice, stamp = choices[writer], 0
        while not board.still:
            first, span = board.window
            stamp = max(stamp, board.least)
            stamps = np.minimum(stamp + counts, stamp | LAST_COUNT)
            case.stamp((first + choice.integers(span, size=counts.size)) % board.pages, place + writer, stamps)
            stamp = int(stamps[-1])
            board.note(writer, stamp)

    return write

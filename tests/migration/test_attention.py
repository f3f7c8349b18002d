import select
import socket
from collections.abc import Iterator

import pytest
from support.waiting import BOUND, Task, wait_until

from dirtylog.linux.wakeup import Wakeup
from dirtylog.migration.attention import Attention


class Waiting:
    """One that waits for a socket, and counts how often another flag was set meanwhile."""

    def __init__(self, near: socket.socket, far: socket.socket, flag: Wakeup) -> None:
        self.near, self.far, self.flag = near, far, flag
        self.served = 0
        self.attention = Attention()
        self.attention.add(flag, self._serve)

    def _serve(self) -> None:
        self.flag.clear()
        self.served += 1


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    near, far = socket.socketpair()
    flag = Wakeup()
    with near, far:
        yield Waiting(near, far, flag)
    flag.close()


def test_others_are_served_until_the_file_is_ready(waiting: Waiting) -> None:
    task = Task(lambda: waiting.attention.wait(waiting.near, select.POLLIN, 0))
    for count in (1, 2, 3):
        waiting.flag.set()
        wait_until(lambda count=count: waiting.served == count, "the flag was served")  # type: ignore[misc]
    assert task.running
    waiting.far.send(b"x")
    task.join()


def test_others_are_served_though_the_file_is_always_ready(waiting: Waiting) -> None:
    waiting.flag.set()
    waiting.attention.wait(waiting.near, select.POLLOUT, BOUND)
    assert waiting.served == 1
    waiting.attention.wait(waiting.near, select.POLLOUT, BOUND)
    assert waiting.served == 1


def test_end_of_a_file_counts_as_ready(waiting: Waiting) -> None:
    waiting.far.shutdown(socket.SHUT_WR)
    waiting.attention.wait(waiting.near, select.POLLIN, BOUND)
    assert waiting.near.recv(1) == b""


def test_file_that_is_not_ready_in_time_is_told_of(waiting: Waiting) -> None:
    with pytest.raises(BlockingIOError):
        waiting.attention.wait(waiting.near, select.POLLIN, 0.01)


def test_what_a_handler_raises_ends_the_wait(waiting: Waiting) -> None:
    def fail() -> None:
        raise ValueError("no")

    waiting.attention.add(waiting.far, fail)
    waiting.near.send(b"x")
    with pytest.raises(ValueError, match="no"):
        waiting.attention.wait(waiting.near, select.POLLIN, BOUND)


def test_file_that_is_removed_is_not_served_any_more(waiting: Waiting) -> None:
    waiting.attention.wait(waiting.near, select.POLLOUT, BOUND)
    waiting.attention.remove(waiting.flag)
    waiting.flag.set()
    waiting.attention.wait(waiting.near, select.POLLOUT, BOUND)
    with pytest.raises(BlockingIOError):
        waiting.attention.wait(waiting.near, select.POLLIN, 0.01)
    assert waiting.served == 0


def test_others_are_served_until_something_is_so(waiting: Waiting) -> None:
    waiting.flag.set()
    assert waiting.attention.until(lambda: waiting.served == 1, BOUND)
    assert not waiting.attention.until(lambda: waiting.served == 2, 0.01)


def test_others_are_served_at_once_where_there_is_something_to_do(waiting: Waiting) -> None:
    waiting.attention.serve()
    assert waiting.served == 0
    waiting.flag.set()
    waiting.attention.serve()
    waiting.attention.serve()
    assert waiting.served == 1

import select
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from support.waiting import BOUND, Task, wait_until

from dirtylog.linux.wakeup import Wakeup
from dirtylog.migration import attention as attention_module
from dirtylog.migration.attention import Attention, BusyPolling


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


def test_time_is_up_though_there_is_always_something_to_do(waiting: Waiting) -> None:
    waiting.attention.add(waiting.far, lambda: None)
    waiting.near.send(b"x")
    assert not waiting.attention.until(lambda: False, 0.01)


def test_others_are_served_at_once_where_there_is_something_to_do(waiting: Waiting) -> None:
    waiting.attention.serve()
    assert waiting.served == 0
    waiting.flag.set()
    waiting.attention.serve()
    waiting.attention.serve()
    assert waiting.served == 1


class Looks:
    """A clock, and a poll that takes a microsecond of it and finds something at the given times."""

    def __init__(self, *found: float) -> None:
        self.now = 100.0
        self.count = 0
        self._found = [100.0 + each for each in found]

    def monotonic(self) -> float:
        return self.now

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        assert timeout == 0
        self.count += 1
        self.now += 1e-6
        if self._found and self.now >= self._found[0]:
            del self._found[0]
            return [(7, select.POLLIN)]
        return []


def _busy(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> tuple[BusyPolling, select.poll]:
    monkeypatch.setattr(attention_module, "time", SimpleNamespace(monotonic=looks.monotonic))
    return BusyPolling(), cast(select.poll, looks)


class TestBusyPolling:
    def test_who_had_nothing_to_do_sleeps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks()
        busy, poll = _busy(looks, monkeypatch)
        assert busy.poll(poll, None) == []
        assert looks.count == 0

    def test_it_looks_for_a_while_after_something_came(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks()
        busy, poll = _busy(looks, monkeypatch)
        busy.extend()
        assert busy.poll(poll, None) == []
        assert looks.count == pytest.approx(200, abs=2)
        assert busy.poll(poll, None) == []
        assert looks.count == pytest.approx(200, abs=2)

    def test_it_ends_with_what_it_finds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks(50e-6)
        busy, poll = _busy(looks, monkeypatch)
        busy.extend()
        assert busy.poll(poll, None) == [(7, select.POLLIN)]
        assert looks.count == pytest.approx(50, abs=2)

    def test_it_keeps_to_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks()
        busy, poll = _busy(looks, monkeypatch)
        busy.extend()
        assert busy.poll(poll, looks.now) == []
        assert looks.count == 0
        assert busy.poll(poll, looks.now + 50e-6) == []
        assert looks.count == pytest.approx(50, abs=2)

    def test_it_takes_a_quarter_of_the_time_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks(*(number * 100e-6 for number in range(1, 100_000)))
        busy, poll = _busy(looks, monkeypatch)
        slept = 0.0
        while looks.now < 105.0:
            busy.extend()
            if not busy.poll(poll, None):
                slept += 100e-6
                looks.now += 100e-6
        assert slept / 5 == pytest.approx(0.75, abs=0.02)

    def test_it_rests_for_some_milliseconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = Looks(*(number * 100e-6 for number in range(1, 100_000)))
        busy, poll = _busy(looks, monkeypatch)
        rests: list[float] = []
        since: float | None = None
        while looks.now < 101.0:
            busy.extend()
            if busy.poll(poll, None):
                if since is not None:
                    rests.append(looks.now - since)
                since = None
            else:
                since = since or looks.now
                looks.now += 100e-6
        assert len(rests) > 10
        assert min(rests) > 0.015

    def test_who_serves_others_looks_before_it_sleeps(self, waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
        busy = BusyPolling()
        said: list[str] = []

        def look(poll: select.poll, deadline: float | None) -> list[tuple[int, int]]:
            assert deadline is not None
            said.append("looked")
            return poll.poll(0)

        monkeypatch.setattr(busy, "poll", look)
        monkeypatch.setattr(busy, "extend", lambda: said.append("extended"))
        attention = Attention(busy)
        attention.add(waiting.flag, waiting.flag.clear)
        attention.wait(waiting.near, select.POLLOUT, BOUND)
        assert said == ["looked"]
        waiting.flag.set()
        attention.wait(waiting.near, select.POLLOUT, BOUND)
        assert said == ["looked", "looked", "extended"]

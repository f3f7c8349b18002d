import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.waiting import BOUND, Task, wait_until

from dirtylog.cli import serial_output
from dirtylog.cli.serial_output import SerialOutput


def _unexpected(error: OSError) -> None:
    raise AssertionError(error)


class Pipe:
    """A pipe whose reader reads only when told."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._open = {self.reader, self.writer}

    def close(self, *ends: int) -> None:
        for end in ends or tuple(self._open):
            self._open.remove(end)
            os.close(end)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += os.read(self.reader, size - len(data))
        return data


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@contextmanager
def _held_up(pipe: Pipe) -> Iterator[SerialOutput]:
    """An output that waits for its reader; the reader reads everything in the end, so that its thread ends."""
    output = SerialOutput(pipe.writer, _unexpected)
    capacity = 1 << 16
    output(b"x" * (capacity + 1))
    yield output
    reader = Task(lambda: _read_all(pipe))
    output.close()
    wait_until(lambda: not _threads(), "the thread ended")
    pipe.close(pipe.writer)
    reader.join()


def _read_all(pipe: Pipe) -> None:
    while os.read(pipe.reader, 1 << 16):
        pass


def _send_all(output: SerialOutput) -> None:
    for _ in range(1000):
        output(b"y" * 1000)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "serial-output"]


def test_bytes_come_out_in_order(pipe: Pipe) -> None:
    output = SerialOutput(pipe.writer, _unexpected)
    for data in (b"a", b"bc", b"", b"d"):
        output(data)
    assert pipe.read(4) == b"abcd"
    output.close()


def test_close_writes_what_waits_and_ends_the_thread(pipe: Pipe) -> None:
    output = SerialOutput(pipe.writer, _unexpected)
    for number in range(1000):
        output(bytes((number % 256,)))
    output.close()
    assert not _threads()
    assert pipe.read(1000) == bytes(number % 256 for number in range(1000))


def test_close_twice_is_fine(pipe: Pipe) -> None:
    output = SerialOutput(pipe.writer, _unexpected)
    output.close()
    output.close()


def test_reader_that_stops_loses_bytes_and_holds_nobody_up(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_output, "_MAX_BACKLOG", 100_000)
    with _held_up(pipe) as output:
        sender = Task(lambda: _send_all(output))
        sender.join()
        assert output._taken <= 101_000


def test_reader_that_goes_on_gets_new_bytes(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_output, "_MAX_BACKLOG", 100_000)
    with _held_up(pipe) as output:
        for _ in range(100):
            output(b"y" * 1000)
        pipe.read(output._taken)
        wait_until(lambda: output._written == output._taken, "all was written")
        output(b"z")
        assert pipe.read(1) == b"z"


def test_close_does_not_wait_for_a_reader_that_stopped(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_output, "_CLOSE_SECONDS", 0.01)
    with _held_up(pipe) as output:
        output.close()
        assert _threads()


def test_error_is_told_once_and_what_comes_later_is_thrown_away(pipe: Pipe) -> None:
    errors: list[OSError] = []
    told = threading.Event()

    def note(error: OSError) -> None:
        errors.append(error)
        told.set()

    pipe.close(pipe.reader)
    output = SerialOutput(pipe.writer, note)
    output(b"a")
    assert told.wait(BOUND)
    taken = output._taken
    for _ in range(10):
        output(b"b")
    assert output._taken == taken
    output.close()
    assert [type(error) for error in errors] == [BrokenPipeError]

import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from support.connections import connections
from support.waiting import Task, wait_until

from dirtylog.linux.mapping import MemfdMapping, memory_of
from dirtylog.migration.stream import PlainStream
from dirtylog.units import KIB, MIB

Pair = tuple[PlainStream, PlainStream, socket.socket]


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The streams of both ends, and the socket of the first."""
    if request.param == "unix":
        one, other = socket.socketpair()
        with one, other:
            yield PlainStream(one), PlainStream(other), one
    else:
        with connections() as (one, other):
            yield PlainStream(one), PlainStream(other), one


def test_more_buffers_than_one_call_takes_arrive_in_order(pair: Pair) -> None:
    one, other, _ = pair
    contents = np.random.default_rng(7).integers(0, 256, 3 * MIB, np.uint8)
    parts = [memoryview(contents)[at : at + 1000] for at in range(0, contents.size, 1000)]  # type: ignore[arg-type]
    sent: list[int] = []
    task = Task(lambda: sent.append(one.send(parts)))
    received = np.zeros_like(contents)
    odd = [memoryview(received)[at : at + 777] for at in range(0, received.size, 777)]  # type: ignore[arg-type]
    assert other.receive_into(odd)
    task.join()
    assert sent == [contents.size]
    assert np.array_equal(received, contents)


def test_parts_of_files_arrive_among_others(pair: Pair) -> None:
    one, other, _ = pair
    with closing(MemfdMapping("contents", MIB)) as mapping:
        mapping.array.view(np.uint64)[:] = np.arange(mapping.size // 8)
        parts = [memoryview(b"head"), mapping.part(0, 256 * KIB), mapping.part(512 * KIB, 516 * KIB)]
        expected = b"".join(memory_of(part) for part in parts)
        task = Task(lambda: one.send(parts))
        received = bytearray(len(expected))
        assert other.receive_into([memoryview(received)])
        task.join()
    assert received == expected


def test_end_before_all_came_is_told(pair: Pair) -> None:
    one, other, sock = pair
    one.send([memoryview(b"some")])
    sock.shutdown(socket.SHUT_WR)
    assert not other.receive_into([memoryview(bytearray(5))])


def test_what_has_arrived_is_known_and_not_taken(pair: Pair) -> None:
    one, other, sock = pair
    assert not other.has_arrived()
    one.send([memoryview(b"x")])
    wait_until(other.has_arrived, "the byte arrived")
    assert not other.has_buffered
    byte = bytearray(1)
    assert other.receive_into([memoryview(byte)])
    assert byte == b"x"
    assert not other.has_arrived()
    sock.shutdown(socket.SHUT_WR)
    wait_until(other.has_arrived, "the end arrived")


def test_what_is_there_is_received_without_waiting_for_more(pair: Pair) -> None:
    one, other, sock = pair
    buffer = memoryview(bytearray(8))
    with pytest.raises(BlockingIOError):
        other.receive_available(buffer)
    one.send([memoryview(b"some")])
    wait_until(other.has_arrived, "it arrived")
    assert other.receive_available(buffer) == 4
    assert bytes(buffer[:4]) == b"some"
    sock.shutdown(socket.SHUT_WR)
    wait_until(other.has_arrived, "the end arrived")
    assert other.receive_available(buffer) == 0


def test_descriptors_pass_over_unix_sockets_only(pair: Pair) -> None:
    one, _, sock = pair
    assert one.passes_files is (sock.family == socket.AF_UNIX)

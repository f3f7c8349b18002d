import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.require import require
from support.waiting import BOUND, Task

from dirtylog.linux.sockets import (
    connect_unix,
    hear_out,
    keep_alive,
    listen_tcp,
    peer_name,
    receive_files,
    set_buffers,
    set_timeouts,
    shut_down,
)
from dirtylog.units import MIB


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def _buffers(sock: socket.socket) -> tuple[int, int]:
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
    )


def test_buffers_are_as_large_as_asked_or_as_allowed(pair: tuple[socket.socket, socket.socket]) -> None:
    before = _buffers(pair[0])
    set_buffers(pair[0], 4 * MIB)
    after = _buffers(pair[0])
    assert all(now >= then for now, then in zip(after, before, strict=True))
    assert all(now <= 8 * MIB for now in after)  # the kernel doubles what is asked for (socket(7))


class _OrdinaryUsersSocket(socket.socket):
    """Refuses what takes a privilege, and writes down the rest."""

    asked: list[tuple[int, int]]

    def setsockopt(self, level: int, option: int, value: object, *_: object) -> None:
        if option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
            raise PermissionError
        assert isinstance(value, int)
        self.asked.append((option, value))


def test_ordinary_user_asks_for_what_is_allowed() -> None:
    with _OrdinaryUsersSocket() as sock:
        sock.asked = []
        set_buffers(sock, MIB)
        assert sock.asked == [(socket.SO_SNDBUF, MIB), (socket.SO_RCVBUF, MIB)]


def test_receive_fails_after_the_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    set_timeouts(pair[0], 0.02)
    began = time.monotonic()
    with pytest.raises(BlockingIOError):
        pair[0].recv(1)
    assert time.monotonic() - began >= 0.015


def test_send_fails_after_the_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    set_timeouts(pair[0], 0.02)

    def send_for_ever() -> None:
        while True:
            pair[0].send(bytes(MIB))

    with pytest.raises(BlockingIOError):
        send_for_ever()


@pytest.mark.parametrize(("seconds", "timeval"), [(0.0, (0, 0)), (1.25, (1, 250_000)), (30.0, (30, 0))])
def test_both_directions_have_the_timeout(
    pair: tuple[socket.socket, socket.socket], seconds: float, timeval: tuple[int, int]
) -> None:
    set_timeouts(pair[0], seconds)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        set_to, microseconds = struct.unpack("qq", pair[0].getsockopt(socket.SOL_SOCKET, option, 16))
        assert set_to == timeval[0]
        assert timeval[1] <= microseconds <= timeval[1] + 10_000  # the kernel counts in ticks


def test_timeout_leaves_the_socket_blocking(pair: tuple[socket.socket, socket.socket]) -> None:
    set_timeouts(pair[0], 5.0)
    assert pair[0].getblocking()
    pair[1].send(b"x")
    assert pair[0].recv(1) == b"x"


def test_kept_alive_connection_is_probed_within_half_a_minute() -> None:
    with socket.socket() as sock:
        keep_alive(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count <= 30


@pytest.mark.parametrize(("sent", "lost"), [(0, False), (1, False), (2, False), (3, True)])
def test_descriptors_come_with_their_bytes_and_what_is_lost_is_told(
    pair: tuple[socket.socket, socket.socket], sent: int, lost: bool
) -> None:
    one, other = pair
    if sent:
        socket.send_fds(one, [b"xy"], [one.fileno()] * sent)
    else:
        one.sendall(b"xy")
    data, files, told = receive_files(other, 1, 2)
    try:
        assert (data, len(files), told) == (b"x", min(sent, 2), lost)
        assert all(os.path.sameopenfile(file, one.fileno()) for file in files)
        assert not any(map(os.get_inheritable, files))
    finally:
        for file in files:
            os.close(file)


def test_connection_to_a_path_keeps_its_timeouts(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/x")
        server.listen()
        with connect_unix(f"{tmp_path}/x", 0.02) as sock, pytest.raises(BlockingIOError):
            sock.recv(1)


def test_nobody_at_a_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect_unix(f"{tmp_path}/x", 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_listening_socket_does_not_block_and_takes_connections(host: str) -> None:
    with listen_tcp(host, 0, 1) as server:
        with pytest.raises(BlockingIOError):
            server.accept()
        with socket.create_connection(server.getsockname()[:2]):
            pass


def test_shut_down_ends_what_waits_and_what_is_gone_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    task = Task(lambda: one.recv(1))
    shut_down(one, socket.SHUT_RDWR)
    task.join()
    other.close()
    shut_down(one, socket.SHUT_RDWR)
    one.close()
    shut_down(one, socket.SHUT_RDWR)


class TestHearOut:
    def test_peer_reads_what_was_said_and_what_it_says_is_thrown_away(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        one, other = pair
        one.sendall(b"last words")
        task = Task(lambda: hear_out(one, BOUND))
        other.sendall(bytes(10 * MIB))
        assert other.recv(100) == b"last words"
        assert other.recv(1) == b""
        other.close()
        task.join()

    def test_silent_peer_is_waited_for_only_so_long(self, pair: tuple[socket.socket, socket.socket]) -> None:
        hear_out(pair[0], 0.02)
        assert pair[1].recv(1) == b""

    def test_peer_that_has_gone_is_no_error(self, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[1].close()
        hear_out(pair[0], BOUND)


def test_peer_over_a_unix_socket_is_named_by_its_process(pair: tuple[socket.socket, socket.socket]) -> None:
    assert peer_name(pair[0]) == f"process {os.getpid()} of user {os.getuid()}"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_peer_over_tcp_is_named_by_its_address(host: str, shown: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        try:
            server.bind((host, 0))
        except OSError as error:
            require("ipv6", False, f"this host has no {host}: {error}")
        server.listen()
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0] as accepted:
            assert peer_name(accepted) == f"{shown}:{client.getsockname()[1]}"


def test_peer_that_was_never_there_is_named_too() -> None:
    with socket.socket() as sock:
        assert peer_name(sock) == "somebody who has gone"

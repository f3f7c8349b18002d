"""What Python's sockets have no words for."""

import array
import contextlib
import socket
import struct
import time
from typing import Final

from dirtylog.units import KIB

_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h
_SO_RCVBUFFORCE: Final = 33
_DRAIN_SIZE: Final = 64 * KIB
_UCRED: Final = struct.Struct("iII")


def set_buffers(sock: socket.socket, size: int) -> None:
    """Have the kernel buffer ``size`` bytes each way, or as much as an ordinary user may ask for."""
    for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:  # past the system's limit only with CAP_NET_ADMIN; the limit is applied silently here
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


def keep_alive(sock: socket.socket) -> None:
    """Have a TCP connection fail within half a minute of its peer's host going silent (tcp(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def set_timeouts(sock: socket.socket, seconds: float) -> None:
    """Have blocking sends and receives fail with BlockingIOError when nothing moves for ``seconds``; 0 for never.

    Unlike Python's own timeouts, this leaves each call a single system call.
    """
    timeval = struct.pack("qq", int(seconds), int(seconds % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def connect_unix(path: str, timeout: float) -> socket.socket:
    """A connection to who listens at a path; its timeouts stay those of `set_timeouts`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        set_timeouts(sock, timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_tcp(host: str, port: int, backlog: int) -> socket.socket:
    """A non-blocking socket that listens at the first address that a host has."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    sock = socket.create_server(where[:2], family=family, backlog=backlog)
    sock.setblocking(False)
    return sock


def shut_down(sock: socket.socket, how: int) -> None:
    """End one direction or both (shutdown(2)), in whichever thread waits there."""
    with contextlib.suppress(OSError):  # the peer was quicker; or closed here already, which is as good
        sock.shutdown(how)


def hear_out(sock: socket.socket, seconds: float) -> None:
    """Say no more, and throw away what arrives until the peer closes, falls silent or has talked for ``seconds``.

    A close with unread bytes would be a reset, which can overtake what was said last.
    """
    deadline = time.monotonic() + seconds
    set_timeouts(sock, seconds)
    try:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(_DRAIN_SIZE) and time.monotonic() < deadline:
            pass
    except OSError:  # gone, or silent for too long: nobody left to be polite to
        return


def peer_name(sock: socket.socket) -> str:
    """Who is at the other end, for people: an address, or over a Unix socket a process (SO_PEERCRED, unix(7))."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return f"process {pid} of user {uid}"
        host, port = sock.getpeername()[:2]
    except OSError:  # it has gone
        return "somebody who has gone"
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


def receive_files(sock: socket.socket, size: int, count: int) -> tuple[bytes, list[int], bool]:
    """At most ``size`` bytes, at most ``count`` descriptors that came with them, and whether some were lost.

    The descriptors are the caller's to close, and not inherited by the programs that this process starts: with
    Python's recv_fds they would be, since it does not pass its flags on (3.11).
    """
    files = array.array("i")
    space = socket.CMSG_LEN(count * files.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    return data, files.tolist(), bool(flags & socket.MSG_CTRUNC)

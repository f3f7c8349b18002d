import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.descriptors import few_descriptors, same_file
from support.kvm import open_descriptors
from support.streams import accepted
from support.waiting import Task

from dirtylog.errors import (
    CancelledError,
    DisconnectedError,
    ProtocolError,
    RefusedError,
)
from dirtylog.linux.mapping import Contents, MemfdMapping, memory_of
from dirtylog.migration import channel as channel_module
from dirtylog.migration.address import TCPAddress, UnixAddress
from dirtylog.migration.channel import Channel, connect
from dirtylog.migration.listener import Listener
from dirtylog.migration.messages import (
    MAX_BATCH_PAGES,
    Failed,
    Handover,
    Hello,
    Pages,
    PassDone,
    PassEnd,
    Shared,
    State,
    Welcome,
    ZeroPages,
    encode,
)
from dirtylog.migration.protocol import Protocol, Role, Stage
from dirtylog.units import MIB, PAGE_SIZE

_HELLO = Hello("fake", (), False, 1, bytes(16), False, False)
_WELCOME = Welcome("boot", 1, 1)


@contextmanager
def _conversation(family: int) -> Iterator[tuple[Channel, Channel]]:
    """Both sides of a conversation that has begun."""
    if family == socket.AF_UNIX:
        one, other = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            other, _ = server.accept()
    with Channel(one, Role.SOURCE) as source, Channel(other, Role.DESTINATION) as destination:
        source.send(_HELLO)
        assert destination.expect(Hello) == _HELLO
        destination.send(_WELCOME)
        assert source.expect(Welcome) == _WELCOME
        yield source, destination


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """On a Unix socket."""
    with _conversation(socket.AF_UNIX) as channels:
        yield channels


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """A destination's channel, and the bare other end of its socket, which has sent its preamble."""
    one, other = socket.socketpair()
    with one, Channel(other, Role.DESTINATION) as channel:
        assert one.recv(100) == Protocol.preamble()
        one.sendall(Protocol.preamble())
        yield channel, one


def test_stage_follows_what_is_said(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    stages = [(source.stage, destination.stage)]
    source.send(PassEnd(1))
    stages.append((source.stage, destination.stage))
    destination.receive()
    stages.append((source.stage, destination.stage))
    assert stages == [
        (Stage.STREAMING, Stage.STREAMING),
        (Stage.PASS_ENDED, Stage.STREAMING),
        (Stage.PASS_ENDED, Stage.PASS_ENDED),
    ]


def test_payload_goes_straight_where_it_belongs(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    message = Pages(0, np.array([[3, 1], [9, 1]], np.int64))
    contents = [b"\1" * PAGE_SIZE, b"\2" * PAGE_SIZE]
    sent = source.send(message, [memoryview(content) for content in contents])
    assert sent == len(encode(message)) + message.payload_size
    assert destination.receive() == message
    places = [bytearray(PAGE_SIZE), bytearray(PAGE_SIZE)]
    destination.receive_into([memoryview(place) for place in places])
    assert places == contents


def test_payload_longer_than_the_kernel_takes_at_once_arrives_whole(channels: tuple[Channel, Channel]) -> None:
    """More pieces than one sendmsg may have, and more bytes than the socket's buffers hold."""
    source, destination = channels
    pages = MAX_BATCH_PAGES
    message = Pages(0, np.stack((np.arange(pages) * 2, np.ones(pages)), axis=1).astype(np.int64))
    contents = np.random.default_rng(7).integers(0, 256, (pages, PAGE_SIZE), np.uint8)
    task = Task(lambda: source.send(message, [memoryview(page) for page in contents]))
    assert destination.receive() == message
    received = np.zeros_like(contents)
    odd_sizes = [memoryview(received.reshape(-1))[start : start + 12345] for start in range(0, received.size, 12345)]  # type: ignore[arg-type]
    destination.receive_into(odd_sizes)
    task.join()
    assert np.array_equal(received, contents)


@pytest.fixture
def mapping() -> Iterator[MemfdMapping]:
    """Four MiB of a memfd, no page like another."""
    with closing(MemfdMapping("contents", 4 * MIB)) as mapping:
        mapping.array.view(np.uint64)[:] = np.arange(mapping.size // 8)
        yield mapping


def _parts(mapping: MemfdMapping) -> tuple[Pages, list[Contents]]:
    """Long parts and short ones in turn, with gaps between, the last a page before the end."""
    ends = [100, 101, 300, 301, 303, 700, 701, 1023]
    runs = np.array([(start, end - start) for start, end in pairwise([3, *ends])][::2], np.int64)
    return Pages(0, runs), [mapping.part(start * PAGE_SIZE, (start + count) * PAGE_SIZE) for start, count in runs]


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_parts_of_files_arrive_as_what_is_in_them(mapping: MemfdMapping, family: int) -> None:
    message, parts = _parts(mapping)
    with _conversation(family) as (source, destination):
        task = Task(lambda: source.send(message, parts))
        assert destination.receive() == message
        received = bytearray(message.payload_size)
        destination.receive_into([memoryview(received)])
        task.join()
    assert received == b"".join(map(memory_of, parts))


def test_parts_of_files_are_not_copied_before_they_are_received(
    channels: tuple[Channel, Channel], mapping: MemfdMapping
) -> None:
    source, destination = channels
    source.send(Pages(0, np.array([[0, 256]], np.int64)), [mapping.part(0, MIB)])
    mapping.array[MIB - 1] = 0xEE
    destination.receive()
    received = bytearray(MIB)
    destination.receive_into([memoryview(received)])
    assert received == mapping.memory[:MIB]


def test_peer_that_takes_no_file_counts_as_gone(channels: tuple[Channel, Channel], mapping: MemfdMapping) -> None:
    source, _ = channels
    source.set_timeout(0.02)
    message = Pages(0, np.array([[0, 1024]], np.int64))

    def send_for_ever() -> None:
        while True:
            source.send(message, [mapping.part(0, mapping.size)])

    with pytest.raises(DisconnectedError, match="counts as gone"):
        send_for_ever()


def test_abort_ends_the_sending_of_a_file(channels: tuple[Channel, Channel], mapping: MemfdMapping) -> None:
    source, _ = channels
    message = Pages(0, np.array([[0, 1024]], np.int64))

    def send_for_ever() -> None:
        while True:
            source.send(message, [mapping.part(0, mapping.size)])

    task = Task(send_for_ever)
    source.abort()
    with pytest.raises(CancelledError):
        task.join()


@pytest.fixture
def files() -> Iterator[list[int]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(MemfdMapping(name, PAGE_SIZE))).fd for name in "abc"]


@pytest.fixture
def bare(channels: tuple[Channel, Channel]) -> tuple[Channel, socket.socket]:
    """A destination's channel in a conversation that has begun, and the bare other end of its socket."""
    source, destination = channels
    return destination, source._socket


def test_files_arrive_between_messages_in_their_order(channels: tuple[Channel, Channel], files: list[int]) -> None:
    source, destination = channels
    assert source.passes_files
    source.send(Shared(3))
    source.send_files(files)
    source.send(State(True, {}))
    assert destination.expect(Shared).files == 3
    received = destination.receive_files(3)
    try:
        assert destination.expect(State) == State(True, {})
        assert [same_file(one, other) for one, other in zip(files, received, strict=True)] == [True] * 3
        assert not any(map(os.get_inheritable, received))
    finally:
        for file in received:
            os.close(file)


def test_files_do_not_pass_over_the_network(files: list[int]) -> None:
    with _conversation(socket.AF_INET) as (source, destination):
        assert not source.passes_files
        assert not destination.passes_files


@pytest.mark.parametrize(
    ("data", "sent"),
    [(b"F", 0), (b"F", 2), (b"F", 1), (b"G", 3), (b"\0", 0)],
    ids=["none", "too-few", "one", "wrong-byte", "no-files-and-wrong-byte"],
)
def test_other_files_than_announced_are_refused_and_closed(  # M5
    bare: tuple[Channel, socket.socket], files: list[int], data: bytes, sent: int
) -> None:
    channel, peer = bare
    before = open_descriptors()
    if sent:
        socket.send_fds(peer, [data], files[:sent])
    else:
        peer.sendall(data)
    with pytest.raises(ProtocolError, match=f"the source announced 3 files, and sent {sent}") as caught:
        channel.receive_files(3)
    assert caught.value.remedy == "see whether this process may open more, with 'ulimit -n'"
    assert open_descriptors() == before


def test_more_files_than_announced_are_refused_and_closed(  # M5
    bare: tuple[Channel, socket.socket], files: list[int]
) -> None:
    channel, peer = bare
    before = open_descriptors()
    socket.send_fds(peer, [b"F"], files)
    with pytest.raises(ProtocolError, match="the source announced 2 files"):
        channel.receive_files(2)
    assert open_descriptors() == before


@pytest.mark.parametrize("left", [0, 1, 2])
def test_files_that_this_process_may_not_open_are_an_error_and_closed(
    channels: tuple[Channel, Channel], files: list[int], left: int
) -> None:
    source, destination = channels
    before = open_descriptors()
    source.send_files(files)
    with few_descriptors(left), pytest.raises(ProtocolError, match=f"announced 3 files, and sent {left}"):
        destination.receive_files(3)
    assert open_descriptors() == before


def test_peer_that_goes_away_before_its_files_is_noticed(bare: tuple[Channel, socket.socket]) -> None:
    channel, peer = bare
    peer.close()
    with pytest.raises(DisconnectedError, match="the connection to the source ended before the migration did"):
        channel.receive_files(1)


def test_peer_that_sends_no_files_counts_as_gone(channels: tuple[Channel, Channel]) -> None:
    _, destination = channels
    destination.set_timeout(0.02)
    with pytest.raises(DisconnectedError, match="counts as gone"):
        destination.receive_files(1)


def test_files_that_nobody_asked_for_are_not_opened(raw: tuple[Channel, socket.socket], files: list[int]) -> None:  # M5
    channel, peer = raw
    before = open_descriptors()
    socket.send_fds(peer, [encode(_HELLO)], files)
    assert channel.expect(Hello) == _HELLO
    assert open_descriptors() == before


def test_peer_that_sends_nothing_counts_as_gone(channels: tuple[Channel, Channel]) -> None:
    source, _ = channels
    source.set_timeout(0.02)
    with pytest.raises(DisconnectedError, match="the destination has not moved a byte for a while and counts as gone"):
        source.receive()


def test_peer_that_takes_nothing_counts_as_gone(channels: tuple[Channel, Channel]) -> None:
    source, _ = channels
    source.set_timeout(0.02)
    pages = np.array([[0, MAX_BATCH_PAGES]], np.int64)
    content = memoryview(bytes(MAX_BATCH_PAGES * PAGE_SIZE))

    def send_for_ever() -> None:
        while True:
            source.send(Pages(0, pages), [content])

    with pytest.raises(DisconnectedError, match="has not moved a byte"):
        send_for_ever()


def test_new_connection_waits_only_so_long_for_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_TIMEOUT", 0.02)
    one, other = socket.socketpair()
    with one, Channel(other, Role.DESTINATION) as channel, pytest.raises(DisconnectedError, match="not moved a byte"):
        channel.expect(Hello)


@pytest.mark.parametrize("size", [0, 4, 8, 12, 20])
def test_connection_that_ends_within_or_between_messages_is_reported(
    raw: tuple[Channel, socket.socket], size: int
) -> None:
    channel, peer = raw
    peer.sendall(encode(_HELLO)[:size])
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(DisconnectedError, match="the connection to the source ended before the migration did"):
        channel.receive()


def test_connection_that_ends_within_a_payload_is_reported(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    source.send(Pages(0, np.array([[0, 2]], np.int64)), [memoryview(bytes(PAGE_SIZE))])
    source.close()
    destination.receive()
    with pytest.raises(DisconnectedError, match="ended before the migration did"):
        destination.receive_into([memoryview(bytearray(2 * PAGE_SIZE))])


def test_reset_connection_is_reported_with_the_kernels_reason(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    destination.close()
    with pytest.raises(DisconnectedError, match="to the destination ended before the migration did: Broken pipe"):
        source.send(PassEnd(1))


def test_another_message_than_expected_breaks_the_protocol(channels: tuple[Channel, Channel]) -> None:  # M5
    source, destination = channels
    source.send(PassEnd(1))
    with pytest.raises(ProtocolError, match="the source sent PassEnd instead of ZeroPages"):
        destination.expect(ZeroPages)


@pytest.mark.parametrize("speaker", [0, 1])
def test_side_that_gives_up_says_why(channels: tuple[Channel, Channel], speaker: int) -> None:
    channels[speaker].send(Failed("the disk is full"))
    with pytest.raises(RefusedError, match=f"the {channels[1 - speaker].peer} gave up: the disk is full"):
        channels[1 - speaker].expect(Handover)


def test_peer_that_waits_is_quiet_and_one_that_is_gone_is_not(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    destination.check_quiet()
    source.close()
    with pytest.raises(DisconnectedError, match="the connection to the source ended"):
        destination.check_quiet()


def test_peer_that_resets_the_connection_is_not_quiet(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    destination.send(Failed("unread"))
    source.close()
    with pytest.raises(DisconnectedError, match="Connection reset by peer"):
        destination.check_quiet()


def test_peer_that_speaks_is_not_quiet(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    source.send(Failed("enough"))
    with pytest.raises(RefusedError, match="the source gave up: enough"):
        destination.check_quiet()


def test_abort_wakes_a_thread_that_receives(channels: tuple[Channel, Channel]) -> None:
    source, _ = channels
    task = Task(source.receive)
    source.abort()
    assert isinstance(task.error(), CancelledError)


def test_abort_wakes_a_thread_that_sends(channels: tuple[Channel, Channel]) -> None:
    source, _ = channels

    def send_for_ever() -> None:
        content = memoryview(bytes(MAX_BATCH_PAGES * PAGE_SIZE))
        while True:
            source.send(Pages(0, np.array([[0, MAX_BATCH_PAGES]], np.int64)), [content])

    task = Task(send_for_ever)
    source.abort()
    assert isinstance(task.error(), CancelledError)


def test_nothing_works_after_abort_but_close(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    source.abort()
    source.abort()
    with pytest.raises(CancelledError):
        source.send(PassEnd(1))
    with pytest.raises(CancelledError):
        source.receive()
    assert source.last_words() is None
    with pytest.raises(DisconnectedError):
        destination.receive()
    source.close()
    source.close()
    source.abort()


def test_last_words_are_what_the_peer_said_before_it_ended(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    destination.send(Failed("no such page"))
    destination.close()
    with pytest.raises(DisconnectedError):
        source.send(PassEnd(1))
    words = source.last_words()
    assert words is not None
    assert words.cause == "the destination gave up: no such page"


def test_peer_that_said_something_else_has_no_last_words(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    source.send(PassEnd(1))
    destination.receive()
    destination.send(PassDone(1, 0, 0, 0))
    destination.close()
    assert source.last_words() is None
    assert source.last_words() is None


def test_last_words_that_are_garbage_are_none(raw: tuple[Channel, socket.socket]) -> None:
    channel, peer = raw
    peer.sendall(b"\xff" * 100)
    assert channel.last_words() is None


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_side_that_gives_up_hears_the_other_out_so_that_its_reason_arrives(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a socket with unread bytes is a reset, which breaks the other's send and can cost it the reason."""
    monkeypatch.setattr(channel_module, "_DRAIN_SECONDS", 30.0)
    address = UnixAddress(f"{tmp_path}/x") if family == "unix" else TCPAddress("127.0.0.1", 0)
    with closing(Listener(address)) as listener, connect(listener.address) as source:
        destination = listener.open(accepted(listener))

        def give_up() -> None:
            with destination:
                destination.send(Failed("enough"))
                destination.finish()

        source.send(_HELLO)
        destination.expect(Hello)
        destination.send(_WELCOME)
        source.expect(Welcome)
        task = Task(give_up)
        pages = np.array([[0, MAX_BATCH_PAGES]], np.int64)
        for _ in range(2):
            source.send(Pages(0, pages), [memoryview(bytes(MAX_BATCH_PAGES * PAGE_SIZE))])
        words = source.last_words()
        source.close()
        task.join()
    assert words is not None
    assert words.cause == "the destination gave up: enough"


def test_finish_waits_only_so_long_for_a_silent_peer(
    channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_DRAIN_SECONDS", 0.02)
    channels[1].finish()
    with pytest.raises(DisconnectedError):
        channels[0].receive()


def test_finish_after_the_peer_has_gone_does_nothing(channels: tuple[Channel, Channel]) -> None:
    source, destination = channels
    source.close()
    destination.finish()


def test_channel_to_a_peer_that_has_gone_already_leaves_no_socket() -> None:
    one, other = socket.socketpair()
    one.close()
    with pytest.raises(DisconnectedError, match="ended before the migration did: Broken pipe"):
        Channel(other, Role.DESTINATION)
    assert other.fileno() == -1


def test_tcp_connection_notices_a_host_that_falls_silent() -> None:  # M6
    with (
        closing(Listener(TCPAddress("127.0.0.1", 0))) as listener,
        connect(listener.address) as source,
        listener.open(accepted(listener)) as destination,
    ):
        for sock in (source._socket, destination._socket):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle + probes * sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 30


def _refused(address: UnixAddress | TCPAddress, reason: str) -> None:
    with pytest.raises(DisconnectedError, match=f"cannot connect to the destination at {address}: {reason}") as caught:
        connect(address)
    assert caught.value.remedy == f"start it there with 'dirtylog run --incoming {address}'"


def test_nobody_at_a_unix_address_is_told_with_the_remedy(tmp_path: Path) -> None:
    _refused(UnixAddress(f"{tmp_path}/nobody"), "No such file or directory")


def test_stale_socket_file_is_nobody(tmp_path: Path) -> None:
    path = f"{tmp_path}/stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    _refused(UnixAddress(path), "Connection refused")


def test_nobody_at_a_tcp_address_is_told_with_the_remedy() -> None:
    with closing(Listener(TCPAddress("127.0.0.1", 0))) as listener:
        address = listener.address
    assert isinstance(address, TCPAddress)
    _refused(address, "Connection refused")


def _no_such_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_host_without_an_address_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_such_name)
    _refused(TCPAddress("nowhere.invalid", 1), "Name or service not known")


def test_destination_whose_queue_is_full_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_TIMEOUT", 0.02)
    path = f"{tmp_path}/full"
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        stack.enter_context(connect(UnixAddress(path)))
        _refused(UnixAddress(path), os.strerror(errno.EAGAIN))

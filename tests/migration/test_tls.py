import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from support.connections import HOST, connections
from support.custody import Custody
from support.fake_machine import FakeMachine
from support.guests import check_memory, check_runs_on, wait_for_rounds
from support.tls import EXPIRED, both, encrypted_channels, issue
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import (
    CancelledError,
    DisconnectedError,
    PeerError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from dirtylog.machine import RunState
from dirtylog.migration import (
    Channel,
    Credentials,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Role,
    Status,
    connect,
    reception,
)
from dirtylog.migration import tls as tls_module
from dirtylog.migration.address import TCPAddress, TLSAddress
from dirtylog.migration.messages import MAX_BATCH_PAGES, Failed, Hello, Pages, Welcome
from dirtylog.migration.tls import Handshakes, TLSStream
from dirtylog.units import KIB, MIB, PAGE_SIZE

_HELLO: Final = Hello("fake", (), False, 1, bytes(16), False, False)
_PAGES: Final = Pages(0, np.array([[0, MAX_BATCH_PAGES]], np.int64))
_RECORD: Final = 16 * KIB


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def credentials(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of two sides that accept each other."""
    return issue(tmp_path_factory.mktemp("tls") / "good", authority)


@pytest.fixture
def channels(credentials: str) -> Iterator[tuple[Channel, Channel]]:
    with encrypted_channels(credentials) as channels:
        yield channels


def _begin(source: Channel, destination: Channel) -> None:
    source.send(_HELLO)
    assert destination.expect(Hello) == _HELLO
    destination.send(Welcome("boot", 1, 1))
    source.expect(Welcome)


@pytest.fixture
def streams(credentials: str) -> Iterator[tuple[TLSStream, TLSStream, socket.socket, socket.socket]]:
    """The streams of a source and of a destination, and their sockets."""
    source, destination = both(credentials)
    with connections() as (one, other):
        near, far = TLSStream(one, source, HOST), TLSStream(other, destination)
        task = Task(lambda: far.shake_hands(BOUND))
        greeting = Task(lambda: near.shake_hands(BOUND))
        task.join()
        far.send([memoryview(b"!")])
        greeting.join()
        buffer = bytearray(1)
        assert near.receive_into([memoryview(buffer)])
        assert buffer == b"!"
        yield near, far, one, other


Streams = tuple[TLSStream, TLSStream, socket.socket, socket.socket]


class TestTransfer:
    def test_what_is_said_and_sent_arrives(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        contents = np.random.default_rng(7).integers(0, 256, (MAX_BATCH_PAGES, PAGE_SIZE), np.uint8)
        task = Task(lambda: source.send(_PAGES, [memoryview(page) for page in contents]))
        assert destination.receive() == _PAGES
        received = np.zeros_like(contents)
        odd_sizes = [memoryview(received.reshape(-1))[at : at + 12345] for at in range(0, received.size, 12345)]  # type: ignore[arg-type]
        destination.receive_into(odd_sizes)
        task.join()
        assert np.array_equal(received, contents)

    def test_bytes_sent_are_counted_as_without_encryption(self, streams: Streams) -> None:
        near, _, _, _ = streams
        assert near.send([memoryview(b"123"), memoryview(b""), memoryview(bytes(_RECORD))]) == 3 + _RECORD

    def test_nothing_of_it_is_seen_on_the_wire(self, streams: Streams) -> None:
        near, _, _, other = streams
        near.send([memoryview(b"secret" * 100)])
        seen = other.recv(MIB)
        assert len(seen) > 600
        assert b"secret" not in seen

    def test_cipher_is_one_of_tls_1_3(self, streams: Streams) -> None:
        assert {stream._tls.version() for stream in streams[:2]} == {"TLSv1.3"}

    def test_records_are_full_however_short_the_buffers(self, streams: Streams) -> None:
        near, _, _, other = streams
        near.send([memoryview(bytes(100))] * 5000)
        seen = b""
        sizes = []
        while len(seen) < 500_000:
            seen += other.recv(MIB)
        while seen:
            size = int.from_bytes(seen[3:5], "big")
            sizes.append(size)
            seen = seen[5 + size :]
        assert {size // _RECORD for size in sizes[:-1]} == {1}

    def test_both_directions_are_used_at_once_by_different_threads(self, streams: Streams) -> None:
        near, far, _, _ = streams
        one, other = os.urandom(8 * MIB), os.urandom(8 * MIB)

        def receive(stream: TLSStream, into: bytearray) -> Task:
            return Task(lambda: stream.receive_into([memoryview(into)]))

        here, there = bytearray(8 * MIB), bytearray(8 * MIB)
        tasks = [receive(near, here), receive(far, there)]
        tasks += [Task(lambda: near.send([memoryview(one)])), Task(lambda: far.send([memoryview(other)]))]
        for task in tasks:
            task.join()
        assert there == one
        assert here == other

    def test_bytes_that_dribble_in_are_put_together(self, credentials: str) -> None:
        source, destination = both(credentials)
        with connections() as (one, relayed), connections() as (relay, other), ExitStack() as stack:
            near, far = TLSStream(one, source, HOST), TLSStream(other, destination)
            for ends in ((relayed, relay), (relay, relayed)):
                stack.callback(Task(lambda ends=ends: _dribble(*ends)).error)  # type: ignore[misc]
            stack.callback(other.shutdown, socket.SHUT_RDWR)
            stack.callback(one.shutdown, socket.SHUT_RDWR)
            greeting = Task(lambda: near.shake_hands(BOUND))
            far.shake_hands(BOUND)
            far.send([memoryview(b"!")])
            greeting.join()
            near.send([memoryview(b"0123456789" * 20)])
            buffers = [bytearray(size) for size in (1, 0, 7, 192)]
            assert far.receive_into([memoryview(buffer) for buffer in buffers])
            assert b"".join(buffers) == b"0123456789" * 20

    @given(st.lists(st.integers(0, 3 * 256 * KIB), max_size=6))
    def test_pieces_are_the_buffers_and_all_but_the_last_are_full(self, sizes: list[int]) -> None:
        buffers = [memoryview(bytes([index]) * size) for index, size in enumerate(sizes)]
        pieces = list(tls_module._pieces(buffers, 256 * KIB))
        assert b"".join(pieces) == b"".join(buffers)
        assert all(len(piece) == 256 * KIB for piece in pieces[:-1])
        assert all(0 < len(piece) <= 256 * KIB for piece in pieces[-1:])


def _dribble(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes on one at a time."""
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        while data := one.recv(MIB):
            for byte in data:
                other.sendall(bytes([byte]))


class TestQuiet:
    def test_peer_that_waits_is_quiet_and_nothing_is_buffered(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        for channel in channels:
            channel.check_quiet()
            assert not channel.has_buffered

    def test_peer_that_speaks_before_its_time_is_noticed(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        destination.send(Failed("enough"))
        with pytest.raises(RefusedError, match="the destination gave up: enough"):
            _until_it_raises(source.check_quiet)

    def test_peer_that_has_gone_is_noticed(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        destination.close()
        with pytest.raises(DisconnectedError, match="ended before the migration did"):
            _until_it_raises(source.check_quiet)

    def test_message_that_came_with_another_is_known_to_be_there(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.send(Pages(0, np.array([[0, 1]], np.int64)), [memoryview(bytes(PAGE_SIZE))])
        destination.receive()
        assert destination.has_buffered
        destination.receive_into([memoryview(bytearray(PAGE_SIZE))])
        assert not destination.has_buffered

    def test_part_of_a_record_is_nothing_yet(self, streams: Streams) -> None:
        near, far, _, other = streams
        record = far._encrypted(memoryview(b"later"))
        other.sendall(record[:10])
        wait_until(lambda: near._socket.recv(10, socket.MSG_PEEK), "some of the record came")
        assert not near.has_arrived()
        assert not near.has_buffered
        other.sendall(record[10:])
        wait_until(near.has_arrived, "the rest came")
        received = bytearray(5)
        assert near.receive_into([memoryview(received)])
        assert received == b"later"

    def test_records_that_came_together_are_received_in_a_step_each(self, streams: Streams) -> None:
        near, far, _, other = streams
        said = [bytes([number]) * 100 for number in range(1, 6)]
        data = b"".join(far._encrypted(memoryview(each)) for each in said)
        other.sendall(data)
        wait_until(lambda: len(near._socket.recv(len(data), socket.MSG_PEEK)) == len(data), "all came")
        buffer = memoryview(bytearray(1000))
        found: list[bytes] = []
        while not found or near.has_buffered:
            found.append(bytes(buffer[: near.receive_available(buffer)]))
        assert found == said

    def test_what_is_there_is_received_without_waiting_for_more(self, streams: Streams) -> None:
        near, far, _, other = streams
        received = memoryview(bytearray(8))
        record = far._encrypted(memoryview(b"later"))
        with pytest.raises(BlockingIOError):
            near.receive_available(received)
        other.sendall(record[:10])
        wait_until(lambda: near._socket.recv(10, socket.MSG_PEEK), "some of the record came")
        with pytest.raises(BlockingIOError):
            near.receive_available(received)
        other.sendall(record[10:])
        wait_until(lambda: near._socket.recv(1, socket.MSG_PEEK), "the rest came")
        assert near.receive_available(received) == 5
        assert bytes(received[:5]) == b"later"
        other.shutdown(socket.SHUT_WR)
        wait_until(near.has_arrived, "the end came")
        assert near.receive_available(received) == 0


def _until_it_raises(call: Callable[[], object]) -> None:
    wait_until(lambda: call() is not None, "it raised")


class TestEnd:
    def test_connection_that_ends_without_a_word_is_reported(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.close()
        with pytest.raises(DisconnectedError, match="the connection to the source ended before the migration did"):
            destination.receive()

    def test_peer_that_sends_nothing_counts_as_gone(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.set_timeout(0.02)
        with pytest.raises(DisconnectedError, match="has not moved a byte for a while"):
            source.receive()

    def test_peer_that_takes_nothing_counts_as_gone(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.set_timeout(0.02)
        with pytest.raises(DisconnectedError, match="has not moved a byte for a while"):
            _send_for_ever(source)

    def test_abort_ends_what_waits_to_receive(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.set_timeout(0)
        task = Task(source.receive)
        source.abort()
        assert isinstance(task.error(), CancelledError)

    def test_abort_ends_what_waits_to_send(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        source.set_timeout(0)
        task = Task(lambda: _send_for_ever(source))
        wait_until(lambda: destination._stream.has_arrived(), "something was sent")
        source.abort()
        assert isinstance(task.error(), CancelledError)

    def test_last_words_are_heard(self, channels: tuple[Channel, Channel]) -> None:
        source, destination = channels
        _begin(source, destination)
        destination.send(Failed("enough"))
        destination.stop_sending()
        words = source.last_words()
        assert words is not None
        assert words.cause == "the destination gave up: enough"

    @pytest.mark.parametrize("at", [7, -1])
    def test_record_that_was_changed_on_its_way_is_refused(self, streams: Streams, at: int) -> None:
        near, far, one, _ = streams
        record = bytearray(near._encrypted(memoryview(b"truth")))
        record[at] ^= 0x40
        one.sendall(record)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match="TLS with the source failed") as caught:
            far.receive_into([memoryview(bytearray(5))])
        assert caught.value.remedy == "see whether something changes bytes on their way"

    def test_alert_is_not_the_peers_word_that_it_gave_up(self, streams: Streams) -> None:  # M1
        near, far, one, other = streams
        one.sendall(near._encrypted(memoryview(b"truth")) * 2)
        with pytest.raises(ProtocolError):
            far.receive_into([memoryview(bytearray(10))])
        other.sendall(far._outgoing.read())
        with pytest.raises(ProtocolError, match=r"TLS with the destination failed: .*bad record mac"):
            near.receive_into([memoryview(bytearray(1))])

    def test_record_that_was_sent_twice_is_refused(self, streams: Streams) -> None:
        near, far, one, _ = streams
        one.sendall(near._encrypted(memoryview(b"truth")) * 2)
        with pytest.raises(ProtocolError, match="bad record mac"):
            far.receive_into([memoryview(bytearray(10))])


def _send_for_ever(source: Channel) -> None:
    contents = memoryview(bytes(MAX_BATCH_PAGES * PAGE_SIZE))
    while True:
        source.send(_PAGES, [contents])


def _meet(source: Credentials, destination: Credentials, host: str = HOST) -> list[PeerError | None]:
    """How the handshake goes for the two sides, which do what a channel does."""
    errors: list[PeerError | None] = []
    with connections() as (one, other):

        def accept() -> None:
            stream = TLSStream(other, destination)
            try:
                stream.shake_hands(BOUND)
                stream.send([memoryview(b"!")])
            finally:
                other.close()

        task = Task(accept)
        try:
            TLSStream(one, source, host).shake_hands(BOUND)
            errors.append(None)
        except PeerError as error:
            errors.append(error)
        finally:
            one.close()
        ended = task.error()
        assert ended is None or isinstance(ended, PeerError), ended
        errors.append(ended)
    return errors


class TestCertificates:
    """Who is accepted, and what both sides say of who is not."""

    @pytest.fixture
    def of(self, tmp_path: Path) -> Callable[[str], Path]:
        return lambda name: tmp_path / name

    def test_good_ones_are_accepted(self, credentials: str) -> None:
        assert _meet(*both(credentials)) == [None, None]

    def _refused_by_source(self, errors: list[PeerError | None], cause: str, alert: str) -> ProtocolError:
        here, there = errors
        assert isinstance(here, ProtocolError)
        assert here.cause == f"the destination's certificate is not accepted: {cause}"
        assert here.remedy
        assert isinstance(there, RefusedError)
        assert there.cause == f"the source refused the TLS connection: {alert}"
        assert there.remedy
        return here

    def _refused_by_destination(self, errors: list[PeerError | None], cause: str, alert: str) -> None:
        here, there = errors
        assert isinstance(here, RefusedError)
        assert here.cause == f"the destination refused the TLS connection: {alert}"
        assert here.remedy
        assert isinstance(there, ProtocolError)
        assert there.cause == cause
        assert there.remedy

    def test_destination_of_a_foreign_authority_is_refused(
        self, credentials: str, authority: trustme.CA, of: Callable[[str], Path]
    ) -> None:
        foreign = issue(of("foreign"), trustme.CA(), trusts=authority)
        errors = _meet(both(credentials)[0], both(foreign)[1])
        self._refused_by_source(errors, "unable to get local issuer certificate", "unknown ca")

    def test_source_of_a_foreign_authority_is_refused(
        self, credentials: str, authority: trustme.CA, of: Callable[[str], Path]
    ) -> None:
        foreign = trustme.CA()
        errors = _meet(both(issue(of("foreign"), foreign, trusts=authority))[0], both(credentials)[1])
        cause = "the source's certificate is not accepted: unable to get local issuer certificate"
        self._refused_by_destination(errors, cause, "unknown ca")

    def test_expired_destination_is_refused(
        self, credentials: str, authority: trustme.CA, of: Callable[[str], Path]
    ) -> None:
        expired = issue(of("expired"), authority, **EXPIRED)
        errors = _meet(both(credentials)[0], both(expired)[1])
        self._refused_by_source(errors, "certificate has expired", "certificate expired")

    def test_expired_source_is_refused(
        self, credentials: str, authority: trustme.CA, of: Callable[[str], Path]
    ) -> None:
        expired = issue(of("expired"), authority, **EXPIRED)
        errors = _meet(both(expired)[0], both(credentials)[1])
        cause = "the source's certificate is not accepted: certificate has expired"
        self._refused_by_destination(errors, cause, "certificate expired")

    @pytest.mark.parametrize(
        ("host", "cause"),
        [
            ("localhost", "Hostname mismatch, certificate is not valid for 'localhost'"),
            ("127.0.0.2", "IP address mismatch, certificate is not valid for '127.0.0.2'"),
        ],
    )
    def test_destination_with_another_name_is_refused(self, credentials: str, host: str, cause: str) -> None:
        error = self._refused_by_source(_meet(*both(credentials), host), cause, "bad certificate")
        assert error.remedy is not None
        assert "--tls-hostname" in error.remedy

    def test_name_that_is_given_counts_instead_of_the_addresss(
        self, authority: trustme.CA, of: Callable[[str], Path]
    ) -> None:
        directory = issue(of("named"), authority, "guests.example.org")
        _, destination = both(directory)
        named = Credentials.load(directory, Role.SOURCE, "guests.example.org")
        assert _meet(named, destination) == [None, None]
        other = Credentials.load(directory, Role.SOURCE, "other.example.org")
        self._refused_by_source(
            _meet(other, destination),
            "Hostname mismatch, certificate is not valid for 'other.example.org'",
            "bad certificate",
        )

    def _bare(self, credentials: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=f"{credentials}/ca-cert.pem")
        context.check_hostname = False
        return context

    def test_source_without_a_certificate_is_refused(self, credentials: str) -> None:
        errors = _meet(Credentials(Role.SOURCE, self._bare(credentials)), both(credentials)[1])
        self._refused_by_destination(errors, "the source shows no certificate", "certificate required")

    def test_source_without_tls_1_3_is_refused(self, credentials: str) -> None:
        context = self._bare(credentials)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        errors = _meet(Credentials(Role.SOURCE, context), both(credentials)[1])
        self._refused_by_destination(errors, "the source does not speak TLS 1.3", "protocol version")

    def test_destination_without_tls_1_3_is_refused(self, credentials: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{credentials}/server-cert.pem", f"{credentials}/server-key.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        here, there = _meet(both(credentials)[0], Credentials(Role.DESTINATION, context))
        assert isinstance(here, PeerError)
        assert "protocol version" in here.cause
        assert isinstance(there, PeerError)

    def test_certificates_of_the_systems_authorities_are_not_trusted(self, credentials: str) -> None:
        for one in both(credentials):
            assert one.context.cert_store_stats()["x509_ca"] == 1


class _Dribbling(socket.socket):
    """Receives one byte at a time, and counts them."""

    received = 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.received += 1
        return super().recv_into(buffer, 1, flags)


class TestHandshake:
    @pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
    def test_silent_peer_is_waited_for_only_so_long(self, credentials: str, side: int) -> None:
        with connections() as (one, _):
            stream = TLSStream(one, both(credentials)[side], HOST)
            with pytest.raises(DisconnectedError, match="did not complete the TLS handshake in 0 s"):
                stream.shake_hands(0.02)

    def test_peer_that_dribbles_is_waited_for_no_longer(
        self, credentials: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The head of a long record, and some of its body, byte by byte, with a tenth of a second for each."""
        monkeypatch.setattr(tls_module, "time", SimpleNamespace(monotonic=count(0.0, 0.1).__next__))
        one, other = socket.socketpair()
        with _Dribbling(fileno=one.detach()) as slow, other:
            other.sendall(bytes.fromhex("1603014000 01003ffc 0303") + bytes(100))
            with pytest.raises(DisconnectedError, match="the source did not complete the TLS handshake in 2 s"):
                TLSStream(slow, both(credentials)[1]).shake_hands(2.0)
            assert slow.received == 19

    @pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
    def test_peer_that_leaves_is_reported(self, credentials: str, side: int) -> None:
        with connections() as (one, other):
            other.shutdown(socket.SHUT_WR)
            with pytest.raises(DisconnectedError, match="ended in the TLS handshake"):
                TLSStream(one, both(credentials)[side], HOST).shake_hands(BOUND)

    @pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
    def test_garbage_is_reported_as_no_tls(self, credentials: str, side: int) -> None:
        with connections() as (one, other):
            other.sendall(b"GET / HTTP/1.0\r\n\r\n" if side else b"SSH-2.0-OpenSSH_9.2\r\n")
            other.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="does not speak TLS"):
                TLSStream(one, both(credentials)[side], HOST).shake_hands(BOUND)

    @given(st.binary(max_size=100) | st.tuples(st.integers(0, 300), st.integers(1, 255)))
    def test_whatever_a_stranger_says_is_one_declared_error(
        self, credentials: str, hello: bytes, said: bytes | tuple[int, int]
    ) -> None:  # M5
        """Any bytes, or what a source says first with one byte changed."""
        if isinstance(said, tuple):
            at, change = said
            said = bytes(byte ^ change if index == at else byte for index, byte in enumerate(hello))
        one, other = socket.socketpair()
        with one, other:
            other.sendall(said)
            other.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerError):
                TLSStream(one, both(credentials)[1]).shake_hands(BOUND)

    @pytest.fixture(scope="class")
    @staticmethod
    def hello(credentials: str) -> bytes:
        """What a source says first."""
        one, other = socket.socketpair()
        with one, other:
            task = Task(lambda: TLSStream(one, both(credentials)[0], HOST).shake_hands(BOUND))
            said = other.recv(MIB)
            other.close()
            assert isinstance(task.error(), DisconnectedError)
        return said

    def test_abort_ends_one_under_way_and_each_that_begins_later(self, credentials: str) -> None:
        handshakes = Handshakes()
        source, _ = both(credentials)
        with connections() as (one, other):
            task = Task(lambda: handshakes.shake_hands(one, source, HOST, BOUND))
            assert other.recv(1)  # it has begun
            handshakes.abort()
            assert isinstance(task.error(), CancelledError)
            assert one.fileno() == -1
        with connections() as (one, _), pytest.raises(CancelledError):
            handshakes.shake_hands(one, source, HOST, BOUND)

    def test_failed_one_closes_the_socket(self, credentials: str) -> None:
        with connections() as (one, other):
            other.shutdown(socket.SHUT_WR)
            with pytest.raises(DisconnectedError):
                Handshakes().shake_hands(one, both(credentials)[0], HOST, BOUND)
            assert one.fileno() == -1


def _machine(stack: ExitStack) -> FakeMachine:
    made = FakeMachine()
    stack.callback(made.memory.close)
    stack.callback(made.close)
    return made


@contextmanager
def _said(name: str) -> Iterator[list[str]]:
    """What a logger is told meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


class _Waiting:
    """A destination that waits, and whom it turned away."""

    def __init__(self, stack: ExitStack, address: TCPAddress, credentials: Credentials | None) -> None:
        self.turned_away = stack.enter_context(_said("dirtylog.migration"))
        self.listener = stack.enter_context(closing(Listener(address, credentials)))
        self.guest = _machine(stack)
        self.incoming = IncomingMigration(self.guest, self.listener)
        self.task = Task(self.incoming.run)
        stack.callback(self.task.error)
        stack.callback(self.incoming.abort)
        assert isinstance(self.listener.address, TCPAddress)
        self.port = self.listener.address.port


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def waiting(stack: ExitStack, credentials: str) -> _Waiting:
    return _Waiting(stack, TLSAddress(HOST, 0), both(credentials)[1])


def _source(stack: ExitStack) -> FakeMachine:
    source = _machine(stack)
    source.boot()
    source.resume()
    wait_for_rounds(source)
    return source


def _migrates(stack: ExitStack, waiting: _Waiting, parameters: Parameters) -> None:
    source = _source(stack)
    custody = Custody(source, waiting.guest)
    outgoing = OutgoingMigration(source, waiting.listener.address, parameters)
    outgoing.run()
    waiting.task.join()
    assert custody.most <= 1  # M1
    assert outgoing.status is Status.COMPLETED
    assert source.state is RunState.POSTMIGRATE
    check_memory(source)


class TestMigration:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_running_guest_moves_and_every_channel_is_encrypted(
        self, stack: ExitStack, waiting: _Waiting, credentials: str, channels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Channel] = []
        init = Channel.__init__

        def watched(channel: Channel, *arguments: object) -> None:
            init(channel, *arguments)  # type: ignore[arg-type]
            made.append(channel)

        monkeypatch.setattr(Channel, "__init__", watched)
        _migrates(stack, waiting, Parameters(tls_creds=credentials, channels=channels, verify=True))
        assert len(made) == 2 * channels
        assert all(isinstance(channel._stream, TLSStream) for channel in made)
        assert waiting.turned_away == []

    def test_strangers_are_turned_away_and_the_guest_still_arrives(
        self, stack: ExitStack, waiting: _Waiting, credentials: str, tmp_path: Path
    ) -> None:
        foreign = issue(tmp_path / "foreign", trustme.CA())
        with pytest.raises(PeerError):
            connect(waiting.listener.address, Credentials.load(foreign, Role.SOURCE))
        with socket.create_connection((HOST, waiting.port)):
            pass  # and gone again
        with socket.create_connection((HOST, waiting.port)) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: len(waiting.turned_away) >= 3, "all were turned away")
        _migrates(stack, waiting, Parameters(tls_creds=credentials))
        check_runs_on(waiting.guest)

    def test_source_without_tls_is_told_and_the_destination_waits_on(
        self, stack: ExitStack, waiting: _Waiting, credentials: str
    ) -> None:
        source = _source(stack)
        with pytest.raises(RefusedError, match="nothing that is not encrypted; migrate to tls:HOST:PORT"):
            OutgoingMigration(source, TCPAddress(HOST, waiting.port), Parameters()).run()
        check_runs_on(source)  # M2
        wait_until(lambda: waiting.turned_away, "it was turned away")
        assert "the source does not speak TLS" in waiting.turned_away[0]
        _migrates(stack, waiting, Parameters(tls_creds=credentials))

    def test_source_with_tls_tells_a_destination_without(self, stack: ExitStack, credentials: str) -> None:
        waiting = _Waiting(stack, TCPAddress(HOST, 0), None)
        source = _source(stack)
        outgoing = OutgoingMigration(source, TLSAddress(HOST, waiting.port), Parameters(tls_creds=credentials))
        with pytest.raises(ProtocolError, match="the destination does not speak TLS") as caught:
            outgoing.run()
        assert caught.value.remedy == "start it with 'dirtylog run --incoming tls:HOST:PORT --tls-creds DIR'"
        check_runs_on(source)  # M2
        wait_until(lambda: waiting.turned_away, "it was turned away")
        assert "the source speaks TLS, and this side does not" in waiting.turned_away[0]
        assert waiting.task.running

    def test_destination_that_is_not_who_it_should_be_gets_nothing(
        self, stack: ExitStack, waiting: _Waiting, credentials: str, tmp_path: Path
    ) -> None:
        source = _source(stack)
        parameters = Parameters(tls_creds=credentials, tls_hostname="another.example.org")
        with pytest.raises(ProtocolError, match="Hostname mismatch"):
            OutgoingMigration(source, waiting.listener.address, parameters).run()
        check_runs_on(source)  # M2

    def test_cancel_ends_a_handshake(self, stack: ExitStack, credentials: str) -> None:
        server = stack.enter_context(socket.create_server((HOST, 0)))
        source = _source(stack)
        address = TLSAddress(HOST, server.getsockname()[1])
        outgoing = OutgoingMigration(source, address, Parameters(tls_creds=credentials))
        task = Task(outgoing.run)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1)
            assert outgoing.cancel()
            assert isinstance(task.error(), CancelledError)
        check_runs_on(source)

    def test_abort_ends_a_destination_in_a_handshake(self, waiting: _Waiting) -> None:
        with socket.create_connection((HOST, waiting.port)):
            waiting.incoming.abort()
            assert isinstance(waiting.task.error(), CancelledError)

    def test_silent_stranger_is_turned_away_in_time(
        self, stack: ExitStack, waiting: _Waiting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reception, "HANDSHAKE_TIMEOUT", 0.02)
        with socket.create_connection((HOST, waiting.port)):
            wait_until(lambda: waiting.turned_away, "it was turned away")
        assert "it did not say within 0 s what it wants" in waiting.turned_away[0]
        assert waiting.task.running

    def test_no_credentials_for_tls_is_refused(self, stack: ExitStack) -> None:
        with pytest.raises(UsageError, match="needs credentials"):
            OutgoingMigration(_source(stack), TLSAddress(HOST, 1), Parameters())

    def test_plain_tcp_with_credentials_is_refused(self, stack: ExitStack, credentials: str) -> None:
        with pytest.raises(UsageError, match="would not be encrypted"):
            OutgoingMigration(_source(stack), TCPAddress(HOST, 1), Parameters(tls_creds=credentials))

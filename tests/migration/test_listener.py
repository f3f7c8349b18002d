import socket
from contextlib import closing
from pathlib import Path

import pytest
from support.descriptors import few_descriptors
from support.streams import accepted
from support.waiting import Task

from dirtylog.errors import CancelledError, DisconnectedError, HostError, UsageError
from dirtylog.migration.address import FileAddress, TCPAddress, UnixAddress
from dirtylog.migration.channel import connect
from dirtylog.migration.listener import Listener
from dirtylog.migration.messages import Hello

_HELLO = Hello("fake", (), False, 1, bytes(16), False, False)


def _no_such_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_listener_at_a_unix_address_owns_its_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = Listener(UnixAddress(str(path)))
    assert listener.address == UnixAddress(str(path))
    assert path.is_socket()
    with connect(listener.address) as source, listener.open(accepted(listener)) as destination:
        source.send(_HELLO)
        assert destination.expect(Hello) == _HELLO
    listener.close()
    listener.close()
    assert not path.exists()


def test_listener_at_port_0_says_which_port_it_got() -> None:
    with closing(Listener(TCPAddress("localhost", 0))) as listener:
        assert isinstance(listener.address, TCPAddress)
        assert listener.address.port
        with connect(listener.address) as source, listener.open(accepted(listener)) as destination:
            source.send(_HELLO)
            assert destination.expect(Hello) == _HELLO


def test_path_that_somebody_listens_on_is_refused(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/socket")
    with closing(Listener(address)), pytest.raises(UsageError, match="is already in use"):
        Listener(address)


def test_file_that_is_no_socket_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("important")
    with pytest.raises(UsageError, match="exists and is not a socket"):
        Listener(UnixAddress(str(path)))
    assert path.read_text() == "important"


def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = f"{tmp_path}/stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    with closing(Listener(UnixAddress(path))) as listener, connect(listener.address), accepted(listener):
        pass


def test_path_too_long_for_an_address_is_refused() -> None:
    with pytest.raises(UsageError, match="bytes long, more than the 107 that fit"):
        Listener(UnixAddress("/x" * 60))


def test_tcp_port_in_use_is_refused() -> None:
    with closing(Listener(TCPAddress("127.0.0.1", 0))) as listener:
        assert isinstance(listener.address, TCPAddress)
        with pytest.raises(HostError, match=f"cannot listen at {listener.address}: Address already in use") as caught:
            Listener(listener.address)
    assert caught.value.remedy == "choose an address of this host, and a port that is free"


def test_address_of_another_host_is_refused() -> None:
    with pytest.raises(HostError, match=r"cannot listen at tcp:192\.0\.2\.1:0"):  # TEST-NET-1, RFC 5737
        Listener(TCPAddress("192.0.2.1", 0))


def test_host_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_such_name)
    with pytest.raises(HostError, match=r"cannot listen at tcp:nowhere\.invalid:1: Name or service not known"):
        Listener(TCPAddress("nowhere.invalid", 1))


def test_abort_before_waiting_makes_the_listener_give_up(tmp_path: Path) -> None:
    with closing(Listener(UnixAddress(f"{tmp_path}/socket"))) as listener:
        listener.abort()
        with pytest.raises(CancelledError, match="waiting for a migration was cancelled"):
            listener.accept()


def test_abort_wakes_a_listener_that_waits(tmp_path: Path) -> None:
    with closing(Listener(UnixAddress(f"{tmp_path}/socket"))) as listener:
        task = Task(listener.accept)
        listener.abort()
        assert isinstance(task.error(), CancelledError)


def test_source_that_has_gone_again_is_reported(tmp_path: Path) -> None:
    with closing(Listener(UnixAddress(f"{tmp_path}/socket"))) as listener:
        connect(listener.address).close()
        with pytest.raises(DisconnectedError, match="the connection to the source ended"):
            listener.open(accepted(listener))


def test_file_is_no_address_to_listen_at() -> None:
    with pytest.raises(UsageError, match="nobody can connect to file:x"):
        Listener(FileAddress("x"))


def test_nobody_within_the_time_is_none(tmp_path: Path) -> None:
    with closing(Listener(UnixAddress(f"{tmp_path}/socket"))) as listener:
        assert listener.accept(0.01) is None


def test_connection_that_the_host_has_no_descriptor_for_stays_where_it_is(tmp_path: Path) -> None:
    with closing(Listener(UnixAddress(f"{tmp_path}/socket"))) as listener, connect(listener.address) as source:
        with few_descriptors(0), pytest.raises(HostError, match="cannot accept a connection: Too many open files"):
            listener.accept()
        with listener.open(accepted(listener)) as destination:
            source.send(_HELLO)
            assert destination.expect(Hello) == _HELLO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.errors import UsageError
from dirtylog.linux.socketfile import MAX_PATH
from dirtylog.migration.address import Address, FileAddress, TCPAddress, TLSAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:/tmp/x", UnixAddress("/tmp/x")),  # noqa: S108 - not opened
        ("unix:relative", UnixAddress("relative")),
        ("unix:with:colon", UnixAddress("with:colon")),
        ("tcp:localhost:4444", TCPAddress("localhost", 4444)),
        ("tcp:127.0.0.1:0", TCPAddress("127.0.0.1", 0)),
        ("tcp:[::1]:65535", TCPAddress("::1", 65535)),
        ("tcp:host.example.org:1", TCPAddress("host.example.org", 1)),
        ("tls:host.example.org:4444", TLSAddress("host.example.org", 4444)),
        ("tls:[2001:db8::1]:1", TLSAddress("2001:db8::1", 1)),
        ("file:/tmp/x:y", FileAddress("/tmp/x:y")),  # noqa: S108 - not opened
    ],
)
def test_uri_is_understood_and_shown_again(uri: str, address: Address) -> None:
    assert parse_address(uri) == address
    assert str(address) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "unix",
        "/tmp/x",  # noqa: S108 - not opened
        "tcp:",
        "tcp:host",
        "tcp:1",
        "tls:host",
        "tls:[]:1",
        "TLS:host:1",
        "tcp:[]:1",
        "tcp:host:",
        "tcp:host:x",
        "tcp:host:-1",
        "tcp:host:65536",
        "tcp:host:" + "9" * 5000,
        "tcp:host:٣",
        "tcp:two..dots:1",
        "tcp:" + "x" * 64 + ":1",
        "tls:" + "x." * 127 + ":1",
        "tcp:zero\0byte:1",
        "udp:host:1",
        "file:",
        "file:zero\0byte",
        "exec:cat",
        "UNIX:/tmp/x",
    ],
)
def test_what_is_no_address_is_refused_with_what_would_be_one(uri: str) -> None:
    with pytest.raises(UsageError, match="is not a migration address") as caught:
        parse_address(uri)
    assert caught.value.remedy == "write unix:PATH, tcp:HOST:PORT, tls:HOST:PORT or file:PATH"


@pytest.mark.parametrize(("uri", "shown"), [("tcp::4444", "tcp:127.0.0.1:4444"), ("tls::0", "tls:127.0.0.1:0")])
def test_without_a_host_it_is_this_one_and_reached_from_this_one_only(uri: str, shown: str) -> None:
    assert str(parse_address(uri)) == shown


def test_encrypted_address_is_another_than_the_plain_one() -> None:
    assert TLSAddress("host", 1) != TCPAddress("host", 1)


@pytest.mark.parametrize("path", ["", "x" * (MAX_PATH + 1), "zero\0byte"])
def test_path_that_cannot_name_a_socket_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="path"):
        parse_address(f"unix:{path}")


@given(
    st.text(max_size=30)
    | st.text(max_size=30).map("tcp:{}:80".format)
    | st.text(max_size=30).map("tls:{}:80".format)
    | st.text(max_size=120).map("unix:".__add__)
)
def test_any_text_is_an_address_or_a_usage_error(uri: str) -> None:
    try:
        address = parse_address(uri)
    except UsageError:
        return
    assert isinstance(address, UnixAddress if uri.startswith("unix:") else TCPAddress)
    assert isinstance(address, TLSAddress) is uri.startswith("tls:")

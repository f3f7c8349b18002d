"""Where the other side of a migration is: ``unix:PATH``, ``tcp:HOST:PORT``, ``tls:HOST:PORT`` or ``file:PATH``."""

from dataclasses import dataclass
from typing import ClassVar, Final

from dirtylog.errors import UsageError
from dirtylog.linux.socketfile import check_path

LOOPBACK: Final = "127.0.0.1"
"""The host that is meant where none is named: this one, and reached from this one only."""


_MAX_HOST: Final = 253
"""Characters of the longest name that there can be (RFC 1035, section 2.3.4, without what is not written)."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A host, by name or number, and a port; port 0 lets the system choose where one listens."""

    host: str
    port: int
    scheme: ClassVar = "tcp"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TLSAddress(TCPAddress):
    """The same, where both sides encrypt what they say, and prove who they are."""

    scheme: ClassVar = "tls"


@dataclass(frozen=True, slots=True)
class FileAddress:
    """A file that a machine is kept in."""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"


Address = UnixAddress | TCPAddress | FileAddress
"""A `TLSAddress` is a `TCPAddress`."""

_OF_HOSTS: Final = {each.scheme: each for each in (TCPAddress, TLSAddress)}


def parse_address(uri: str) -> Address:
    """The address in a URI; an IPv6 host stands in brackets, and no host means this one, `LOOPBACK`.

    Raises:
        UsageError: it is none, with what would be one.
    """
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "unix":
        check_path(rest)
        return UnixAddress(rest)
    if colon and scheme in _OF_HOSTS:
        host, separator, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host or not separator else LOOPBACK
        if can_be_host(host) and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16:
            return _OF_HOSTS[scheme](host, int(port))
    if colon and scheme == "file" and rest and "\0" not in rest:
        return FileAddress(rest)
    raise UsageError(
        f"{uri!r} is not a migration address", remedy="write unix:PATH, tcp:HOST:PORT, tls:HOST:PORT or file:PATH"
    )


def can_be_host(host: str) -> bool:
    """Whether the resolver takes it: what it cannot encode, it refuses with other errors than its own."""
    try:
        return 0 < len(host.encode("idna")) <= _MAX_HOST and "\0" not in host
    except UnicodeError:
        return False

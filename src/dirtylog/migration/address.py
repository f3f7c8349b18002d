"""Where the other side of a migration is: ``unix:PATH``, ``tcp:HOST:PORT`` or ``file:PATH``."""

from dataclasses import dataclass

from dirtylog.errors import UsageError
from dirtylog.linux.socketfile import check_path


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

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class FileAddress:
    """A file that a machine is kept in."""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"


Address = UnixAddress | TCPAddress | FileAddress


def parse_address(uri: str) -> Address:
    """The address in a URI; an IPv6 host stands in brackets.

    Raises:
        UsageError: it is none, with what would be one.
    """
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "unix":
        check_path(rest)
        return UnixAddress(rest)
    if colon and scheme == "tcp":
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if _can_be_host(host) and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16:
            return TCPAddress(host, int(port))
    if colon and scheme == "file" and rest and "\0" not in rest:
        return FileAddress(rest)
    raise UsageError(f"{uri!r} is not a migration address", remedy="write unix:PATH, tcp:HOST:PORT or file:PATH")


def _can_be_host(host: str) -> bool:
    """Whether the resolver takes it: what it cannot encode, it refuses with other errors than its own."""
    try:
        return bool(host.encode("idna")) and "\0" not in host
    except UnicodeError:
        return False

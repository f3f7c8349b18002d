"""Certificates for both sides of a migration, and connections that are encrypted with them."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trustme
from support.connections import HOST
from support.streams import accepted
from support.waiting import Task

from dirtylog.migration import Channel, Credentials, Listener, Role, connect
from dirtylog.migration.address import TLSAddress

EXPIRED: Final[dict[str, Any]] = {
    "not_before": datetime(2001, 1, 1, tzinfo=UTC),
    "not_after": datetime(2002, 1, 1, tzinfo=UTC),
}


def issue(directory: Path, authority: trustme.CA, *names: str, trusts: trustme.CA | None = None, **when: Any) -> str:
    """Fill a directory with credentials of both roles for a host; for `HOST` unless other names are given."""
    directory.mkdir()
    (trusts or authority).cert_pem.write_to_path(str(directory / "ca-cert.pem"))
    for name in ("client", "server"):
        issued = authority.issue_cert(*(names or (HOST,)), **when)
        key = directory / f"{name}-key.pem"
        issued.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        issued.cert_chain_pems[0].write_to_path(str(directory / f"{name}-cert.pem"))
    return str(directory)


def both(directory: str) -> tuple[Credentials, Credentials]:
    """The source's and the destination's."""
    return Credentials.load(directory, Role.SOURCE), Credentials.load(directory, Role.DESTINATION)


@contextmanager
def encrypted_channels(directory: str) -> Iterator[tuple[Channel, Channel]]:
    """A source's and a destination's, over TCP."""
    source_credentials, destination_credentials = both(directory)
    accepted_channels: list[Channel] = []
    with ExitStack() as stack:
        listener = stack.enter_context(closing(Listener(TLSAddress(HOST, 0), destination_credentials)))
        task = Task(lambda: accepted_channels.append(listener.open(accepted(listener))))
        source = stack.enter_context(connect(listener.address, source_credentials))
        task.join()
        yield source, stack.enter_context(accepted_channels[0])

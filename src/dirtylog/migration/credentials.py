"""The X.509 files with which a side of an encrypted migration proves who it is, and by which it knows the other.

Their names are QEMU's: ``ca-cert.pem`` for both, ``client-cert.pem`` and ``client-key.pem`` for a source,
``server-cert.pem`` and ``server-key.pem`` for a destination.
"""

import os
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from dirtylog.errors import UsageError
from dirtylog.migration.address import (
    Address,
    FileAddress,
    TCPAddress,
    TLSAddress,
    UnixAddress,
    can_be_host,
)
from dirtylog.migration.protocol import Role

_AUTHORITY: Final = "ca-cert.pem"
_NAMES: Final = {Role.SOURCE: "client", Role.DESTINATION: "server"}
_HOW_TO_MAKE: Final = "docs/security.md tells how to make them"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one side shows, and whom it believes.

    Attributes:
        role: whose they are.
        context: for TLS 1.3 only, which checks the other side's certificate against this authority, and no other.
        hostname: the name that a destination's certificate must have; empty for that of its address.
    """

    role: Role
    context: ssl.SSLContext
    hostname: str = ""

    @classmethod
    def load(cls, directory: str, role: Role, hostname: str = "") -> Self:
        """Those in a directory.

        Raises:
            UsageError: a file is missing, is not what it should be, or is a key that others can read.
        """
        if hostname and not can_be_host(hostname):
            raise UsageError(f"{hostname!r} cannot be the name of a host", remedy="give one that the certificate has")
        folder = Path(directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role is Role.SOURCE else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if role is Role.DESTINATION:
            context.num_tickets = 0  # nothing is resumed, and a source hears nothing that its destination did not say
        _load_certificates(context, folder / _AUTHORITY)
        _load_own(context, folder / f"{_NAMES[role]}-cert.pem", folder / f"{_NAMES[role]}-key.pem")
        return cls(role, context, hostname)


def credentials_for(address: Address, directory: str, role: Role, hostname: str = "") -> Credentials | None:
    """The credentials that a side needs at an address: none but where it is ``tls:``.

    Raises:
        UsageError: they are missing or cannot be used; or there are some, and the address would have all sent in the
            clear over a network.
    """
    if isinstance(address, TLSAddress):
        if not directory:
            raise UsageError(
                f"{address} needs credentials",
                remedy="name their directory with --tls-creds (in QMP: the parameter tls-creds)",
            )
        return Credentials.load(directory, role, hostname)
    if directory and isinstance(address, TCPAddress):
        raise UsageError(
            f"there are TLS credentials, and {address} would not be encrypted",
            remedy=f"use {TLSAddress(address.host, address.port)}, or leave tls-creds empty",
        )
    return None


def socket_address(address: Address, credentials: Credentials | None) -> UnixAddress | TCPAddress:
    """An address that one can listen at and connect to, with credentials exactly if it is a `TLSAddress`.

    Raises:
        UsageError: it is not.
    """
    if isinstance(address, FileAddress):
        raise UsageError(f"nobody can connect to {address}", remedy="use unix:PATH, tcp:HOST:PORT or tls:HOST:PORT")
    if isinstance(address, TLSAddress) != (credentials is not None):
        lack = "lacks credentials" if credentials is None else "has no use for credentials: it is not encrypted"
        raise UsageError(f"{address} {lack}", remedy="use tls:HOST:PORT with credentials, or another without")
    return address


def _load_certificates(context: ssl.SSLContext, path: Path) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UsageError(
            f"{path} holds no certificate in PEM: {_reason(error)}", remedy=f"replace it; {_HOW_TO_MAKE}"
        ) from error


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate)  # else nothing tells which file is bad
    status = _check_readable(key)
    if status.st_uid == os.getuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"the private key {key} is open to others than its owner (its mode is {stat.S_IMODE(status.st_mode):04o})",
            remedy=f"chmod 600 {key}",
        )

    def refuse_passphrase() -> bytes:
        raise UsageError(
            f"the private key {key} is protected by a passphrase, and nobody can be asked for it",
            remedy=f"decrypt it, into a file of mode 600: openssl pkey -in {key} -out NEW",
        )

    try:
        context.load_cert_chain(certificate, key, refuse_passphrase)
    except ssl.SSLError as error:
        raise UsageError(
            f"{key} cannot be used with {certificate}: {_reason(error)}", remedy=f"replace both; {_HOW_TO_MAKE}"
        ) from error


def _check_readable(path: Path) -> os.stat_result:
    """Say which file cannot be read, and why: OpenSSL does not, and would wait for what is no file."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
            return status
        reason = "it is not a file"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:  # a zero byte, or what no path can be encoded as
        reason = str(error)
    raise UsageError(f"the TLS credentials {str(path)!r} cannot be read: {reason}", remedy=_HOW_TO_MAKE)


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "it is damaged").lower().replace("_", " ")

"""Moving a running machine to another process.

The protocol (`messages`, `protocol`) does no I/O; `channel`, `listener` and `reception` do, over a plain `stream` or
over `tls`. `outgoing` and `incoming` drive the two sides, `ram` walks dirty memory, `economy` decides how it is sent,
and `switchover` when to stop the guest.
"""

from dirtylog.migration.address import Address, FileAddress, parse_address
from dirtylog.migration.channel import Channel, connect
from dirtylog.migration.credentials import Credentials, credentials_for
from dirtylog.migration.incoming import IncomingMigration
from dirtylog.migration.incoming_file import IncomingFile
from dirtylog.migration.listener import Listener
from dirtylog.migration.outgoing import OutgoingMigration
from dirtylog.migration.parameters import Compression, Parameters, Slowdown
from dirtylog.migration.protocol import Role
from dirtylog.migration.statistics import DowntimeParts, PassStatistics, Statistics, Status, Verdict

__all__ = [
    "Address",
    "Channel",
    "Compression",
    "Credentials",
    "DowntimeParts",
    "FileAddress",
    "IncomingFile",
    "IncomingMigration",
    "Listener",
    "OutgoingMigration",
    "Parameters",
    "PassStatistics",
    "Role",
    "Slowdown",
    "Statistics",
    "Status",
    "Verdict",
    "connect",
    "credentials_for",
    "parse_address",
]

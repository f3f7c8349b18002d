"""Moving a running machine to another process.

The protocol (`messages`, `protocol`) does no I/O; `channel` does, and nothing else. `outgoing` and `incoming` drive the
two sides, `ram` walks dirty memory, `economy` decides how it is sent, and `switchover` when to stop the guest.
"""

from dirtylog.migration.address import Address, parse_address
from dirtylog.migration.channel import Channel, Listener, connect
from dirtylog.migration.incoming import IncomingMigration
from dirtylog.migration.outgoing import OutgoingMigration
from dirtylog.migration.parameters import Compression, Parameters
from dirtylog.migration.statistics import DowntimeParts, PassStatistics, Statistics, Status

__all__ = [
    "Address",
    "Channel",
    "Compression",
    "DowntimeParts",
    "IncomingMigration",
    "Listener",
    "OutgoingMigration",
    "Parameters",
    "PassStatistics",
    "Statistics",
    "Status",
    "connect",
    "parse_address",
]

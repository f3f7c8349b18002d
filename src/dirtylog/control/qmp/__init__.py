"""QMP, the QEMU Machine Protocol: a server for dirtylog's machines, and a client for these and for QEMU's.

Each module imports only from those before it: ``stream`` cuts bytes into JSON values, ``messages`` gives them types,
``registry`` holds the commands, ``session`` is the server's protocol without I/O, ``connection`` serves one client
and ``server`` all of them; ``client`` is the other end.
"""

from dirtylog.control.qmp.client import QMPClient
from dirtylog.control.qmp.messages import ErrorClass, Event, QMPCommandError, QMPError, Version
from dirtylog.control.qmp.registry import Arguments, CommandRegistry, NoArguments, Scope
from dirtylog.control.qmp.server import QMPServer
from dirtylog.control.qmp.session import HandlerError

__all__ = [
    "Arguments",
    "CommandRegistry",
    "ErrorClass",
    "Event",
    "HandlerError",
    "NoArguments",
    "QMPClient",
    "QMPCommandError",
    "QMPError",
    "QMPServer",
    "Scope",
    "Version",
]

"""The exceptions of dirtylog, sorted by who has to act.

::

    DirtylogError
    ├── UsageError           the caller asked for something that cannot be
    │   ├── ClosedError      the object was closed before
    │   ├── AccessError      nothing answers there, or what is there refuses
    │   ├── UntrackableError  this memory cannot be watched in this way
    │   │   └── AlreadyWatchedError  somebody watches it already
    │   ├── LostMappingError  the memory was unmapped or replaced while it was watched
    │   └── ForkedError      the object belongs to the process that made it
    ├── HostError            the host lacks something; the remedy says how to get it
    ├── KernelError          the kernel refused a system call
    ├── GuestError           the guest did something that no machine can go on from
    ├── PeerError            the other side of a connection ...
    │   ├── ProtocolError    ... broke the protocol
    │   ├── RefusedError     ... refused, and said why
    │   └── DisconnectedError  ... went away
    │       └── InDoubtError     ... and may run the guest or not
    └── CancelledError       somebody cancelled the operation

Every error is one sentence, without its final full stop, that names the cause; where a remedy is known it is kept
apart in ``remedy`` and shown after it.
"""


class DirtylogError(Exception):
    """The base of all errors raised by dirtylog.

    Attributes:
        cause: what went wrong, one sentence.
        remedy: what the reader can do about it, or None.
    """

    def __init__(self, cause: str, *, remedy: str | None = None) -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(cause if remedy is None else f"{cause}; {remedy}")


class UsageError(DirtylogError):
    """The caller asked for something that cannot be."""


class ClosedError(UsageError):
    """The object was used after it was closed."""


class AccessError(UsageError):
    """An access to an address where nothing answers, or that is refused.

    Attributes:
        address: where, in the address space or region that the message names.
        size: bytes.
    """

    def __init__(self, cause: str, address: int, size: int) -> None:
        self.address = address
        self.size = size
        super().__init__(f"{cause}: {size} bytes at {address:#x}")


class UntrackableError(UsageError):
    """Memory that cannot be watched, or not by this mechanism."""


class AlreadyWatchedError(UntrackableError):
    """Memory that somebody watches by a mechanism that serves one watcher only."""


class LostMappingError(UsageError):
    """Memory was unmapped, moved or replaced while it was watched: what was written to it last is not known."""


class ForkedError(UsageError):
    """An object was used in a child of the process that made it, whose memory is another."""


class HostError(DirtylogError):
    """The host lacks something that is needed: a device, a permission, a kernel feature, memory."""


class KernelError(DirtylogError):
    """The kernel refused a system call.

    Attributes:
        call: the system call, and the request for an ioctl.
        errno: the error number.
    """

    def __init__(self, call: str, errno: int, message: str, *, remedy: str | None = None) -> None:
        self.call = call
        self.errno = errno
        super().__init__(f"{call} failed: {message}", remedy=remedy)


class GuestError(DirtylogError):
    """The guest did something that no machine can go on from."""


class PeerError(DirtylogError):
    """The other side of a connection is to blame."""


class ProtocolError(PeerError):
    """The peer sent something that the protocol does not allow."""


class RefusedError(PeerError):
    """The peer refused, and said why."""


class DisconnectedError(PeerError):
    """The connection ended before its work was done, or was never made."""


class InDoubtError(DisconnectedError):
    """The connection ended after the guest was handed over, before the destination confirmed that it runs it."""


class CancelledError(DirtylogError):
    """Somebody cancelled the operation."""

"""A source's connections, as a whole."""

import threading

from dirtylog.migration.address import Address, FileAddress
from dirtylog.migration.channel import connect
from dirtylog.migration.credentials import Credentials, credentials_for
from dirtylog.migration.file import FileOutlet
from dirtylog.migration.messages import Join, Joined
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.protocol import Role
from dirtylog.migration.tls import Handshakes


class Connections:
    """Opens channels, and makes them fail or closes them all. May be used from any thread.

    Args:
        tls_creds: the directory with the source's credentials; empty for none.
        tls_hostname: the name that the destination's certificate must have; empty for that of its address.
    """

    def __init__(self, tls_creds: str = "", tls_hostname: str = "") -> None:
        self._tls = tls_creds, tls_hostname
        self._handshakes = Handshakes()
        self._lock = threading.Lock()
        self._channels: list[Outlet] = []
        self._aborted = False

    def check(self, address: Address) -> None:
        """Find out whether there are credentials for an address that wants some.

        Raises:
            UsageError: there are not, or they cannot be used.
        """
        self._credentials(address)

    def _credentials(self, address: Address) -> Credentials | None:
        directory, hostname = self._tls
        return credentials_for(address, directory, Role.SOURCE, hostname)

    def open(self, address: Address) -> Outlet:
        """One more channel.

        Raises:
            PeerError: nobody listens there, or one side does not accept the other.
            UsageError: see `check`.
        """
        channel: Outlet
        if isinstance(address, FileAddress):
            channel = FileOutlet(address.path)
        else:
            channel = connect(address, self._credentials(address), self._handshakes)
        with self._lock:
            self._channels.append(channel)
            if self._aborted:
                channel.abort()
        return channel

    def join(self, address: Address, session: bytes) -> Outlet:
        """One more channel of a session.

        Raises:
            DirtylogError: the destination does not take it.
        """
        channel = self.open(address)
        channel.send(Join(session))
        channel.expect(Joined)
        return channel

    def abort(self) -> None:
        """Make every call on any of them fail, and on those that are still to come, as if it was cancelled."""
        self._handshakes.abort()
        with self._lock:
            self._aborted = True
            for channel in self._channels:
                channel.abort()

    def cut(self) -> None:
        """Make calls on those that are open fail, as if the network had."""
        with self._lock:
            for channel in self._channels:
                channel.cut()

    def close(self) -> None:
        """Close all that are open. They are disowned before: from then on their descriptors' numbers may be others'."""
        with self._lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()

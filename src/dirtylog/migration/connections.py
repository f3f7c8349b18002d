"""A source's connections, as a whole."""

import threading

from dirtylog.migration.address import Address, FileAddress
from dirtylog.migration.channel import connect
from dirtylog.migration.file import FileOutlet
from dirtylog.migration.messages import Join, Joined
from dirtylog.migration.outlet import Outlet


class Connections:
    """Opens channels, and makes them fail or closes them all. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: list[Outlet] = []
        self._aborted = False

    def open(self, address: Address) -> Outlet:
        """One more channel.

        Raises:
            DisconnectedError: nobody listens there.
        """
        channel = FileOutlet(address.path) if isinstance(address, FileAddress) else connect(address)
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
        with self._lock:
            self._aborted = True
            for channel in self._channels:
                channel.abort()

    def cut(self) -> None:
        """Make calls on those that are open fail, as if the network had."""
        with self._lock:
            for channel in self._channels:
                channel.stop_sending()
                channel.stop_receiving()

    def close(self) -> None:
        """Close all that are open. They are disowned before: from then on their descriptors' numbers may be others'."""
        with self._lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()

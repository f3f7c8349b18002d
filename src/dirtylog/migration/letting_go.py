"""How a source lets go of the guest.

The guest changes hands in three messages. ``Ready``: the destination could run it, and waits. ``Handover``: the source
has let go, for good. ``Taken``: the destination starts it now. Up to the handover a failure of any kind leaves the
guest here, and the destination, which was never told, does not start it.

After the handover the source takes the guest back only if the destination says that it gave up, or if the
destination's process is known to have ended without having said ``Taken``, which can be seen where both are on one
host. Otherwise the guest stays stopped here and the operator, who can look at the destination, decides.
"""

from typing import Final

from dirtylog.errors import DirtylogError, DisconnectedError, HostError, InDoubtError, ProtocolError, RefusedError
from dirtylog.linux.process import ProcessName
from dirtylog.migration.custody import SOURCE, Custody, Event
from dirtylog.migration.messages import Handover, Taken
from dirtylog.migration.outlet import Outlet

_GONE_TIMEOUT: Final = 2.0


class LettingGo:
    """The source's part of `custody`.

    Attributes:
        custody: whose the guest is.
    """

    def __init__(self) -> None:
        self.custody = Custody.MINE

    def note(self, event: Event) -> None:
        """Something happened."""
        self.custody = SOURCE[self.custody, event]

    def hand_over(self, channel: Outlet, destination: ProcessName) -> None:
        """Tell the destination that the guest is there, once `Event.HANDOVER` was noted, and wait until it confirms.

        Raises:
            InDoubtError: nobody confirmed it, and the guest may be there.
            DirtylogError: the guest is here.
        """
        try:
            channel.send(Handover())
        except (DisconnectedError, HostError):  # the destination was not told, the file not made
            self.note(Event.NOT_SAID)
            raise
        try:
            channel.expect(Taken)
        except RefusedError:
            self.note(Event.REFUSED)
            raise
        except (DisconnectedError, ProtocolError) as error:
            self.note(Event.LOST)
            self._resolve(channel, destination, error)
        else:
            self.note(Event.TAKEN)

    def _resolve(self, channel: Outlet, destination: ProcessName, lost: DirtylogError) -> None:
        if not destination.is_gone(_GONE_TIMEOUT):
            raise InDoubtError(
                "the connection ended after the guest was handed over, before the destination confirmed that it runs",
                remedy="look at the destination: if it never will run the guest, 'cont' runs it here again",
            ) from lost
        # What it said before it ended may have come after it was no longer waited for.
        channel.set_timeout(_GONE_TIMEOUT)
        try:
            channel.expect(Taken)
        except RefusedError:
            self.note(Event.REFUSED)
            raise
        except DirtylogError:  # nothing, or nothing whole
            self.note(Event.GONE)
            raise lost from None
        self.note(Event.TAKEN)

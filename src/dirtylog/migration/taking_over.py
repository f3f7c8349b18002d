"""How a destination takes the guest over: the other half of `letting_go`."""

from dirtylog.errors import CancelledError, DisconnectedError, PeerError
from dirtylog.migration.channel import Channel
from dirtylog.migration.custody import DESTINATION, Custody, Event
from dirtylog.migration.messages import Taken


class TakingOver:
    """The destination's part of `custody`. Its caller sees to it that one thing happens at a time.

    Attributes:
        custody: whose the guest is.
    """

    def __init__(self) -> None:
        self.custody = Custody.THEIRS

    def note(self, event: Event) -> None:
        """Something happened."""
        self.custody = DESTINATION[self.custody, event]

    def fail(self, error: BaseException) -> None:
        """The conversation ended with an error."""
        self.note(Event.LOST if isinstance(error, PeerError) else Event.GIVEN_UP)

    def take(self) -> None:
        """The source has let go.

        Raises:
            CancelledError: too late: this side had given up.
        """
        self.note(Event.HANDOVER)
        if self.custody is not Custody.MINE:  # the source can hear no Taken any more: it must not find that it ran here
            raise CancelledError("waiting for a migration was cancelled")

    def confirm(self, channel: Channel) -> None:
        """Say that the guest starts here now. It does so even if the source is gone, which has let go for good."""
        try:
            channel.send(Taken())
        except DisconnectedError:
            self.note(Event.LOST)

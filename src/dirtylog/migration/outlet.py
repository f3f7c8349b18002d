"""Where a source's messages go."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from dirtylog.errors import RefusedError
from dirtylog.linux.mapping import Contents
from dirtylog.migration.messages import Message

_M = TypeVar("_M", bound=Message)


class Outlet(Protocol):
    """A destination as its source sees it. One thread uses it; any may `abort` it. See `Channel`."""

    def set_timeout(self, seconds: float) -> None:
        """How long nothing may move."""

    def send(self, message: Message, payload: Iterable[Contents] = ()) -> int:
        """Send a message and what belongs to it; how many bytes that were."""

    def expect(self, kind: type[_M]) -> _M:
        """The destination's next message, which must be of a kind."""

    def abort(self) -> None:
        """Make every call fail, in whichever thread it waits."""

    def stop_sending(self) -> None:
        """Make every `send` fail, in whichever thread it waits."""

    def cut(self) -> None:
        """Make every call fail, in whichever thread it waits, as if the network had."""

    def last_words(self) -> RefusedError | None:
        """After the connection failed: what the destination may have said before, as an error."""

    def close(self) -> None:
        """Give it up; idempotent."""

"""Pages that the guest waits for on the destination, from the source's side."""

from dirtylog.errors import DirtylogError
from dirtylog.migration.attention import Attention, BusyPolling
from dirtylog.migration.batch import Batch
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Page, ZeroPage
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.protocol import Role, Stage
from dirtylog.migration.sender import Sent
from dirtylog.migration.statistics import Statistics
from dirtylog.migration.urgent_channel import UrgentChannel


class Tally:
    """Counts what is sent after the handover as one more pass."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._pass = statistics.begin_pass()

    @property
    def number(self) -> int:
        """The pass's."""
        return self._pass.number

    def count(self, batch: Batch, sent: Sent) -> None:
        """Note what was sent in its turn."""
        zeros, pages = (0 if table is None else table.pages for table in (batch.zeros, batch.pages))
        self._add(zeros, pages, sent.bytes)

    def answered(self, size: int, *, zero: bool, was_owed: bool) -> None:
        """Note that a page was sent because it was asked for, be it for the second time."""
        self._add(int(zero and was_owed), int(not zero and was_owed), size)
        self._statistics.postcopy_requests += 1

    def _add(self, zeros: int, pages: int, size: int) -> None:
        self._pass.zero_pages += zeros
        self._pass.pages += pages
        self._pass.bytes += size
        self._statistics.remaining_pages = max(0, self._statistics.remaining_pages - zeros - pages)
        self._statistics.postcopy_bytes += size

    def owe(self, pages: int) -> None:
        """Note how many are left after a connection was lost: not all that was sent has come."""
        self._statistics.remaining_pages = pages

    def took(self, seconds: float) -> None:
        """Note for how long it has been sent."""
        self._pass.seconds = seconds


class UrgentAnswers:
    """Answers what the destination asks for, whenever its main channel's thread has to wait, and between what it sends.

    A page is sent even if it is on its way already: on the other channel it may be behind many.

    Args:
        channel: used by the main channel's thread only; closed by its owner.
        owed: what is left.
        tally: told what was sent.
        main: cut if this channel fails, until ``PassEnd`` was said there. After that it fails by itself if anything is
            missing, while the end of this one may have overtaken the last answer there.
    """

    def __init__(self, channel: Channel, owed: OwedPages, tally: Tally, main: Channel) -> None:
        self._channel = channel
        self._pages = UrgentChannel(channel, Role.SOURCE)
        self._owed = owed
        self._tally = tally
        self._main = main
        self._error: DirtylogError | None = None
        self._attention = Attention(BusyPolling())
        self._attention.add(channel, self._serve)
        main.attend(self._attention)
        if channel.has_buffered:  # it came together with what the channel was taken in with
            self._serve()

    def check(self) -> None:
        """Raise what made it cut the main channel, if it did."""
        if self._error is not None:
            raise self._error

    def wait(self, seconds: float) -> bool:
        """Answer for some seconds. It is not over then: False.

        Raises:
            DirtylogError: that failed.
        """
        self._attention.until(lambda: self._error is not None, seconds)
        self.check()
        return False

    def _serve(self) -> None:
        try:
            for block, page, _ in self._pages.receive():
                self._answer(block, page)
        except DirtylogError as error:
            self._error = error
            self._attention.remove(self._channel)
            if self._main.stage is not Stage.SERVED:
                self._main.cut()

    def _answer(self, block: int, page: int) -> None:
        contents = self._owed.contents(block, page)
        size = self._pages.send(ZeroPage if contents is None else Page, block, page, contents)
        self._tally.answered(size, zero=contents is None, was_owed=self._owed.answered(block, page))

"""Pages that the guest waits for on the destination, from the source's side."""

import numpy as np

from dirtylog.errors import DirtylogError, ProtocolError
from dirtylog.migration.attention import Attention
from dirtylog.migration.batch import Batch
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Page, Request, ZeroPages
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.protocol import Stage
from dirtylog.migration.sender import Sent
from dirtylog.migration.statistics import Statistics
from dirtylog.units import PAGE_SIZE


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
        self._owed = owed
        self._tally = tally
        self._main = main
        self._error: DirtylogError | None = None
        self._attention = Attention()
        self._attention.add(channel, self._serve)
        channel.read_ahead()
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
            self._answer()
            while self._channel.has_buffered:
                self._answer()
        except DirtylogError as error:
            self._error = error
            self._attention.remove(self._channel)
            if self._main.stage is not Stage.SERVED:
                self._main.cut()

    def _answer(self) -> None:
        request = self._channel.receive()
        if not isinstance(request, Request):
            raise ProtocolError(f"the destination sent {type(request).__name__} where only requests are expected")
        page, start = request.page, request.page * PAGE_SIZE
        block, was_owed, zero = self._owed.answer(request)
        if zero:
            size = self._channel.send(ZeroPages(request.block, np.array([[page, 1]])))
        else:
            size = self._channel.send(Page(request.block, page), [block.memory[start : start + PAGE_SIZE]])
        self._tally.answered(size, zero=zero, was_owed=was_owed)

"""Pages that the guest waits for on the destination, from the source's side."""

import threading

import numpy as np

from dirtylog.migration.batch import Batch
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import Page, Request, ZeroPages
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.sender import Sent
from dirtylog.migration.statistics import Statistics
from dirtylog.units import PAGE_SIZE


class Tally:
    """Counts what is sent after the handover, by whichever thread, as one more pass."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._pass = statistics.begin_pass()
        self._lock = threading.Lock()

    @property
    def number(self) -> int:
        """The pass's."""
        return self._pass.number

    def count(self, batch: Batch, sent: Sent) -> None:
        """Note what was sent in its turn."""
        zeros, pages = (0 if table is None else table.pages for table in (batch.zeros, batch.pages))
        with self._lock:
            self._add(zeros, pages, sent.bytes)

    def answered(self, size: int, *, zero: bool, was_owed: bool) -> None:
        """Note that a page was sent because it was asked for, be it for the second time."""
        with self._lock:
            self._add(int(zero and was_owed), int(not zero and was_owed), size)
            self._statistics.postcopy_requests += 1

    def _add(self, zeros: int, pages: int, size: int) -> None:
        self._pass.zero_pages += zeros
        self._pass.pages += pages
        self._pass.bytes += size
        self._statistics.remaining_pages = max(0, self._statistics.remaining_pages - zeros - pages)
        self._statistics.postcopy_bytes += size

    def took(self, seconds: float) -> None:
        """Note for how long it has been sent."""
        self._pass.seconds = seconds


class UrgentLane:
    """Answers what the destination asks for, in a thread of its own.

    A page is sent even if it is on its way already: on the other channel it may be behind many.

    Args:
        channel: used by this thread only; closed by its owner, after this.
        owed: what is left.
        tally: told what was sent.
        main: made to fail if this does.
    """

    def __init__(self, channel: Channel, owed: OwedPages, tally: Tally, main: Channel) -> None:
        self._channel = channel
        self._owed = owed
        self._tally = tally
        self._main = main
        self._thread = threading.Thread(target=self._run, name="urgent", daemon=True)
        self._error: Exception | None = None
        self._closing = False
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._closing = True
        self._channel.cut()
        self._thread.join()

    def check(self) -> None:
        """Raise what ended it, if anything but `close` did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                self._answer(self._channel.expect(Request))
        except Exception as error:  # noqa: BLE001 - raised by `check`
            if not self._closing:
                self._error = error
                self._main.cut()

    def _answer(self, request: Request) -> None:
        (block, was_owed), page = self._owed.answer(request), request.page
        start = page * PAGE_SIZE
        zero = block.mapping.next_data(start, start + PAGE_SIZE) > start
        if zero:
            size = self._channel.send(ZeroPages(request.block, np.array([[page, 1]])))
        else:
            size = self._channel.send(Page(request.block, page), [block.memory[start : start + PAGE_SIZE]])
        self._tally.answered(size, zero=zero, was_owed=was_owed)

"""The channels of a migration as one."""

import queue
import threading
from collections.abc import Sequence

from dirtylog.errors import ProtocolError
from dirtylog.linux.process import thread_starved_ns
from dirtylog.memory import RAMBlock
from dirtylog.migration.batch import Batch
from dirtylog.migration.economy import Economy, Way
from dirtylog.migration.encoding import SentCopies
from dirtylog.migration.messages import PassDone, PassEnd
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.parameters import Compression, Parameters
from dirtylog.migration.sender import Sender, Sent


def senders(channels: Sequence[Outlet], blocks: Sequence[RAMBlock], parameters: Parameters) -> list[Sender]:
    """A sender for each channel, with the ways of sending that the parameters allow.

    They begin with no copies of anything: what an earlier migration's destination has is another's.
    """
    ways: tuple[Way, ...] = (Way.FAST, Way.THOROUGH) if parameters.compression is Compression.AUTO else ()
    copies = None
    if parameters.delta_cache:
        ways += (Way.DELTA,)
        copies = SentCopies([block.pages for block in blocks], parameters.delta_cache)
    return [Sender(channel, blocks, Economy(ways), copies) for channel in channels]


class Lanes:
    """One or more channels as one: batches go to whichever is free, and a pass ends when all channels have it (M7).

    With one channel everything happens in the caller's thread, which must be the one that made this. With more, each
    has a thread, and the first error in any is raised by the next call here.

    Args:
        senders: one for each channel, which is used here only until this is closed.
    """

    def __init__(self, senders: Sequence[Sender]) -> None:
        self._senders = senders
        self._queue: queue.Queue[Batch | None] = queue.Queue(len(senders))
        self._lock = threading.Lock()
        self._sent = Sent()
        self._error: Exception | None = None
        self._threads: list[threading.Thread] = []
        if len(senders) > 1:
            for index, sender in enumerate(senders):
                thread = threading.Thread(target=self._work, args=(sender,), name=f"channel{index}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._starved = self._starved_ns()

    def limit(self, rate: int) -> None:
        """Say how many bytes a second may be sent in all; 0 for no limit. Whoever calls `send` keeps to it."""
        share = -(-rate // len(self._senders))
        for sender in self._senders:
            sender.economy.limit = share

    def lift_limit(self) -> None:
        """Send as fast as can be. Where nothing is known of the link yet, the ways stay those that the limit made best.

        What was found out about those is all that the estimate of the downtime could go by.
        """
        for sender in self._senders:
            if sender.economy.link:
                sender.economy.limit = 0

    def begin_pass(self) -> None:
        """What comes next is a new pass."""
        self._starved = self._starved_ns()
        for sender in self._senders:
            sender.economy.begin_pass()

    def send(self, batch: Batch) -> Sent:
        """Have a batch sent; what was sent since the last call."""
        if not self._threads:
            return self._senders[0].send(batch)
        self._raise()
        self._queue.put(batch)
        return self._take()

    def end_pass(self, number: int) -> tuple[Sent, float]:
        """Wait until the destination has everything; what was sent since the last call, and seconds without CPU.

        Those are of the thread, on either side, that had most of them in this pass.

        Raises:
            ProtocolError: the destination has another pass.
        """
        self._queue.join()
        sent = self._take()
        sent.bytes += sum(sender.channel.send(PassEnd(number)) for sender in self._senders)
        starved = max(now - before for before, now in zip(self._starved, self._starved_ns(), strict=True))
        for sender in self._senders:
            done = sender.channel.expect(PassDone)
            if done.number != number:
                raise ProtocolError(f"the destination has pass {done.number} when pass {number} was sent")
            sender.economy.decoded(done.decoded, done.decode_ns / 1e9)
            starved = max(starved, done.starved_ns)
        return sent, starved / 1e9

    def close(self) -> None:
        """End the threads; idempotent. One that is sending is waited for, so abort the channels before in need."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()

    def _starved_ns(self) -> list[int]:
        if not self._threads:
            return [thread_starved_ns()]
        return [thread_starved_ns(thread.native_id) for thread in self._threads]

    def _take(self) -> Sent:
        self._raise()
        with self._lock:
            sent, self._sent = self._sent, Sent()
            return sent

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, sender: Sender) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:  # after one the queue only empties
                    sent = sender.send(batch)
                    with self._lock:
                        self._sent.merge(sent)
            except Exception as error:  # noqa: BLE001 - raised by the next call of the owner
                with self._lock:
                    self._error = self._error or error
            finally:
                self._queue.task_done()

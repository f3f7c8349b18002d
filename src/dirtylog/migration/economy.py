"""Which way of sending pages takes the least time: a choice by measured costs, made anew for every batch.

Costs are seconds for each byte of memory. A way that works before it sends costs that work and the link's time for what
is left to send. Sockets have buffers, so the link carries one batch while the next is worked on: how much of the two
happens at once is measured, too. So is the destination's work, which is all that counts where it takes longest.

What a way would make of the guest's contents is found out on samples, which are not sent. What the link takes is
measured on batches that are sent plain. Both are repeated, as often as that takes a small share of the time only.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from dirtylog.units import KIB

TELLING: Final = 256 * KIB
"""Batches and samples of fewer bytes say more about calls than about bytes."""
_BUFFERED: Final = 3
"""Batches that vanish in the sockets' buffers before the link's speed shows."""
_MEASURED: Final = 2
"""Batches whose time then tells the link's speed: the shortest, since anything may hold one up for a moment."""
_TRIAL: Final = _BUFFERED + _MEASURED
"""Batches that are sent plain in a row to measure the link."""
_SHARE: Final = 1 / 64
"""Of the time, that measuring one way may take."""
_WORTH: Final = 0.9
"""The cost of a way that is worth it, beside that of sending plain."""
_WEIGHT: Final = 0.25
"""Of the newest of measurements in their mean."""
_EPOCH: Final = 8
"""Encoded batches after which it is seen how much of their work was hidden by the link's."""
_SLOW: Final = 1.1
"""Two epochs in a row that take so many times what they should are the destination's doing."""
_UNKNOWN_DECODING: Final = 1 / 400e6
"""Seconds a byte that a destination is thought to take for decoding until it has said so itself."""


class Way(Enum):
    """How contents can be sent."""

    PLAIN = "plain"
    FAST = "fast"
    THOROUGH = "thorough"
    DELTA = "delta"


LEVELS: Final = {Way.FAST: 1, Way.THOROUGH: 6, Way.DELTA: 1}
"""zstd's levels."""
_THOROUGH_WORK: Final = 3
"""`Way.THOROUGH` takes at least so many times the work of `Way.FAST`."""


@dataclass(slots=True)
class _Account:
    """What is known of a way: work in seconds a byte of memory, bytes on the wire for each, and when to look again."""

    known: bool = False
    work: float = 0.0
    ratio: float = 1.0
    due: float = 0.0

    def note(self, memory: int, wire: int, work: float) -> None:
        weight = _WEIGHT if self.known else 1.0
        self.known = True
        self.work += weight * (work / memory - self.work)
        self.ratio += weight * (wire / memory - self.ratio)


@dataclass(slots=True)
class _Epoch:
    """Encoded batches, summed up: how long they took, and how long they would have if nothing happened at once."""

    batches: int = 0
    memory: int = 0
    seconds: float = 0.0
    apart: float = 0.0
    shorter: float = 0.0


@dataclass(slots=True)
class Economy:
    """The costs of the ways that are allowed, and which is best.

    Attributes:
        ways: what is allowed besides `Way.PLAIN`.
        link: seconds a byte on the wire, as measured; 0 until then.
        overlap: how much of the shorter of work and sending happens during the longer, 0 to 1.
        decoding: seconds a byte of memory that the destination takes to decode.
        limit: bytes a second that may be sent; 0 for no limit.
    """

    ways: tuple[Way, ...] = ()
    link: float = 0.0
    overlap: float = 1.0
    decoding: float = _UNKNOWN_DECODING
    limit: int = 0
    _accounts: dict[Way, _Account] = field(default_factory=lambda: {way: _Account() for way in Way})
    _epoch: _Epoch = field(default_factory=_Epoch)
    _measured: deque[float] = field(default_factory=lambda: deque(maxlen=_MEASURED))
    """Seconds a byte of the last batches that told something of the link."""
    _decoded: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    """Seconds a byte that the destination said it took, in the last passes."""
    _now: float = 0.0
    """A clock that runs while something is worked on or sent."""
    _plain: int = 0
    """Batches that were sent plain in a row, in this pass."""
    _trial_due: float = 0.0
    _trial: int = 0
    """Batches that are still to be sent plain to measure the link."""
    _behind: float = 0.0
    """Seconds a byte of memory in the last epoch, if that was more than work and link can explain."""

    def begin_pass(self) -> None:
        """A new pass begins: the sockets' buffers are empty."""
        self._plain = 0

    def decoded(self, memory: int, seconds: float) -> None:
        """Take note of how long the destination took to decode in a pass. One pass may have been held up: two count."""
        if memory >= TELLING:
            self._decoded.append(seconds / memory)
            self.decoding = min(self._decoded)

    @property
    def wire(self) -> float:
        """Seconds a byte on the wire, with the limit; 0 if nothing is known."""
        return max(self.link, self._least)

    @property
    def _least(self) -> float:
        return 1 / self.limit if self.limit else 0.0

    def choose(self, *, known: bool = False) -> Way:
        """The way for the next batch. ``known``: there are copies of what was last sent of these pages."""
        if self._trial or not self.wire:
            return Way.PLAIN
        best = min(self._possible(known=known), key=self.cost, default=Way.PLAIN)
        return best if self.cost(best) < _WORTH * self.wire else Way.PLAIN

    def cost(self, way: Way) -> float:
        """Seconds a byte of memory; infinite if nothing is known."""
        if way is Way.PLAIN:
            return self.wire
        account = self._accounts[way]
        if not account.known:
            return float("inf")
        link = account.ratio * self.link
        busy = account.work + link - self.overlap * min(account.work, link)
        return max(busy, account.ratio * self._least, self.decoding)

    def to_sample(self, *, known: bool = False) -> Way | None:
        """A way of which a sample should be taken now, if any."""
        if self._trial or not self.wire:
            return None
        way = min(self._possible(known=known), key=lambda way: self._accounts[way].due, default=None)
        return None if way is None or self._now < self._accounts[way].due else way

    def sampled(self, way: Way, memory: int, wire: int, work: float) -> None:
        """Take note of what a way made of a sample, and how long that took."""
        self._now += work
        self._accounts[way].note(memory, wire, work)
        self._accounts[way].due = self._now + work / _SHARE

    def sent_plain(self, size: int, seconds: float) -> None:
        """Take note of how long the link took for a batch."""
        self._now += seconds
        self._trial = max(0, self._trial - 1)
        if size < TELLING:
            return
        self._plain += 1
        if self._plain > _BUFFERED:
            self._measured.append(seconds / size)
            if len(self._measured) == _MEASURED:
                self.link = min(self._measured)
                self._schedule_trial(size)

    def sent_encoded(self, way: Way, memory: int, wire: int, work: float, sending: float) -> None:
        """Take note of what a way made of a batch, how long that took, and how long sending it took then."""
        self._now += work + sending
        self._plain = 0
        if memory < TELLING:
            return
        self._accounts[way].note(memory, wire, work)
        if not self._trial_due:
            self._schedule_trial(memory)
        elif self._now >= self._trial_due:
            self._trial = _TRIAL
        self._compare(memory, work, wire * self.link, work + sending)

    def _schedule_trial(self, size: int) -> None:
        """Have the link measured when the time that this costs, beside the best way, is a small share only."""
        lost = self.wire - min(map(self.cost, self.ways), default=float("inf"))
        self._trial_due = self._now + max(0.0, lost) * _TRIAL * size / _SHARE

    def _compare(self, memory: int, work: float, link: float, seconds: float) -> None:
        """Learn from how long an epoch took, beside how long it should have taken."""
        epoch = self._epoch
        epoch.batches += 1
        epoch.memory += memory
        epoch.seconds += seconds
        epoch.apart += work + link
        epoch.shorter += min(work, link)
        if epoch.batches < _EPOCH:
            return
        self._epoch = _Epoch()
        if not epoch.shorter:
            return
        overlap = min(max((epoch.apart - epoch.seconds) / epoch.shorter, 0.0), 1.0)
        self.overlap += _WEIGHT * (overlap - self.overlap)
        before = self._behind
        self._behind = epoch.seconds / epoch.memory if epoch.seconds > _SLOW * epoch.apart else 0.0
        self.decoding = max(self.decoding, min(before, self._behind))

    def _possible(self, *, known: bool) -> list[Way]:
        return [
            way
            for way in self.ways
            if (known or way is not Way.DELTA) and (way is not Way.THOROUGH or self._may_be_thorough())
        ]

    def _may_be_thorough(self) -> bool:
        """Not where even its work takes longer than sending in another way; a sample would be dear there."""
        fast = self._accounts[Way.FAST]
        return fast.known and min(self.wire, self.cost(Way.FAST)) > _THOROUGH_WORK * fast.work

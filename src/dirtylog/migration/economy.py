"""Which way of sending pages takes the least time: a choice by measured costs, made anew for every batch.

Costs are seconds for each byte of memory. A way that takes work before the link costs that work and the link's time for
what is left to send; and the destination's work, where that is longer, since both sides work at the same time. Costs
change with the guest's contents and with the link, so a way that was not chosen is tried again now and then: soon at
first, ever later while it goes on to lose.

What the link takes is measured on batches that are sent plain, and only after some others: the first ones vanish in the
sockets' buffers.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

_WEIGHT: Final = 0.25
"""Of the newest of measurements in their mean."""
_BUFFERED: Final = 3
"""Batches that sockets may take in without the link's having moved them."""
_TRIAL: Final = _BUFFERED + 2
"""Batches that are sent plain in a row to measure the link again."""
_FIRST_WAIT: Final = 8
_LAST_WAIT: Final = 512
"""Batches until a way that lost is tried again."""
_UNKNOWN_DECODING: Final = 1 / 1.5e9
"""Seconds a byte that a destination is thought to take for decoding until it has said so itself."""


class Way(Enum):
    """How contents can be sent."""

    PLAIN = "plain"
    FAST = "fast"
    THOROUGH = "thorough"
    DELTA = "delta"


LEVELS: Final = {Way.FAST: 1, Way.THOROUGH: 6, Way.DELTA: 1}
"""zstd's levels."""


@dataclass(slots=True)
class _Costs:
    work: float = 0.0
    ratio: float = 1.0
    tried: bool = False
    wait: int = 0
    patience: int = _FIRST_WAIT

    def is_due(self) -> bool:
        self.wait -= 1
        return self.wait < 0

    def postpone(self, *, lost: bool) -> None:
        self.patience = min(2 * self.patience, _LAST_WAIT) if lost else _FIRST_WAIT
        self.wait = self.patience


@dataclass(slots=True)
class Economy:
    """The costs of the ways that are allowed, and which is best.

    Attributes:
        ways: what is allowed besides `Way.PLAIN`.
        link: seconds a byte on the wire, as measured; 0 until then.
        decoding: seconds a byte of memory that the destination takes to decode.
        limit: bytes a second that may be sent; 0 for no limit.
    """

    ways: tuple[Way, ...] = ()
    link: float = 0.0
    decoding: float = _UNKNOWN_DECODING
    limit: int = 0
    _costs: dict[Way, _Costs] = field(default_factory=lambda: {way: _Costs() for way in Way})
    _plain: int = 0

    def choose(self) -> Way:
        """The way for the next batch: the cheapest, or one that is due to be tried."""
        if not self.link or 0 < self._plain < _TRIAL:
            return Way.PLAIN
        best = min((Way.PLAIN, *self.ways), key=self.cost)
        for way in (Way.PLAIN, *self.ways):
            if way is not best and self._costs[way].is_due():
                return way
        return best

    def cost(self, way: Way) -> float:
        """Seconds a byte of memory; infinite for what was never tried."""
        link = max(self.link, 1 / self.limit if self.limit else 0.0)
        if way is Way.PLAIN:
            return link
        costs = self._costs[way]
        return max(costs.work + costs.ratio * link, self.decoding) if costs.tried else float("inf")

    def sent_plain(self, size: int, seconds: float) -> None:
        """Take note of how long the link took for a batch."""
        self._plain += 1
        if self._plain > _BUFFERED and size:
            self.link += (_WEIGHT if self.link else 1.0) * (seconds / size - self.link)
            cheapest = min((self.cost(way) for way in self.ways), default=float("inf"))
            self._costs[Way.PLAIN].postpone(lost=cheapest < self.link)

    def sent_encoded(self, way: Way, memory: int, wire: int, seconds: float) -> None:
        """Take note of what a way made of some memory, and how long that took, without the link's part."""
        self._plain = 0
        costs = self._costs[way]
        weight = _WEIGHT if costs.tried else 1.0
        costs.work += weight * (seconds / memory - costs.work)
        costs.ratio += weight * (wire / memory - costs.ratio)
        costs.tried = True
        costs.postpone(lost=self.cost(way) > self.cost(Way.PLAIN))

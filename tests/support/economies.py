"""Economies that choose without measuring."""

from random import Random
from typing import Final

from dirtylog.migration.economy import Economy, Way

WAYS: Final = (Way.FAST, Way.THOROUGH, Way.DELTA)


class Fixed(Economy):
    """Always chooses the same: the way given for pages with a copy, and for the others."""

    def __init__(self, fresh: Way, known: Way | None = None) -> None:
        super().__init__(WAYS)
        self.fresh = fresh
        self.known = fresh if known is None else known
        self.sample: Way | None = None
        self.samples: list[tuple[Way, int, int]] = []

    @property
    def wire(self) -> float:
        return 1.0  # so slow that copies are kept

    def choose(self, *, known: bool = False) -> Way:
        return self.known if known else self.fresh

    def to_sample(self, *, known: bool = False) -> Way | None:
        return self.sample

    def sampled(self, way: Way, memory: int, wire: int, work: float) -> None:
        assert work > 0
        self.samples.append((way, memory, wire))


class Fickle(Economy):
    """Chooses anew each time, at random but repeatably, and takes samples of all."""

    def __init__(self, ways: tuple[Way, ...] = WAYS, seed: int = 0) -> None:
        super().__init__(ways)
        self._chance = Random(seed)  # noqa: S311 - repeatable, not secret

    @property
    def wire(self) -> float:
        return self._chance.choice((0.0, 1.0))

    def choose(self, *, known: bool = False) -> Way:
        ways = [way for way in self.ways if known or way is not Way.DELTA]
        return self._chance.choice([Way.PLAIN, *ways])

    def to_sample(self, *, known: bool = False) -> Way | None:
        return self._chance.choice([None, *(way for way in self.ways if known or way is not Way.DELTA)])

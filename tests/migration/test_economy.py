"""Choices are played on a model of a link, on its own clock: batches are worked on, buffered, carried and decoded."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import pytest

from dirtylog.migration import economy as economy_module
from dirtylog.migration.economy import TELLING, Economy, Way
from dirtylog.units import KIB, MIB

_BATCH: Final = 4 * MIB
_SAMPLE: Final = 256 * KIB
_PASS: Final = 128
"""Batches, after which all wait for the destination."""
_ALL: Final = (Way.FAST, Way.THOROUGH, Way.DELTA)
_GBIT: Final = 8e-9
"""Seconds a byte that a link of 1 Gbit/s takes."""

Contents = dict[Way, tuple[float, float]]
"""What each way makes of some memory: seconds of work a byte, and bytes on the wire for each."""

_TEXT: Final = {Way.FAST: (1.5e-9, 0.1), Way.THOROUGH: (14e-9, 0.07), Way.DELTA: (0.5e-9, 0.9)}
_PROGRAM: Final = {Way.FAST: (4.6e-9, 0.55), Way.THOROUGH: (32e-9, 0.44), Way.DELTA: (4e-9, 0.54)}
_RANDOM: Final = {Way.FAST: (0.3e-9, 1.0), Way.THOROUGH: (0.5e-9, 1.0), Way.DELTA: (0.5e-9, 1.0)}
_COUNTERS: Final = {Way.FAST: (4e-9, 0.5), Way.THOROUGH: (25e-9, 0.4), Way.DELTA: (0.6e-9, 0.05)}


@dataclass
class _Link:
    """Carries batches in order to where they are decoded.

    Attributes:
        seconds: a byte.
        decoding: seconds a byte of memory.
        buffer: bytes that may wait on each side.
        now: the sender's time.
        arrived: when all that was sent has been decoded.
    """

    seconds: float
    decoding: float = 0.5e-9
    buffer: int = 4 * MIB
    now: float = 0.0
    arrived: float = 0.0
    _carried: float = 0.0
    _waiting: list[tuple[float, float, int]] = field(default_factory=list)

    def send(self, wire: int, memory: int, *, encoded: bool) -> float:
        """How long it takes until all is in the buffers."""
        began = self.now
        self._carried = max(self._carried, self.now) + wire * self.seconds
        received = max(self.arrived, self._carried)
        self.arrived = received + (memory * self.decoding if encoded else 0.0)
        self._waiting.append((self._carried, received, wire))
        for stage, room in ((0, self.buffer), (1, 2 * self.buffer)):
            while sum(entry[2] for entry in self._waiting if entry[stage] > self.now) > max(room, wire):
                self.now = min(entry[stage] for entry in self._waiting if entry[stage] > self.now)
        self._waiting = [entry for entry in self._waiting if entry[1] > self.now]
        return self.now - began

    def wait(self) -> None:
        self.now = max(self.now, self.arrived)


def _send(link: _Link, way: Way, made: Contents, economy: Economy | None = None) -> None:
    work, ratio = made.get(way, (0.0, 1.0))
    wire = int(ratio * _BATCH)
    link.now += work * _BATCH
    seconds = link.send(wire, _BATCH, encoded=way is not Way.PLAIN)
    if economy is None:
        return
    if way is Way.PLAIN:
        economy.sent_plain(wire, seconds)
    else:
        economy.sent_encoded(way, _BATCH, wire, work * _BATCH, seconds)


def _sample(link: _Link, made: Contents, economy: Economy) -> None:
    way = economy.to_sample(known=True)
    if way is not None:
        work, ratio = made[way]
        link.now += work * _SAMPLE
        economy.sampled(way, _SAMPLE, int(ratio * _SAMPLE), work * _SAMPLE)


@dataclass
class _Run:
    """Memory sent in passes, by an economy's choice, or always in one way."""

    link: _Link
    choice: Economy | Way
    index: int = 0

    def send(self, contents: Callable[[int], Contents], passes: int) -> float:
        """How long some more passes took."""
        began = self.link.now
        for _ in range(passes):
            if isinstance(self.choice, Economy):
                self.choice.begin_pass()
            for _ in range(_PASS):
                self._batch(contents(self.index))
                self.index += 1
            self.link.wait()
            if isinstance(self.choice, Economy):
                self.choice.decoded(_PASS * _BATCH, self.link.decoding * _PASS * _BATCH)
        return self.link.now - began

    def _batch(self, made: Contents) -> None:
        if isinstance(self.choice, Way):
            _send(self.link, self.choice, made)
            return
        _sample(self.link, made, self.choice)
        _send(self.link, self.choice.choose(known=True), made, self.choice)


def _always(contents: Contents) -> Callable[[int], Contents]:
    return lambda _: contents


@pytest.mark.parametrize("buffer", [100 * KIB, 4 * MIB], ids=["small-buffers", "large-buffers"])
@pytest.mark.parametrize("decoding", [0.2e-9, 3e-9], ids=["fast-destination", "slow-destination"])
@pytest.mark.parametrize(
    "seconds", [0.4e-9, _GBIT / 10, _GBIT / 2, _GBIT, 10 * _GBIT], ids=lambda seconds: f"{1e9 * seconds:.1f}ns"
)
@pytest.mark.parametrize("name", ["_TEXT", "_PROGRAM", "_RANDOM", "_COUNTERS"])
def test_choice_ends_up_close_to_the_best_of_all_ways(name: str, seconds: float, decoding: float, buffer: int) -> None:
    contents = _always(globals()[name])
    chosen = _Run(_Link(seconds, decoding, buffer), Economy(_ALL))
    chosen.send(contents, 3)
    best = min(_Run(_Link(seconds, decoding, buffer), way).send(contents, 4) for way in Way)
    assert chosen.send(contents, 4) <= 1.09 * best  # one measurement of the link may fall into it


def test_link_that_needs_no_help_costs_next_to_nothing_from_the_start() -> None:
    contents = _always(_RANDOM)
    plain = _Run(_Link(0.4e-9), Way.PLAIN).send(contents, 2)
    assert _Run(_Link(0.4e-9), Economy(_ALL)).send(contents, 2) <= 1.02 * plain


def test_contents_that_change_change_the_way() -> None:
    def contents(index: int) -> Contents:
        return _TEXT if index // 200 % 2 else _RANDOM

    chosen = _Run(_Link(_GBIT), Economy(_ALL)).send(contents, 10)
    bounds = [_Run(_Link(_GBIT), way).send(contents, 10) for way in Way]
    assert chosen <= 1.06 * min(bounds)


def test_link_that_gets_slower_is_noticed_while_batches_are_encoded() -> None:
    run = _Run(_Link(1.2e-9), Economy((Way.FAST,)))
    run.send(_always(_PROGRAM), 1)
    assert isinstance(run.choice, Economy)
    assert run.choice.choose() is Way.PLAIN
    run.link.seconds = 4 * _GBIT
    run.send(_always(_PROGRAM), 4)
    assert run.choice.choose() is Way.FAST


def test_link_that_gets_faster_is_noticed_while_batches_are_encoded() -> None:
    run = _Run(_Link(2 * _GBIT), Economy((Way.FAST,)))
    run.send(_always(_PROGRAM), 1)
    assert isinstance(run.choice, Economy)
    assert run.choice.choose() is Way.FAST
    run.link.seconds = 0.4e-9
    run.send(_always(_PROGRAM), 6)
    assert run.choice.choose() is Way.PLAIN
    assert run.choice.link == pytest.approx(0.4e-9, rel=0.1)


def test_slow_destination_is_noticed_before_it_has_said_so() -> None:
    """Once what it has not decoded yet fills the buffers."""
    economy = Economy((Way.FAST,))
    link = _Link(_GBIT, decoding=2 * _GBIT)
    for _ in range(_PASS):
        _sample(link, _PROGRAM, economy)
        _send(link, economy.choose(), _PROGRAM, economy)
    assert economy.choose() is Way.PLAIN
    assert economy.decoding > _GBIT


def _knowing(ways: tuple[Way, ...], link: float, *, limit: int = 0) -> Economy:
    economy = Economy(ways, link=link, limit=limit, decoding=0.0)
    for way, (work, ratio) in _COUNTERS.items():
        economy.sampled(way, MIB, int(ratio * MIB), work * MIB)
    return economy


def test_nothing_is_chosen_but_what_is_allowed() -> None:
    assert _knowing((), 1.0).choose(known=True) is Way.PLAIN
    assert _knowing((Way.FAST,), 1.0).choose(known=True) is Way.FAST
    assert _knowing((Way.DELTA,), 1.0).choose(known=True) is Way.DELTA


def test_difference_is_chosen_only_where_there_is_a_copy() -> None:
    economy = _knowing(_ALL, _GBIT)
    assert economy.choose() is Way.FAST
    assert economy.choose(known=True) is Way.DELTA


def test_slower_link_is_left_for_more_work() -> None:
    assert _knowing((Way.FAST, Way.THOROUGH), 1e-9).choose() is Way.PLAIN
    assert _knowing((Way.FAST, Way.THOROUGH), 10e-9).choose() is Way.FAST
    assert _knowing((Way.FAST, Way.THOROUGH), 100e-9).choose() is Way.THOROUGH


def test_limit_counts_as_a_slow_link_before_anything_was_measured() -> None:
    economy = _knowing((Way.FAST, Way.THOROUGH), 0.0, limit=125_000_000)
    assert economy.choose() is Way.FAST
    economy.limit = 12_500_000
    assert economy.choose() is Way.THOROUGH
    economy.limit = 0
    assert economy.choose() is Way.PLAIN


def test_link_under_a_limit_is_not_measured_before_that_costs_little() -> None:
    economy = _knowing((Way.FAST,), 0.0, limit=64 * MIB)
    for _ in range(60):
        assert economy.choose() is Way.FAST
        economy.sent_encoded(Way.FAST, _BATCH, _BATCH // 10, 1e-9 * _BATCH, 0.001)


def test_nothing_is_tried_before_the_link_is_known() -> None:
    economy = Economy(_ALL)
    assert (economy.choose(known=True), economy.to_sample(known=True)) == (Way.PLAIN, None)
    for seconds in (0.0, 0.0, 0.0, 5.0, 0.01):  # of what tells, one was held up
        economy.sent_plain(_BATCH, seconds)
    assert economy.link == pytest.approx(0.01 / _BATCH)
    assert economy.to_sample() is Way.FAST


def test_what_buffers_swallow_says_nothing_about_the_link() -> None:
    economy = Economy(_ALL)
    for _ in range(10):
        economy.begin_pass()
        for _ in range(3):
            economy.sent_plain(_BATCH, 1e-6)
    assert economy.link == 0.0


def test_small_batches_say_nothing() -> None:
    economy = Economy(_ALL)
    for _ in range(100):
        economy.sent_plain(TELLING - 1, 1.0)
        economy.sent_encoded(Way.FAST, TELLING - 1, 1, 1.0, 1.0)
    assert economy.link == 0.0
    assert math.isinf(economy.cost(Way.FAST))


def test_samples_take_a_small_share_of_the_time() -> None:
    economy = Economy((Way.FAST,), link=1e-9)
    samples = 0
    for _ in range(1000):
        if economy.to_sample() is not None:
            samples += 1
            economy.sampled(Way.FAST, MIB, MIB, 0.01)
        economy.sent_plain(_BATCH, 0.01)
    assert 10 <= samples <= 1000 / 64 + 1


def test_thorough_way_is_not_even_sampled_where_its_work_alone_takes_too_long() -> None:
    economy = Economy((Way.FAST, Way.THOROUGH), link=1e-9)
    assert economy.to_sample() is Way.FAST
    economy.sampled(Way.FAST, MIB, MIB // 2, 1e-9 * MIB)
    assert economy.to_sample() is None
    economy.link = 100e-9
    assert economy.to_sample() is Way.THOROUGH


def test_destination_that_was_held_up_in_one_pass_is_not_slow() -> None:
    economy = _knowing((Way.FAST,), _GBIT)
    for seconds in (1e-9, 1e-6, 2e-9, 1e-6):
        economy.decoded(MIB, seconds * MIB)
    assert economy.decoding == pytest.approx(2e-9)
    economy.decoded(MIB, 1e-6 * MIB)
    assert economy.choose() is Way.PLAIN
    for _ in range(2):
        economy.decoded(TELLING - 1, 0.0)  # says nothing
    assert economy.choose() is Way.PLAIN


def test_two_hiccups_apart_are_not_blamed_on_the_destination() -> None:
    economy = _knowing((Way.FAST,), _GBIT)
    for index in range(4 * economy_module._EPOCH):
        hiccup = 1.0 if index in (3, 3 + 2 * economy_module._EPOCH) else 0.0
        economy.sent_encoded(Way.FAST, _BATCH, _BATCH // 2, 4e-9 * _BATCH, hiccup)
    assert economy.decoding == 0.0

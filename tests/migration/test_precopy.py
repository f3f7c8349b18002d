import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from support.fake_machine import FakeMachine
from support.streams import fake_machine

from dirtylog.errors import CancelledError, ProtocolError
from dirtylog.linux.mapping import Contents, memory_of
from dirtylog.memory import TrackingReason
from dirtylog.migration import lanes as lanes_module
from dirtylog.migration import precopy as precopy_module
from dirtylog.migration.channel import Channel
from dirtylog.migration.lanes import Lanes, senders
from dirtylog.migration.messages import Message, Pages, PassDone, PassEnd, ZeroPages, encode
from dirtylog.migration.parameters import Parameters
from dirtylog.migration.precopy import Precopy
from dirtylog.migration.statistics import Statistics
from dirtylog.units import MIB, PAGE_SIZE


class _Destination(Channel):
    """Writes down what it is sent, and answers each pass."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.starved_ns = 0
        self.number: int | None = None

    def send(self, message: Message, payload: Iterable[Contents] = ()) -> int:
        self.heard.append(message)
        return len(encode(message)) + sum(len(memory_of(part)) for part in payload)

    def receive(self) -> Message:
        last = self.heard[-1]
        assert isinstance(last, PassEnd), "asked for an answer before the pass was over"
        return PassDone(last.number if self.number is None else self.number, self.starved_ns, 0, 0)


@dataclass
class _Sending:
    """A precopy, and all that it works with."""

    machine: FakeMachine
    destination: _Destination = field(default_factory=_Destination)
    statistics: Statistics = field(default_factory=Statistics)
    parameters: Parameters = field(default_factory=Parameters)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        blocks = tuple(self.machine.memory.blocks.values())
        (sender,) = senders([self.destination], blocks, self.parameters)
        self.economy = sender.economy
        self.precopy = Precopy(
            self.machine.memory, Lanes([sender]), self.statistics, lambda: self.parameters, self.cancelled
        )


class _Clock:
    """A clock that gains a second whenever it is looked at."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 1.0
        return self._now


@pytest.fixture
def sending() -> Iterator[_Sending]:
    with fake_machine() as machine:
        sending = _Sending(machine)
        yield sending
        sending.precopy.stop()


def _write(sending: _Sending, pages: int) -> None:
    sending.machine.system.write(0, b"\1" * (pages * PAGE_SIZE))


def _heard(sending: _Sending) -> list[tuple[str, int]]:
    """Kind and block of what was sent since the last look."""
    heard = [
        (type(message).__name__, message.block if isinstance(message, Pages | ZeroPages) else -1)
        for message in sending.destination.heard
    ]
    sending.destination.heard.clear()
    return heard


def test_writes_are_logged_from_start_to_stop(sending: _Sending) -> None:
    sending.precopy.stop()
    sending.precopy.start()
    assert sending.machine.memory.tracking == TrackingReason.MIGRATION
    sending.precopy.stop()
    sending.precopy.stop()
    sending.machine.memory.set_running(True)  # while a guest stands still, the end of logging is put off
    assert not sending.machine.memory.tracking


def test_first_pass_sends_every_page_of_every_block(sending: _Sending) -> None:  # M3
    sending.precopy.start()
    assert sending.statistics.remaining_pages == 85
    sending.precopy.send_pass(paced=True)
    assert set(_heard(sending)) == {("Pages", 0), ("ZeroPages", 0), ("Pages", 1), ("ZeroPages", 1), ("PassEnd", -1)}
    (one,) = sending.statistics.passes
    assert (one.pages + one.zero_pages, sending.statistics.remaining_pages) == (85, 0)


def test_later_pass_sends_what_was_written_meanwhile(sending: _Sending) -> None:
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    _heard(sending)
    sending.machine.system.write((1 << 32) + PAGE_SIZE, b"x")
    estimate = sending.precopy.estimate()
    assert (estimate.pages, sending.statistics.passes[-1].dirtied) == (1, 1)
    sending.precopy.send_pass(paced=True)
    assert _heard(sending) == [("Pages", 1), ("PassEnd", -1)]
    assert sending.precopy.estimate().pages == 0


def test_bytes_are_those_on_the_wire(sending: _Sending) -> None:
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    frames = sum(len(encode(message)) for message in sending.destination.heard)
    assert sending.statistics.bytes == frames + sending.statistics.pages * PAGE_SIZE


def test_destination_that_answers_another_pass_breaks_the_protocol(sending: _Sending) -> None:  # M5
    sending.destination.number = 2
    sending.precopy.start()
    with pytest.raises(ProtocolError, match="the destination has pass 2 when pass 1 was sent"):
        sending.precopy.send_pass(paced=True)


def test_cancelled_pass_ends_after_the_batch_at_hand(sending: _Sending) -> None:
    sending.precopy.start()
    sending.cancelled.set()
    with pytest.raises(CancelledError):
        sending.precopy.send_pass(paced=False)
    assert len(_heard(sending)) == 1


def test_small_pass_says_nothing_against_the_link(sending: _Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip dominates it."""
    monkeypatch.setattr(precopy_module, "_TELLING_SIZE", 100)
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    known = sending.statistics.passes[-1].bandwidth
    assert known > 0
    monkeypatch.setattr(precopy_module, "_TELLING_SIZE", 1 << 40)
    monkeypatch.setattr(precopy_module, "time", _Clock())
    _write(sending, 1)
    sending.precopy.estimate()
    sending.precopy.send_pass(paced=True)
    assert sending.statistics.passes[-1].bandwidth == known


@pytest.mark.parametrize(("max_bandwidth", "share"), [(0, 2), (1 << 40, 1)])
def test_only_an_unlimited_link_is_credited_with_time_without_cpu(
    sending: _Sending, monkeypatch: pytest.MonkeyPatch, max_bandwidth: int, share: int
) -> None:
    """Who keeps to a limit would have waited anyway."""
    monkeypatch.setattr(precopy_module, "_TELLING_SIZE", 100)
    monkeypatch.setattr(lanes_module, "thread_starved_ns", lambda: 0)
    monkeypatch.setattr(precopy_module, "time", _Clock())
    sending.parameters = Parameters(max_bandwidth=max_bandwidth)
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    _write(sending, 10)
    sending.precopy.estimate()
    sending.destination.starved_ns = 1_000_000_000
    sending.precopy.send_pass(paced=True)
    one = sending.statistics.passes[1]
    assert (one.pages, one.seconds, one.starved) == (10, 2.0, 1.0)
    assert one.bandwidth == share * one.pages * PAGE_SIZE / one.seconds


def test_estimate_grows_with_what_is_left(sending: _Sending) -> None:
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    assert sending.precopy.estimate().downtime == 0.01
    _write(sending, 40)
    estimate = sending.precopy.estimate()
    assert estimate.pages == 40
    assert estimate.downtime == pytest.approx(0.01 + 40 * PAGE_SIZE / estimate.bandwidth)
    last = sending.statistics.passes[-1]
    assert last.expected_downtime == estimate.downtime
    assert sending.statistics.dirty_rate == last.dirtied / last.seconds


def test_estimate_goes_by_the_bandwidth_that_the_switchover_will_have(sending: _Sending) -> None:
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    _write(sending, 40)
    sending.parameters = Parameters(switchover_bandwidth=40 * PAGE_SIZE)
    assert sending.precopy.estimate().downtime == pytest.approx(0.01 + 1.0)
    sending.parameters = Parameters()
    assert sending.precopy.estimate().downtime < 1.0


def test_limit_reaches_the_choice_of_ways_while_a_pass_lasts(sending: _Sending) -> None:
    economy = sending.economy
    sending.parameters = Parameters(max_bandwidth=1 << 40)
    sending.precopy.start()
    sending.precopy.send_pass(paced=True)
    assert economy.limit == 1 << 40
    sending.precopy.send_pass(paced=False)
    assert economy.limit == 1 << 40  # nothing is known of the link but that it carries so much
    economy.link = 1e-9
    sending.precopy.send_pass(paced=False)
    assert economy.limit == 0


def test_pass_of_a_mebibyte_is_telling() -> None:
    assert precopy_module._TELLING_SIZE == MIB

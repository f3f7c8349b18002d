import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from random import Random

import numpy as np
import pytest
from support.economies import WAYS, Fickle, Fixed
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DisconnectedError, ProtocolError, RefusedError
from dirtylog.linux.mapping import Contents
from dirtylog.memory import RAMBlock
from dirtylog.migration import Parameters
from dirtylog.migration import lanes as lanes_module
from dirtylog.migration.batch import Batch, page_parts, runs_of
from dirtylog.migration.channel import Channel
from dirtylog.migration.economy import Way
from dirtylog.migration.encoding import SentCopies
from dirtylog.migration.filler import Filler
from dirtylog.migration.lanes import Lanes, senders
from dirtylog.migration.messages import Failed, Join, Joined, Message, Pages, PassDone, PassEnd
from dirtylog.migration.parameters import Compression
from dirtylog.migration.protocol import Role
from dirtylog.migration.ram import IncomingRAM
from dirtylog.migration.sender import Sender
from dirtylog.units import MIB, PAGE_SIZE

_PAGES = 64


def _pair(stack: ExitStack) -> tuple[Channel, Channel]:
    """Both ends of a further channel that was taken in."""
    one, other = socket.socketpair()
    source, destination = Channel(one, Role.SOURCE), Channel(other, Role.DESTINATION)
    stack.callback(source.close)
    stack.callback(destination.close)
    source.send(Join(bytes(16)))
    destination.expect(Join)
    destination.send(Joined())
    source.expect(Joined)
    return source, destination


class _Line:
    """A block here, a block there, and some channels in between. Nobody listens until told to."""

    def __init__(self, stack: ExitStack, channels: int, seed: int = 0, pages: int = _PAGES) -> None:
        self.block, self.copy = RAMBlock("ram", pages * PAGE_SIZE), RAMBlock("copy", pages * PAGE_SIZE)
        stack.callback(self.block.close)
        stack.callback(self.copy.close)
        pairs = [_pair(stack) for _ in range(channels)]
        self.near, self.far = [near for near, _ in pairs], [far for _, far in pairs]
        copies = SentCopies([pages], pages * PAGE_SIZE // 2)
        self.senders = [
            Sender(near, [self.block], Fickle(WAYS, seed + index), copies) for index, near in enumerate(self.near)
        ]
        self.lanes = Lanes(self.senders)
        stack.callback(self.close)
        self.tasks: list[Task] = []

    def close(self) -> None:
        for channel in (*self.near, *self.far):
            channel.abort()
        self.lanes.close()
        for task in self.tasks:
            assert isinstance(task.error(), CancelledError | DisconnectedError)

    def listen(self, *channels: int) -> None:
        """Have what comes on some of the channels put into the copy, by a thread for each."""
        ram = IncomingRAM([self.copy])
        for index in channels or range(len(self.far)):
            self.tasks.append(Task(lambda channel=self.far[index]: self._fill(channel, ram)))  # type: ignore[misc]

    @staticmethod
    def _fill(channel: Channel, ram: IncomingRAM) -> None:
        filler = Filler(channel, ram)
        while True:
            filler.take(channel.receive())

    def answer(self, channel: int, done: PassDone) -> None:
        """Have somebody answer a pass on one of the channels."""

        def answer() -> None:
            self.far[channel].expect(PassEnd)
            self.far[channel].send(done)
            self.far[channel].receive()

        self.tasks.append(Task(answer))

    def batch(self, pages: list[int]) -> Batch:
        runs = runs_of(np.array(pages, np.int64))
        return Batch(Pages(0, runs), page_parts(self.block, runs), None)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("channel")] == []


def _delay(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every message waits at random before it is sent, and before it is taken in."""
    chance, never = Random(seed), threading.Event()  # noqa: S311 - repeatable, not secret
    send, receive = Channel.send, Channel.receive

    def delayed_send(channel: Channel, message: Message, payload: Iterable[Contents] = ()) -> int:
        never.wait(chance.choice((0, 0, 0.001, 0.003)))
        return send(channel, message, payload)

    def delayed_receive(channel: Channel) -> Message:
        message = receive(channel)
        never.wait(chance.choice((0, 0, 0.001, 0.003)))
        return message

    monkeypatch.setattr(Channel, "send", delayed_send)
    monkeypatch.setattr(Channel, "receive", delayed_receive)


@pytest.mark.parametrize("seed", range(25))
def test_older_copy_never_lands_after_a_newer_one_however_channels_are_delayed(  # M7
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    line = _Line(stack, 3, seed)
    line.listen()
    _delay(monkeypatch, seed)
    chance = Random(seed)  # noqa: S311 - repeatable, not secret
    for number in range(1, 6):
        pages = sorted(chance.sample(range(_PAGES), chance.randint(1, _PAGES)))
        line.block.page_words[pages] = number
        line.lanes.begin_pass()
        while pages:
            size = chance.randint(1, 8)
            line.lanes.send(line.batch(pages[:size]))
            pages = pages[size:]
        line.lanes.end_pass(number)
        assert np.array_equal(line.block.array, line.copy.array)


def test_pass_does_not_end_while_one_channel_has_not_arrived(stack: ExitStack) -> None:  # M7
    line = _Line(stack, 3)
    line.listen(0, 2)
    line.block.array[:] = 5
    for page in range(12):
        line.lanes.send(line.batch([page]))
    task = Task(lambda: line.lanes.end_pass(1))
    line.far[1].receive()
    assert task.running
    line.far[1].close()
    assert isinstance(task.error(), DisconnectedError)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_everything_that_was_sent_is_counted(stack: ExitStack, channels: int) -> None:
    line = _Line(stack, channels)
    line.listen()
    line.block.array[:] = 5
    line.lanes.begin_pass()
    parts = [line.lanes.send(line.batch([page])) for page in range(40)]
    last, starved = line.lanes.end_pass(1)
    for part in parts:
        last.merge(part)
    assert sum(pages for pages, _ in last.ways.values()) == 40
    assert last.bytes > sum(size for _, size in last.ways.values()) > 0
    assert starved >= 0


def test_time_without_cpu_is_that_of_the_worst_thread(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _Line(stack, 2)
    starved = {thread.native_id: 10**9 for thread in line.lanes._threads}
    monkeypatch.setattr(lanes_module, "thread_starved_ns", lambda thread: starved[thread])
    line.lanes.begin_pass()
    starved[line.lanes._threads[1].native_id] += 3 * 10**9
    for index, here in enumerate((10**9, 2 * 10**9)):
        line.answer(index, PassDone(1, here, 0, 0))
    assert line.lanes.end_pass(1)[1] == 3.0


def test_channel_says_how_long_its_destination_decodes(stack: ExitStack) -> None:
    line = _Line(stack, 2)
    for index, decoded in enumerate((0, MIB)):
        line.answer(index, PassDone(1, 0, decoded, 10**9))
    before = line.senders[0].economy.decoding
    line.lanes.end_pass(1)
    assert [sender.economy.decoding for sender in line.senders] == [before, 1 / MIB]


def test_destination_that_answers_another_pass_breaks_the_protocol(stack: ExitStack) -> None:  # M5
    line = _Line(stack, 2)
    line.listen(0)
    line.answer(1, PassDone(2, 0, 0, 0))
    with pytest.raises(ProtocolError, match="the destination has pass 2 when pass 1 was sent"):
        line.lanes.end_pass(1)


def _send_for_ever(line: _Line) -> None:
    while True:
        line.lanes.send(line.batch([*range(_PAGES)]))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_error_of_one_channel_is_raised_to_the_owner(stack: ExitStack, channels: int) -> None:
    line = _Line(stack, channels)
    line.listen(*range(channels - 1))
    line.far[-1].close()
    with pytest.raises(DisconnectedError, match="the connection to the destination ended"):
        _send_for_ever(line)
    with pytest.raises(DisconnectedError):
        line.lanes.end_pass(1)


@pytest.mark.parametrize("channels", [2, 4])
def test_first_error_is_the_one_that_is_raised(stack: ExitStack, channels: int) -> None:
    line = _Line(stack, channels)
    line.listen(*range(channels - 1))
    line.far[-1].close()
    with pytest.raises(DisconnectedError):
        _send_for_ever(line)
    for channel in line.near:
        channel.abort()  # those that are sending still fail, too
    with pytest.raises(DisconnectedError):
        line.lanes.send(line.batch([1]))


@pytest.mark.parametrize("where", ["send", "end_pass"])
def test_abort_wakes_an_owner_that_waits_for_channels_nobody_reads(stack: ExitStack, where: str) -> None:
    line = _Line(stack, 2, pages=4096)
    line.block.page_words[:] = np.random.default_rng(1).integers(0, 1 << 64, (4096, 512), np.uint64)
    for sender in line.senders:
        sender.economy = Fixed(Way.PLAIN)

    def go() -> None:
        if where == "send":
            while True:
                line.lanes.send(line.batch([*range(4096)]))
        line.lanes.send(line.batch([*range(4096)]))
        line.lanes.send(line.batch([*range(4096)]))
        line.lanes.end_pass(1)

    task = Task(go)
    wait_until(lambda: line.lanes._queue.unfinished_tasks == (4 if where == "send" else 2), "the channels were full")
    for channel in line.near:
        channel.abort()
    assert isinstance(task.error(), CancelledError)


def test_close_leaves_no_thread_and_may_be_repeated(stack: ExitStack) -> None:
    line = _Line(stack, 3)
    threads = list(line.lanes._threads)
    assert len(threads) == 3
    line.lanes.close()
    line.lanes.close()
    assert not any(thread.is_alive() for thread in threads)


def test_one_channel_needs_no_thread(stack: ExitStack) -> None:
    assert _Line(stack, 1).lanes._threads == []


def test_reason_of_a_destination_that_gives_up_is_raised(stack: ExitStack) -> None:
    line = _Line(stack, 2)
    line.listen(1)
    line.far[0].send(Failed("no room"))
    with pytest.raises(RefusedError, match="the destination gave up: no room"):
        line.lanes.end_pass(1)


def test_limit_is_shared_by_the_channels(stack: ExitStack) -> None:
    line = _Line(stack, 3)
    for rate, share in ((0, 0), (1, 1), (3_000_000, 1_000_000)):
        line.lanes.limit(rate)
        assert {sender.economy.limit for sender in line.senders} == {share}


def test_limit_is_lifted_where_the_link_is_known(stack: ExitStack) -> None:
    line = _Line(stack, 2)
    line.lanes.limit(1000)
    line.senders[1].economy.link = 1e-9
    line.lanes.lift_limit()
    assert [sender.economy.limit for sender in line.senders] == [500, 0]


@pytest.mark.parametrize(
    ("parameters", "ways"),
    [
        (Parameters(), ()),
        (Parameters(compression=Compression.AUTO), (Way.FAST, Way.THOROUGH)),
        (Parameters(delta_cache=MIB), (Way.DELTA,)),
        (Parameters(compression=Compression.AUTO, delta_cache=MIB), (Way.FAST, Way.THOROUGH, Way.DELTA)),
    ],
)
def test_ways_are_those_that_parameters_allow(stack: ExitStack, parameters: Parameters, ways: tuple[Way, ...]) -> None:
    near = [_pair(stack)[0] for _ in range(2)]
    block = RAMBlock("ram", 4 * PAGE_SIZE)
    stack.callback(block.close)
    made = senders(near, [block], parameters)
    assert [sender.economy.ways for sender in made] == [ways, ways]
    assert made[0].economy is not made[1].economy
    assert made[0]._copies is made[1]._copies
    assert (made[0]._copies is None) == (parameters.delta_cache == 0)
    assert senders(near, [block], parameters)[0]._copies is not made[0]._copies or made[0]._copies is None

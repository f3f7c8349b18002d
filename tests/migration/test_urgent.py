import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme
from support.connected import Ends, connected
from support.tls import encrypted_channels, issue
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import DirtylogError, DisconnectedError, ProtocolError
from dirtylog.memory import Memory
from dirtylog.migration.attention import BusyPolling
from dirtylog.migration.messages import Failed, Join, Joined, Page, PassDone, PassEnd, Request, ZeroPage
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.pacer import Pacer
from dirtylog.migration.protocol import Stage
from dirtylog.migration.ram import DirtyRAM
from dirtylog.migration.sender import Sent
from dirtylog.migration.statistics import Statistics
from dirtylog.migration.urgent import Tally, UrgentAnswers
from dirtylog.units import MIB, PAGE_SIZE

_DATA = 3
"""The one page that holds data."""


class Answering:
    """Answers about a block all of which is owed, given while the main channel is waited for; and the other ends."""

    def __init__(self, stack: ExitStack) -> None:
        memory = Memory()
        stack.callback(memory.close)
        region = memory.ram("ram", MIB)
        assert region.block is not None
        region.block.array[_DATA * PAGE_SIZE : (_DATA + 1) * PAGE_SIZE] = 0xDA
        self.statistics = Statistics(remaining_pages=region.block.pages)
        self.owed = OwedPages([DirtyRAM(0, region, region.block, MIB).owed()])
        self.tally = Tally(self.statistics)
        self.main: Ends = stack.enter_context(connected(Stage.SERVING))
        self.urgent: Ends = stack.enter_context(connected(Stage.SIDE))
        self.answers = UrgentAnswers(self.urgent.source, self.owed, self.tally, self.main.source)
        self.waiting = Task(self.main.source.receive)
        stack.callback(self.waiting.error)
        stack.callback(self.main.source.abort)

    def ask(self, page: int) -> None:
        self.urgent.destination.send(Request(0, page))

    def failure(self) -> DirtylogError:
        """What ended it; the main channel is cut by then."""
        assert isinstance(self.waiting.error(), DisconnectedError)
        with pytest.raises(DirtylogError) as caught:
            self.answers.check()
        return caught.value


@pytest.fixture
def answering() -> Iterator[Answering]:
    with ExitStack() as stack:
        yield Answering(stack)


def test_page_with_contents_is_sent(answering: Answering) -> None:
    answering.ask(_DATA)
    assert answering.urgent.destination.expect(Page) == Page(0, _DATA)
    contents = bytearray(PAGE_SIZE)
    answering.urgent.destination.receive_into([memoryview(contents)])
    assert contents == b"\xda" * PAGE_SIZE


def test_page_that_is_a_hole_is_said_to_be_zero(answering: Answering) -> None:
    answering.ask(5)
    assert answering.urgent.destination.expect(ZeroPage) == ZeroPage(0, 5)


def test_source_looks_for_the_next_request_before_it_sleeps(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    extended = threading.Event()
    monkeypatch.setattr(BusyPolling, "extend", lambda _: extended.set())
    answering.ask(_DATA)
    assert extended.wait(BOUND)


def test_page_that_is_on_its_way_is_sent_again(answering: Answering) -> None:
    while answering.owed.take() is not None:
        pass
    answering.ask(_DATA)
    assert answering.urgent.destination.expect(Page) == Page(0, _DATA)
    wait_until(lambda: answering.statistics.postcopy_requests, "it was counted")
    assert answering.statistics.passes[-1].pages == 0


def test_what_is_sent_is_counted(answering: Answering) -> None:
    for page in (5, 5, _DATA):
        answering.ask(page)
    statistics = answering.statistics
    wait_until(lambda: statistics.postcopy_requests == 3, "all were counted")
    assert statistics.remaining_pages == MIB // PAGE_SIZE - 2
    assert (statistics.passes[-1].pages, statistics.passes[-1].zero_pages) == (1, 1)
    assert statistics.postcopy_bytes == statistics.passes[-1].bytes > PAGE_SIZE
    assert answering.tally.number == statistics.passes[-1].number == 1


def test_what_is_sent_unasked_is_no_request(answering: Answering) -> None:
    batch = answering.owed.take()
    assert batch is not None
    answering.tally.count(batch, Sent(bytes=10))
    answering.tally.took(1.5)
    assert (answering.statistics.postcopy_requests, answering.statistics.postcopy_bytes) == (0, 10)
    assert answering.statistics.passes[-1].seconds == 1.5


def test_page_that_is_not_there_ends_it_and_the_main_channel(answering: Answering) -> None:  # M5
    answering.ask(MIB // PAGE_SIZE)
    error = answering.failure()
    assert isinstance(error, ProtocolError)
    assert "asks for page 256 of block 0" in error.cause


def test_lost_connection_ends_the_main_channel(answering: Answering) -> None:
    answering.urgent.destination.abort()
    assert isinstance(answering.failure(), DisconnectedError)


def test_other_message_than_a_request_ends_it(answering: Answering) -> None:  # M5
    answering.urgent.destination.send(Failed("enough"))
    error = answering.failure()
    assert isinstance(error, ProtocolError)
    assert "the destination sent Failed where only requests are expected" in error.cause


def test_what_the_destination_said_before_is_heard_though_the_urgent_channel_is_lost(answering: Answering) -> None:
    answering.main.destination.send(Failed("no more memory"))
    answering.urgent.destination.abort()
    answering.waiting.join()


def test_end_that_overtakes_the_last_answer_leaves_the_main_channel(answering: Answering) -> None:  # M8
    main = answering.main
    main.source.send(PassEnd(1))
    assert main.destination.expect(PassEnd) == PassEnd(1)
    answering.urgent.destination.close()
    wait_until(lambda: answering.answers._error, "the end was noticed")
    main.destination.send(PassDone(1, 0, 0, 0))
    answering.waiting.join()


def test_loss_while_nothing_more_may_be_sent_ends_the_wait(answering: Answering) -> None:  # M8
    answering.main.source.abort()
    answering.waiting.error()
    pacer = Pacer(answering.answers.wait, lambda: 1)
    pacing = Task(lambda: pacer.pace(MIB))
    answering.ask(_DATA)
    assert answering.urgent.destination.expect(Page) == Page(0, _DATA)
    answering.urgent.destination.abort()
    assert isinstance(pacing.error(), DisconnectedError)


def test_request_that_came_with_the_urgent_channel_is_answered(  # what is encrypted is received as it comes
    answering: Answering, tmp_path: Path
) -> None:
    with encrypted_channels(issue(tmp_path / "tls", trustme.CA())) as (source, destination):
        source.send(Join(bytes(16)))
        assert destination.expect(Join) == Join(bytes(16))
        said = [memoryview(destination._protocol.send(message)) for message in (Joined(), Request(0, _DATA))]
        destination._stream.send(said)  # one record
        assert source.expect(Joined) == Joined()
        main = answering.main.source
        main.abort()
        answering.waiting.error()
        UrgentAnswers(source, answering.owed, answering.tally, main)
        assert destination.expect(Page) == Page(0, _DATA)

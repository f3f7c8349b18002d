import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from support.connected import Ends, connected
from support.require import require
from support.touching import Touch
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import DirtylogError, DisconnectedError, HostError, ProtocolError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.memory import Memory
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.fault_service import FaultService
from dirtylog.migration.messages import Message, Owed, Page, Pages, PassEnd, Request, ZeroPage, ZeroPages
from dirtylog.migration.protocol import Stage
from dirtylog.units import PAGE_SIZE

_PAGES = 4000


class Served:
    """A block all of which is owed, and the source's end of the urgent channel."""

    def __init__(self, stack: ExitStack) -> None:
        memory = Memory()
        stack.callback(memory.close)
        root = memory.container("root")
        root.add(memory.ram("ram", _PAGES * PAGE_SIZE), 0)
        self.system = memory.address_space("system", root)
        (self.block,) = memory.blocks.values()
        try:
            faults = MissingFaults()
        except HostError as error:
            require("userfaultfd", False, str(error))
            raise
        self.ram = AbsentRAM([self.block], faults, Blocktime(()))
        stack.callback(self.ram.close)
        self.ram.owe(Owed(0, np.array([[0, _PAGES]])))
        self.ram.begin()
        self.ends: Ends = stack.enter_context(connected(Stage.SIDE))
        self.failed = threading.Event()
        self.service = FaultService(self.ends.destination, self.ram, self.failed.set)
        stack.callback(self.service.close)

    def touch(self, page: int) -> Touch:
        assert isinstance(self.block.mapping, MemfdMapping)
        return Touch(self.block.mapping, page * PAGE_SIZE)

    def answer(self, page: int, value: int) -> None:
        self.say(Page(0, page), bytes([value]) * PAGE_SIZE)

    def say(self, message: Message, payload: bytes = b"") -> None:
        self.ends.source.send(message, [memoryview(payload)] if payload else [])

    def failure(self) -> DirtylogError:
        wait_until(self.failed.is_set, "the service failed")
        with pytest.raises(DirtylogError) as caught:
            self.service.join()
        return caught.value


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def test_page_that_is_touched_is_asked_for_and_put_in_place(served: Served) -> None:
    touch = served.touch(7)
    assert served.ends.source.expect(Request) == Request(0, 7)
    served.answer(7, 0x77)
    assert touch.result() == b"\x77"
    wait_until(lambda: served.ram.pages == _PAGES - 1, "it was counted")


def test_answers_may_come_in_any_order_and_say_that_a_page_is_zero(served: Served) -> None:
    touches = {page: served.touch(page) for page in (7, 8, 9)}
    asked = [served.ends.source.expect(Request).page for _ in touches]
    assert sorted(asked) == [7, 8, 9]
    served.answer(9, 9)
    served.say(ZeroPage(0, 8))
    served.answer(7, 7)
    assert {page: touch.result() for page, touch in touches.items()} == {7: b"\7", 8: b"\0", 9: b"\x09"}


def test_thread_that_holds_the_interpreters_lock_is_served(served: Served) -> None:
    reading = Task(lambda: served.system.read(PAGE_SIZE, 2 * PAGE_SIZE))
    assert [served.ends.source.expect(Request).page for _ in range(2)] == [1, 2]
    served.answer(2, 2)
    served.answer(1, 1)
    reading.join()
    assert served.system.read(2 * PAGE_SIZE - 1, 2) == b"\1\2"


def test_what_was_asked_for_before_it_began_is_asked_for(served: Served) -> None:
    served.service.close()
    touch = served.touch(7)
    with connected(Stage.SIDE) as ends:
        service = FaultService(ends.destination, served.ram, served.failed.set)
        assert ends.source.expect(Request) == Request(0, 7)
        ends.source.send(ZeroPage(0, 7))
        assert touch.result() == b"\0"
        service.close()


def test_thread_that_joins_it_serves_while_it_waits(served: Served) -> None:
    attention = served.service.join()
    serving = Task(lambda: attention.until(lambda: served.ram.pages < _PAGES, BOUND))
    touch = served.touch(7)
    assert served.ends.source.expect(Request) == Request(0, 7)
    served.answer(7, 0x77)
    assert touch.result() == b"\x77"
    serving.join()


def test_no_more_is_asked_for_than_fits_into_a_socket_until_there_are_answers(served: Served) -> None:
    source, asked = served.ends.source, served.ram._blocks[0].asked
    reading = [Task(partial(served.system.read, first * PAGE_SIZE, 64 * PAGE_SIZE)) for first in (0, 64, 128)]
    wait_until(lambda: len(asked) == 192, "all ask")
    requests = [source.expect(Request) for _ in range(128)]
    source.check_quiet()
    for index in range(192):
        served.answer(requests[index].page, index)
        if len(requests) < 192:
            requests.append(source.expect(Request))
    for each in reading:
        each.join()
    assert sorted(request.page for request in requests) == list(range(192))
    assert not asked


def test_lost_connection_is_told_of(served: Served) -> None:
    served.ends.source.abort()
    assert isinstance(served.failure(), DisconnectedError)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (PassEnd(1), "the source sent PassEnd where only pages are expected"),
        (Pages(0, np.array([[7, 1]])), "the source sent Pages where only pages are expected"),
        (Page(0, 7), "the source sent page 7 of block 0, which it was not asked for"),
        (Page(0, _PAGES), f"the source sent page {_PAGES} of block 0, which it was not asked for"),
        (Page(1, 0), "the source sent page 0 of block 1, which it was not asked for"),
        (ZeroPages(0, np.array([[7, 1]])), "the source sent ZeroPages where only pages are expected"),
        (ZeroPage(0, 7), "the source sent page 7 of block 0, which it was not asked for"),
        (ZeroPage(0, _PAGES), f"the source sent page {_PAGES} of block 0"),
        (ZeroPage(1, 0), "the source sent page 0 of block 1"),
    ],
)
def test_what_does_not_belong_there_ends_it(served: Served, message: Message, cause: str) -> None:  # M5
    served.say(message, bytes(PAGE_SIZE) if isinstance(message, Page | Pages) else b"")
    error = served.failure()
    assert isinstance(error, ProtocolError)
    assert cause in error.cause
    assert served.ram.pages == _PAGES


def test_second_answer_to_one_request_ends_it(served: Served) -> None:  # M5, M9
    touch = served.touch(7)
    served.ends.source.expect(Request)
    served.answer(7, 1)
    served.answer(7, 2)
    error = served.failure()
    assert isinstance(error, ProtocolError)
    assert "page 7 of block 0, which it was not asked for" in error.cause
    assert touch.result() == b"\1"
    assert served.ram.pages == _PAGES - 1


def test_close_is_no_failure_and_closes_again(served: Served) -> None:
    touch = served.touch(7)
    served.ends.source.expect(Request)
    served.service.close()
    served.service.close()
    assert not served.failed.is_set()
    assert touch.waits  # until another connection brings it
    with pytest.raises(DisconnectedError):
        served.ends.source.expect(Request)

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from support.connected import Ends, connected
from support.require import require
from support.touching import Touch
from support.waiting import Task, wait_until

from dirtylog.errors import DirtylogError, DisconnectedError, HostError, ProtocolError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.memory import Memory
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.fault_service import FaultService
from dirtylog.migration.messages import Message, Owed, Pages, PassEnd, Request, ZeroPages
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

    def send(self, page: int, value: int) -> None:
        self.say(Pages(0, np.array([[page, 1]])), bytes([value]) * PAGE_SIZE)

    def say(self, message: Message, payload: bytes = b"") -> None:
        self.ends.source.send(message, [memoryview(payload)] if payload else [])

    def failure(self) -> DirtylogError:
        wait_until(self.failed.is_set, "the service failed")
        with pytest.raises(DirtylogError) as caught:
            self.service.check()
        return caught.value


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def test_page_that_is_touched_is_asked_for_and_put_in_place(served: Served) -> None:
    touch = served.touch(7)
    assert served.ends.source.expect(Request) == Request(0, 7)
    served.send(7, 0x77)
    assert touch.result() == b"\x77"
    assert served.ram.pages == _PAGES - 1


def test_answers_may_come_in_any_order_and_say_that_a_page_is_zero(served: Served) -> None:
    touches = {page: served.touch(page) for page in (7, 8, 9)}
    asked = [served.ends.source.expect(Request).page for _ in touches]
    assert sorted(asked) == [7, 8, 9]
    served.send(9, 9)
    served.say(ZeroPages(0, np.array([[8, 1]])))
    served.send(7, 7)
    assert {page: touch.result() for page, touch in touches.items()} == {7: b"\7", 8: b"\0", 9: b"\x09"}


def test_page_that_comes_unasked_is_taken(served: Served) -> None:
    served.send(7, 0x77)
    wait_until(lambda: served.ram.pages == _PAGES - 1, "the page came")
    assert served.touch(7).result() == b"\x77"


def test_thread_that_holds_the_interpreters_lock_is_served(served: Served) -> None:
    reading = Task(lambda: served.system.read(PAGE_SIZE, 2 * PAGE_SIZE))
    assert [served.ends.source.expect(Request).page for _ in range(2)] == [1, 2]
    served.send(2, 2)
    served.send(1, 1)
    reading.join()
    assert served.system.read(2 * PAGE_SIZE - 1, 2) == b"\1\2"


def test_what_was_asked_for_before_it_began_is_asked_for(served: Served) -> None:
    served.service.close()
    touch = served.touch(7)
    with connected(Stage.SIDE) as ends:
        service = FaultService(ends.destination, served.ram, served.failed.set)
        assert ends.source.expect(Request) == Request(0, 7)
        ends.source.send(ZeroPages(0, np.array([[7, 1]])))
        assert touch.result() == b"\0"
        service.close()


def test_lost_connection_is_told_of(served: Served) -> None:
    served.ends.source.abort()
    assert isinstance(served.failure(), DisconnectedError)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (PassEnd(1), "the source sent PassEnd where only pages are expected"),
        (ZeroPages(1, np.array([[0, 1]])), "pages of block 1 of 1"),
        (ZeroPages(0, np.array([[_PAGES, 1]])), f"page {_PAGES} of block 'ram'"),
    ],
)
def test_what_does_not_belong_there_ends_it(served: Served, message: Message, cause: str) -> None:  # M5
    served.say(message)
    error = served.failure()
    assert isinstance(error, ProtocolError)
    assert cause in error.cause


def test_page_that_was_not_owed_ends_it(served: Served) -> None:  # M5
    served.send(7, 1)
    served.send(7, 2)
    error = served.failure()
    assert isinstance(error, ProtocolError)
    assert "does not owe" in error.cause
    assert served.touch(7).result() == b"\1"


def test_close_is_no_failure_and_closes_again(served: Served) -> None:
    touch = served.touch(7)
    served.ends.source.expect(Request)
    served.service.close()
    served.service.close()
    served.service.check()
    assert not served.failed.is_set()
    assert touch.waits  # until another connection brings it
    with pytest.raises(DisconnectedError):
        served.ends.source.expect(Request)

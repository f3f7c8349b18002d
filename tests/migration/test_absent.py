import contextlib
import ctypes
import mmap
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.connected import Ends, connected
from support.mappings import address_of
from support.require import require
from support.touching import Touch
from support.waiting import Task, wait_until

from dirtylog.errors import DisconnectedError, HostError, ProtocolError
from dirtylog.linux.mapping import BufferMapping, MemfdMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.memory import Memory, RAMBlock
from dirtylog.migration import absent as absent_module
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.blocktime import Blocktime
from dirtylog.migration.messages import MAX_BATCH_PAGES, Lacking, Owed, Pages, Request, Runs, ZeroPages
from dirtylog.migration.protocol import Stage
from dirtylog.units import PAGE_SIZE

_SIZES = (1200, 8)
_STALE = 0xEE
"""What all of memory holds before some of it is owed."""


def _runs(*runs: tuple[int, int]) -> Runs:
    return np.array(runs, np.int64).reshape(-1, 2)


class Destination:
    """Two blocks, and a source's connections."""

    def __init__(self, stack: ExitStack) -> None:
        self.memory = Memory()
        stack.callback(self.memory.close)
        root = self.memory.container("root")
        for index, pages in enumerate(_SIZES):
            root.add(self.memory.ram(f"ram{index}", pages * PAGE_SIZE), index << 32)
        self.system = self.memory.address_space("system", root)
        self.blocks = tuple(self.memory.blocks.values())
        for block in self.blocks:
            block.array[:] = _STALE
        try:
            faults = MissingFaults()
        except HostError as error:
            require("userfaultfd", False, str(error))
            raise
        self.blocktime = Blocktime(())
        self.ram = AbsentRAM(self.blocks, faults, self.blocktime)
        stack.callback(self.ram.close)
        self.ends: Ends = stack.enter_context(connected(Stage.SERVING))
        self._buffer = BufferMapping(memoryview(mmap.mmap(-1, MAX_BATCH_PAGES * PAGE_SIZE)))
        self._page = BufferMapping(memoryview(mmap.mmap(-1, PAGE_SIZE)))
        self.asked: set[Request] = set()
        self.served = 0
        self.when_served: Callable[[int], None] = lambda _: None

    def owe(self, block: int, *runs: tuple[int, int]) -> None:
        self.ram.owe(Owed(block, _runs(*runs)))

    def send(self, block: int, *runs: tuple[int, int]) -> None:
        """Have pages come, each holding its number."""
        message = Pages(block, _runs(*runs))
        contents = np.repeat(message.numbers.astype(np.uint8), PAGE_SIZE)
        self.ends.source.send(message, [contents.data])
        received = self.ends.destination.expect(Pages)
        try:
            self.ram.receive(self.ends.destination, received, self._buffer, self._serve)
        except ProtocolError:  # found out before anything is received
            self.ends.destination.receive_into([self._buffer.memory[: received.payload_size]])
            raise

    def answer(self, block: int, page: int) -> None:
        """Have a page come as it does that was asked for, holding its number."""
        self._page.array[:] = page & 0xFF
        self.ram.answered(block, page, self._page.address)

    def send_zeros(self, block: int, *runs: tuple[int, int]) -> None:
        self.ram.zero(ZeroPages(block, _runs(*runs)))

    def answer_zero(self, block: int, page: int) -> None:
        self.ram.answered(block, page, 0)

    def _serve(self) -> None:
        self.served += 1
        self.when_served(self.served)

    def requests(self) -> list[Request]:
        """What is asked for now."""
        found: list[Request] = []
        self.ram.serve(lambda block, page: found.append(Request(block, page)))
        return found

    def ask(self, block: int, page: int) -> Touch:
        """Have somebody wait for a page, and the source asked for it."""
        touch = self.touch(block, page)
        assert self.wait_for_requests() == [Request(block, page)]
        return touch

    def touch(self, block: int, page: int) -> Touch:
        mapping = self.blocks[block].mapping
        assert isinstance(mapping, MemfdMapping)
        return Touch(mapping, page * PAGE_SIZE)

    def wait_for_requests(self, number: int = 1) -> list[Request]:
        found: list[Request] = []

        def enough() -> bool:
            found.extend(self.requests())
            return len(found) >= number

        wait_until(enough, f"{number} pages were asked for")
        return found

    def is_asked(self, block: int, pages: range) -> bool:
        """Whether the source was asked for all of them by now."""
        self.asked.update(self.requests())
        return self.asked.issuperset(Request(block, page) for page in pages)

    def serve_until_got(self, touch: Touch) -> bytes:
        """What it reads, which nobody is to be asked for."""
        wait_until(lambda: self.requests() or not touch.waits, "it got what it read")
        assert not touch.waits, "the source was asked"
        return touch.result()

    def is_hole(self, block: int, page: int) -> bool:
        start = page * PAGE_SIZE
        return self.blocks[block].mapping.next_data(start, start + PAGE_SIZE) > start


@pytest.fixture
def there() -> Iterator[Destination]:
    with ExitStack() as stack:
        yield Destination(stack)


def _byte(block: RAMBlock, page: int) -> int:
    return int(block.array[page * PAGE_SIZE])


def test_what_is_owed_is_given_up_and_nothing_else(there: Destination) -> None:
    there.owe(0, (3, 2), (1199, 1))
    there.owe(1, (0, 8))
    assert there.ram.pages == 11
    assert [page for page in range(_SIZES[0]) if there.is_hole(0, page)] == [3, 4, 1199]
    assert all(there.is_hole(1, page) for page in range(8))
    assert _byte(there.blocks[0], 5) == _STALE


@pytest.mark.parametrize(
    ("block", "runs", "cause"),
    [
        (2, [(0, 1)], "pages of block 2 of 2"),
        (1, [(8, 1)], "page 8 of block 'ram1', which has 8"),
        (1, [(0, 1), (7, 2)], "page 8 of block 'ram1'"),
        (0, [(4, 1)], "owes page 4 or one of the 0 after it twice"),
        (0, [(0, 1), (1, 10)], "owes page 1 or one of the 9 after it twice"),
    ],
)
def test_owing_what_is_not_there_or_is_owed_already_is_refused(  # M5
    there: Destination, block: int, runs: list[tuple[int, int]], cause: str
) -> None:
    there.owe(0, (4, 1))
    with pytest.raises(ProtocolError, match=cause):
        there.owe(block, *runs)


def test_who_touches_an_owed_page_waits_for_it_and_asks_once(there: Destination) -> None:  # D1
    there.owe(0, (3, 2))
    there.ram.begin()
    touches = [there.touch(0, 3), there.touch(0, 3)]
    assert there.wait_for_requests() == [Request(0, 3)]
    wait_until(lambda: there.requests() or there.blocktime.requests == 2, "both wait")
    assert all(touch.waits for touch in touches)
    there.send(0, (3, 1))
    assert [touch.result() for touch in touches] == [b"\3", b"\3"]
    assert there.ram.pages == 1
    assert len(there.blocktime.latencies) == 2


def test_who_touches_what_is_there_does_not_wait(there: Destination) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    assert there.touch(0, 5).result() == bytes([_STALE])
    there.send(0, (3, 1))
    assert there.touch(0, 3).result() == b"\3"


def test_hole_that_is_not_owed_reads_as_zeros(there: Destination) -> None:  # M4
    there.blocks[0].mapping.punch(100 * PAGE_SIZE, 1100 * PAGE_SIZE)
    there.owe(0, (150, 1))
    there.ram.begin()
    assert there.serve_until_got(there.touch(0, 120)) == b"\0"
    assert [page for page in range(100, 150) if not there.is_hole(0, page)] == list(range(120, 150))
    assert there.is_hole(0, 150)  # what is owed stays absent
    assert there.serve_until_got(there.touch(0, 151)) == b"\0"
    assert not there.is_hole(0, 151 + absent_module._ZERO_AT_ONCE - 1)
    assert there.is_hole(0, 151 + absent_module._ZERO_AT_ONCE)
    assert there.ram.pages == 1


def test_hole_is_filled_up_to_what_is_there(there: Destination) -> None:
    there.blocks[0].mapping.punch(100 * PAGE_SIZE, 5 * PAGE_SIZE)
    there.owe(0, (0, 1))
    there.ram.begin()
    assert there.serve_until_got(there.touch(0, 102)) == b"\0"
    assert [page for page in range(100, 106) if there.is_hole(0, page)] == [100, 101]
    assert _byte(there.blocks[0], 105) == _STALE


def test_block_of_which_nothing_is_owed_is_left_alone(there: Destination) -> None:
    there.owe(1, (0, 1))
    there.blocks[0].mapping.punch(0, PAGE_SIZE)
    there.ram.begin()
    assert there.touch(0, 0).result() == b"\0"
    assert there.requests() == []
    assert there.blocks[0].fetch is None


def test_zero_page_wakes_who_waits_for_it(there: Destination) -> None:  # M4
    there.owe(0, (3, 1000))
    there.ram.begin()
    touch = there.touch(0, 700)
    there.wait_for_requests()
    there.ram.zero(ZeroPages(0, _runs((3, 1000))))
    assert touch.result() == b"\0"
    assert there.ram.pages == 0
    assert there.is_hole(0, 3)  # nobody has touched it
    assert there.serve_until_got(there.touch(0, 3)) == b"\0"
    assert len(there.blocktime.latencies) == 1


@pytest.mark.parametrize(
    ("block", "runs", "cause"),
    [
        (2, [(0, 1)], "pages of block 2 of 2"),
        (1, [(8, 1)], "page 8 of block 'ram1'"),
        (1, [(0, 1)], "pages of block 'ram1' that it does not owe"),
        (0, [(2, 2)], "that it does not owe"),
        (0, [(3, 1), (5, 1)], "that it does not owe"),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_page_that_is_not_owed_is_refused_and_changes_nothing(  # M5
    there: Destination, block: int, runs: list[tuple[int, int]], cause: str, zero: bool
) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    with pytest.raises(ProtocolError, match=cause):
        there.ram.zero(ZeroPages(block, _runs(*runs))) if zero else there.send(block, *runs)
    assert there.ram.pages == 2
    assert there.is_hole(0, 3)
    assert _byte(there.blocks[0], 2) == _byte(there.blocks[1], 0) == _STALE


@pytest.mark.parametrize("zero", [False, True])
def test_page_that_comes_twice_is_refused(there: Destination, zero: bool) -> None:  # M5
    there.owe(0, (3, 2))
    there.ram.begin()
    there.send(0, (3, 1))
    with pytest.raises(ProtocolError, match="that it does not owe"):
        there.ram.zero(ZeroPages(0, _runs((3, 2)))) if zero else there.send(0, (3, 2))
    assert _byte(there.blocks[0], 3) == 3
    assert there.ram.pages == 1


def test_page_that_was_asked_for_is_put_in_place_when_it_is_answered(there: Destination) -> None:  # D1
    there.owe(0, (3, 2))
    there.ram.begin()
    touch = there.ask(0, 3)
    there.answer(0, 3)
    assert touch.result() == b"\3"
    assert there.ram.pages == 1
    assert len(there.blocktime.latencies) == 1


def test_answer_may_be_that_a_page_is_zero(there: Destination) -> None:  # M4
    there.owe(0, (3, 2))
    there.ram.begin()
    touch = there.ask(0, 3)
    there.answer_zero(0, 3)
    assert touch.result() == b"\0"
    assert there.ram.pages == 1
    assert there.is_hole(0, 4)


@pytest.mark.parametrize(("block", "page"), [(2, 0), (1, 8), (0, 1200), (0, 4), (0, 5), (1, 3)])
@pytest.mark.parametrize("zero", [False, True])
def test_answer_that_was_not_asked_for_is_refused_and_changes_nothing(  # M5
    there: Destination, block: int, page: int, zero: bool
) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    there.ask(0, 3)
    with pytest.raises(ProtocolError, match=f"page {page} of block {block}, which it was not asked for"):
        there.answer_zero(block, page) if zero else there.answer(block, page)
    assert there.ram.pages == 2
    assert there.is_hole(0, 4)
    assert _byte(there.blocks[0], 5) == _byte(there.blocks[1], 3) == _STALE


def test_others_are_served_between_few_pages_and_fewer_while_somebody_waits(there: Destination) -> None:
    there.owe(0, (0, 40))
    there.ram.begin()
    there.send(0, (0, 16))
    assert there.served == 4
    touch = there.ask(0, 30)
    there.send(0, (16, 8))
    assert there.served == 4 + 4
    there.answer(0, 30)
    assert touch.result() == bytes([30])
    there.send(0, (32, 8))
    assert there.served == 8 + 2


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("when", range(1, 9))
@pytest.mark.parametrize("page", [0, 1, 7, 15])
def test_answer_may_come_while_a_message_is_put_in_place(  # M4, M9
    there: Destination, page: int, when: int, zero: bool
) -> None:
    there.owe(0, (0, 16))
    there.owe(1, (0, 1))
    there.ram.begin()
    touch = there.ask(0, page)

    def answer(served: int) -> None:
        if served == when:
            (there.answer_zero if zero else there.answer)(0, page)

    there.when_served = answer
    there.send(0, (0, 16))
    assert there.served == when - 1 or there.served >= when
    if there.served < when:
        answer(when)
    assert there.ram.pages == 1
    placed_before = when > page // 2 + 1
    assert touch.result() == (b"\0" if zero and not placed_before else bytes([page]))
    others = [number for number in range(16) if number != page]
    assert [_byte(there.blocks[0], number) for number in others] == others
    assert there.blocktime.requests == len(there.blocktime.latencies) == 1
    with pytest.raises(ProtocolError, match="was not asked for"):
        there.answer(0, page)


def test_what_is_in_place_when_the_connection_is_lost_is_not_lacking(there: Destination) -> None:  # M8
    def lose(served: int) -> None:
        if served == 3:
            raise DisconnectedError("no connection")

    there.owe(0, (0, 20))
    there.ram.begin()
    touch = there.ask(0, 3)
    there.when_served = lose
    with pytest.raises(DisconnectedError):
        there.send(0, (0, 4), (6, 8))
    assert touch.result() == b"\3"
    assert list(there.ram.lacking()) == [Lacking(0, _runs((4, 16)))]
    there.ram.ask_again()
    assert there.requests() == []
    assert len(there.blocktime.latencies) == 1


def test_answer_to_what_was_not_asked_for_yet_is_refused(
    there: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:  # M5
    monkeypatch.setattr(absent_module, "_MOST_UNANSWERED", 1)
    there.owe(0, (3, 2))
    there.ram.begin()
    there.ask(0, 3)
    touch = there.touch(0, 4)
    wait_until(lambda: there.requests() or there.blocktime.requests == 2, "both wait")
    with pytest.raises(ProtocolError, match="page 4 of block 0, which it was not asked for"):
        there.answer(0, 4)
    there.answer(0, 3)
    assert there.wait_for_requests() == [Request(0, 4)]
    there.answer(0, 4)
    assert touch.result() == b"\4"


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("urgent_first", [False, True])
def test_page_that_comes_on_both_channels_counts_once_and_keeps_what_was_written_meanwhile(  # M9
    there: Destination, zero: bool, urgent_first: bool
) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    touch = there.ask(0, 3)
    on_main: list[Callable[[], None]] = [lambda: there.send(0, (3, 1)), lambda: there.send_zeros(0, (3, 1))]
    urgently: list[Callable[[], None]] = [lambda: there.answer(0, 3), lambda: there.answer_zero(0, 3)]
    first, second = (ways[zero] for ways in ((urgently, on_main) if urgent_first else (on_main, urgently)))
    first()
    assert touch.result() == (b"\0" if zero else b"\3")
    assert there.ram.pages == 1
    there.system.write(3 * PAGE_SIZE, b"new")
    second()
    assert there.ram.pages == 1
    assert there.system.read(3 * PAGE_SIZE, 4) == b"new" + (b"\0" if zero else b"\3")
    for third in (first, second):
        with pytest.raises(ProtocolError, match=r"does not owe|was not asked for"):
            third()
    assert there.ram.pages == 1
    assert there.system.read(3 * PAGE_SIZE, 3) == b"new"


def test_pages_that_came_early_are_skipped_among_others(there: Destination) -> None:  # M9
    there.owe(0, (3, 6))
    there.ram.begin()
    for page in (4, 5, 8):
        there.ask(0, page)
        there.answer(0, page)
        there.system.write(page * PAGE_SIZE, b"\x99")
    assert there.ram.pages == 3
    there.send(0, (3, 6))
    assert there.ram.pages == 0
    assert [_byte(there.blocks[0], page) for page in range(3, 9)] == [3, 0x99, 0x99, 6, 7, 0x99]


def test_zeros_among_which_a_page_came_early_leave_it_as_it_is(there: Destination) -> None:  # M4, M9
    there.owe(0, (3, 3))
    there.ram.begin()
    there.ask(0, 4)
    there.answer_zero(0, 4)
    there.system.write(4 * PAGE_SIZE, b"\x99")
    there.send_zeros(0, (3, 3))
    assert there.ram.pages == 0
    assert [there.system.read(page * PAGE_SIZE, 1) for page in (3, 4, 5)] == [b"\0", b"\x99", b"\0"]


def test_page_that_is_there_when_its_copy_comes_is_left_as_it_is(there: Destination) -> None:  # M9
    """As it is if the other channel's thread put it there, and has not said so yet."""
    there.owe(0, (3, 4))
    there.ram.begin()
    for page in (3, 5):
        there.ram._faults.zero(there.blocks[0].mapping.address + page * PAGE_SIZE, PAGE_SIZE)
    there.send(0, (3, 4))
    assert [_byte(there.blocks[0], page) for page in range(3, 7)] == [0, 4, 0, 6]
    assert there.ram.pages == 0


_FEW = 6
"""Pages that are owed. Every third one is zero."""
_STEPS = st.tuples(st.sampled_from(["ask", "answer", "main", "write"]), st.integers(0, _FEW - 1))


class _Model:
    """What a destination is to do with the copies of a few pages of its second block.

    Attributes:
        contents: the first byte of those that are there.
    """

    def __init__(self, there: Destination) -> None:
        self.contents: dict[int, int] = {}
        self._there = there
        self._asked: set[int] = set()
        self._early: set[int] = set()
        self._touches: dict[int, Touch] = {}
        there.owe(1, (0, _FEW))
        there.ram.begin()

    def step(self, action: str, page: int, value: int) -> None:
        if action == "ask" and page not in self.contents and page not in self._asked:
            self._touches[page] = self._there.ask(1, page)
            self._asked.add(page)
        elif action == "write" and page in self.contents:
            self._there.system.write(self._place(page), bytes([value]))
            self.contents[page] = value
        elif action == "answer":
            self._answer(page)
        elif action == "main":
            self._main(page)

    def check(self) -> None:
        assert self._there.ram.pages == _FEW - len(self.contents)
        for page, value in self.contents.items():
            assert self._there.system.read(self._place(page), 1) == bytes([value])

    def finish(self) -> None:
        for page in range(_FEW):
            if page not in self.contents:
                self._main(page)

    def _answer(self, page: int) -> None:
        answer = self._there.answer_zero if page % 3 == 0 else self._there.answer
        with nullcontext() if page in self._asked else pytest.raises(ProtocolError):
            answer(1, page)
        if page in self._asked:
            self._asked.discard(page)
            if page not in self.contents:
                self._early.add(page)
                self._arrived(page)

    def _main(self, page: int) -> None:
        send = self._there.send_zeros if page % 3 == 0 else self._there.send
        is_due = page not in self.contents or page in self._early
        with nullcontext() if is_due else pytest.raises(ProtocolError):
            send(1, (page, 1))
        self._early.discard(page)
        if page not in self.contents:
            self._arrived(page)

    def _arrived(self, page: int) -> None:
        self.contents[page] = page if page % 3 else 0
        if page in self._touches:
            assert self._touches[page].result() == bytes([self.contents[page]])

    @staticmethod
    def _place(page: int) -> int:
        return (1 << 32) + page * PAGE_SIZE


@settings(max_examples=50)
@given(steps=st.lists(_STEPS, max_size=40))
@example(steps=[("ask", 1), ("answer", 1), ("write", 1), ("main", 1), ("main", 1), ("answer", 1)])
@example(steps=[("ask", 0), ("main", 0), ("write", 0), ("answer", 0), ("answer", 0), ("main", 0)])
def test_whichever_copy_comes_first_is_the_one_that_is_seen(steps: list[tuple[str, int]]) -> None:  # M5, M9
    with ExitStack() as stack:
        model = _Model(Destination(stack))
        for value, (action, page) in enumerate(steps, 100):
            model.step(action, page, value)
            model.check()
        model.finish()
        model.check()


@pytest.mark.parametrize("backwards", [False, True])
def test_copies_that_race_are_seen_once_and_never_replace_what_was_written(  # M9
    there: Destination, backwards: bool
) -> None:
    """Both channels' threads put the same pages in place, and a guest writes each as soon as it is there."""
    at_once = absent_module._ASK_AT_ONCE
    end = _SIZES[0] // at_once * at_once
    there.owe(0, (0, end))
    there.ram.begin()
    guest = Task(lambda: _write_each_page(there.blocks[0].memory[: end * PAGE_SIZE]))
    for first in range(0, end, at_once):
        pages = range(first, first + at_once)
        fetching = Task(partial(there.system.read, first * PAGE_SIZE, at_once * PAGE_SIZE))
        wait_until(lambda pages=pages: there.is_asked(0, pages), "they were asked for")  # type: ignore[misc]
        urgent = Task(lambda pages=pages: _each(there.answer, pages[::-1] if backwards else pages))  # type: ignore[misc]
        there.send(0, (first, at_once))
        urgent.join()
        fetching.join()
        assert there.ram.pages == end - first - at_once
    guest.join()
    heads = there.blocks[0].array.reshape(-1, PAGE_SIZE)[:end, :2]
    assert (heads[:, 0] == 0x99).all()
    assert (heads[:, 1] == np.arange(end).astype(np.uint8)).all()


def _each(answer: Callable[[int, int], None], pages: range) -> None:
    for page in pages:
        answer(0, page)


def _write_each_page(memory: memoryview) -> None:
    """As a guest does: without the interpreter's lock."""
    value = ctypes.create_string_buffer(b"\x99", 1)
    for offset in range(0, len(memory), PAGE_SIZE):
        ctypes.memmove(address_of(memory) + offset, value, 1)


def test_page_that_came_early_is_not_owed_on_another_connection(there: Destination) -> None:  # M8
    there.owe(0, (3, 2))
    there.ram.begin()
    there.ask(0, 3)
    there.answer(0, 3)
    there.ram.ask_again()
    assert list(there.ram.lacking()) == [Lacking(0, _runs((4, 1)))]
    with pytest.raises(ProtocolError, match="that it does not owe"):
        there.send(0, (3, 2))
    assert there.ram.pages == 1


def test_request_that_a_lost_connection_left_unanswered_is_over_once_its_page_is_there(there: Destination) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    there.ask(0, 3)
    there.send(0, (3, 1))
    there.ram.ask_again()
    assert there.requests() == []
    with pytest.raises(ProtocolError, match="which it was not asked for"):
        there.answer(0, 3)


def test_what_is_lacking_is_what_is_owed_and_has_not_come(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.migration.owed.MAX_RUNS", 2)
    there.owe(0, (3, 7))
    there.owe(1, (0, 1))
    there.ram.begin()
    there.send(0, (4, 1), (6, 1))
    assert list(there.ram.lacking()) == [
        Lacking(0, _runs((3, 1), (5, 1))),
        Lacking(0, _runs((7, 3))),
        Lacking(1, _runs((0, 1))),
    ]


def test_what_was_asked_for_and_has_not_come_is_asked_for_again(there: Destination) -> None:
    there.owe(0, (3, 7))
    there.ram.begin()
    touches = [there.touch(0, page) for page in (3, 5, 8)]
    there.wait_for_requests(3)
    there.send(0, (5, 1))
    assert there.requests() == []
    there.ram.ask_again()
    assert there.requests() == [Request(0, 3), Request(0, 8)]
    assert there.requests() == []
    there.send(0, (3, 1), (8, 1))
    assert [touch.result() for touch in touches] == [b"\3", b"\5", b"\x08"]


def test_what_could_not_be_asked_for_is_asked_for_again(there: Destination) -> None:  # M8
    def fail(block: int, page: int) -> None:
        raise DisconnectedError(f"no connection for page {page} of block {block}")

    there.owe(0, (3, 7))
    there.ram.begin()
    touches = [there.touch(0, page) for page in (3, 5)]

    def both_wait() -> bool:
        with contextlib.suppress(DisconnectedError):
            there.ram.serve(fail)
        return there.blocktime.requests == 2

    wait_until(both_wait, "both were noticed")
    there.ram.ask_again()
    assert there.wait_for_requests(2) == [Request(0, 3), Request(0, 5)]
    there.send(0, (3, 3))
    assert [touch.result() for touch in touches] == [b"\3", b"\5"]


class TestHost:
    """Accesses by threads of the process, which hold the interpreter's lock."""

    def test_read_asks_first_and_waits(self, there: Destination) -> None:
        there.owe(0, (3, 2))
        there.ram.begin()
        data = bytearray()
        reading = Task(lambda: data.extend(there.system.read(4 * PAGE_SIZE - 1, 2 * PAGE_SIZE)))
        assert there.wait_for_requests(2) == [Request(0, 3), Request(0, 4)]
        there.send(0, (4, 1))
        assert reading.running
        there.send(0, (3, 1))
        reading.join()
        assert bytes(data) == b"\3" + b"\4" * PAGE_SIZE + bytes([_STALE]) * (PAGE_SIZE - 1)

    def test_descriptor_tells_that_it_asks(self, there: Destination) -> None:
        there.owe(0, (3, 1))
        there.ram.begin()
        reading = Task(lambda: there.system.read(3 * PAGE_SIZE, 1))
        wait_until(lambda: select.select([there.ram.wakeup], [], [], 0)[0], "it asks")
        assert there.requests() == [Request(0, 3)]
        there.send(0, (3, 1))
        reading.join()

    def test_write_comes_after_what_is_owed(self, there: Destination) -> None:  # D1
        there.owe(0, (3, 1))
        there.ram.begin()
        writing = Task(lambda: there.system.write(3 * PAGE_SIZE + 1, b"new"))
        there.wait_for_requests()
        there.send(0, (3, 1))
        writing.join()
        assert there.system.read(3 * PAGE_SIZE, 5) == b"\3new\3"

    def test_hole_that_is_not_owed_is_filled_at_once(self, there: Destination) -> None:
        there.blocks[0].mapping.punch(0, 20 * PAGE_SIZE)
        there.owe(0, (20, 1))
        there.ram.begin()
        assert there.system.read(0, 20 * PAGE_SIZE) == bytes(20 * PAGE_SIZE)
        assert there.system.read(21 * PAGE_SIZE, 1) == bytes([_STALE])
        assert there.requests() == []

    def test_long_read_asks_for_a_part_at_a_time(self, there: Destination) -> None:
        there.owe(0, (0, 100))
        there.ram.begin()
        reading = Task(lambda: there.system.read(0, 100 * PAGE_SIZE))
        most = absent_module._ASK_AT_ONCE
        assert there.wait_for_requests(most) == [Request(0, page) for page in range(most)]
        there.send(0, (0, most))
        assert there.wait_for_requests(100 - most) == [Request(0, page) for page in range(most, 100)]
        there.send(0, (most, 100 - most))
        reading.join()

    def test_read_of_what_does_not_come_fails_in_the_end(
        self, there: Destination, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(absent_module, "_PATIENCE", 0.05)
        there.owe(0, (3, 1))
        there.ram.begin()
        with pytest.raises(HostError, match="memory of the guest has not arrived here") as caught:
            there.system.read(3 * PAGE_SIZE, 1)
        assert "see what became of the source" in str(caught.value.remedy)


def test_it_is_complete_when_nothing_is_owed(there: Destination) -> None:
    there.owe(0, (3, 2))
    there.owe(1, (0, 1))
    there.ram.begin()
    assert there.ram.pages == 3
    there.send(0, (3, 2))
    assert there.ram.pages == 1
    there.ram.zero(ZeroPages(1, _runs((0, 1))))
    assert there.ram.pages == 0
    assert list(there.ram.lacking()) == []


def test_close_lets_a_thread_of_ours_go_on_that_waits_for_what_never_comes(there: Destination) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    read: list[bytes] = []
    reading = Task(lambda: read.append(there.system.read(3 * PAGE_SIZE, 1)))
    wait_until(lambda: there.requests(), "it asked for the page")
    there.ram.close()
    reading.join()
    assert read == [b"\0"]


def test_close_lets_who_waits_go_on_with_zeros_and_closes_again(there: Destination) -> None:
    there.owe(0, (3, 2))
    there.ram.begin()
    touch = there.touch(0, 3)
    there.wait_for_requests()
    there.ram.close()
    there.ram.close()
    assert touch.result() == b"\0"
    assert there.blocks[0].fetch is None
    assert there.system.read(4 * PAGE_SIZE, 1) == b"\0"

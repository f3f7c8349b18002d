import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support.connected import Ends, connected
from support.own_memory import nothing_left
from support.patient_machine import PatientMachine
from support.require import require
from support.touching import Touch
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, HostError, UsageError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.missing import MissingFaults
from dirtylog.machine import RunState
from dirtylog.migration import Listener, Status, connect, parse_address
from dirtylog.migration import arrival as arrival_module
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.arrival import Arrival, check_machine
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import (
    Failed,
    Join,
    Joined,
    Lacking,
    Message,
    Owed,
    Page,
    Pages,
    PassDone,
    PassEnd,
    Request,
    Resume,
    Resumed,
    State,
    ZeroPages,
)
from dirtylog.migration.protocol import Stage
from dirtylog.migration.reception import Reception
from dirtylog.units import PAGE_SIZE

_SESSION = bytes(range(16))
_OWED = (10, 4)
"""Pages 10 to 13 of the first block."""


def _table(first: int, count: int = 1) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array([[first, count]], np.int64)


def _filled(*values: int) -> bytes:
    """A page of each."""
    return b"".join(bytes([value]) * PAGE_SIZE for value in values)


class Arriving:
    """A destination whose guest runs and lacks pages, and its source's ends of the connections."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.statuses: list[Status] = []
        self.machine = PatientMachine()
        stack.callback(self.machine.memory.close)
        stack.callback(self.machine.close)
        try:
            self.arrival = Arrival(self.machine, _SESSION, self.statuses.append)
        except HostError as error:
            require("userfaultfd", False, str(error))
            raise
        stack.callback(self.arrival.close)
        self.ends: Ends = stack.enter_context(connected(Stage.STREAMING))
        self.urgent_ends: Ends = stack.enter_context(connected(Stage.SIDE))
        self.main, self.urgent = self.ends.source, self.urgent_ends.source
        self._stack = stack
        self._directory = directory
        self._listeners = 0

    def begin(self, *owed: Owed) -> State:
        for message in owed or (Owed(0, _table(*_OWED)),):
            self.main.send(message)
        self.main.send(State(True, {}))
        first = self.ends.destination.expect(Owed)
        return self.arrival.begin(self.ends.destination, self.urgent_ends.destination, first)

    def run(self) -> Task:
        """Begin, and take the rest in a thread, as from ``Taken`` on."""
        self.begin()
        for channel in self.ends:
            channel._protocol.stage = Stage.SERVING
        task = Task(lambda: self.arrival.run(self.ends.destination))
        self._stack.callback(task.error)
        self._stack.callback(self.arrival.abort)
        wait_until(lambda: self.statuses, "it takes the rest")
        return task

    def lose(self) -> None:
        """Have the connection lost."""
        self.main.abort()
        self.wait_for(Status.POSTCOPY_PAUSED)

    def wait_for(self, status: Status, times: int = 1) -> None:
        wait_until(lambda: self.statuses.count(status) >= times, f"{status} was seen {times} times")

    def listen(self) -> Listener:
        self._listeners += 1
        listener = Listener(parse_address(f"unix:{self._directory}/again{self._listeners}"))
        self.arrival.recover(listener)
        return listener

    @property
    def let_in(self) -> int:
        """Connections that were, and that nobody has taken yet."""
        reception = self.arrival._current
        assert isinstance(reception, Reception)
        return len(reception._admitted)

    def connect(self, listener: Listener) -> Channel:
        return self._stack.enter_context(connect(listener.address))

    def resume(self, listener: Listener) -> list[Message]:
        """Come back, as far as the first channel; what it was told that is lacking."""
        self.main = self.connect(listener)
        self.main.send(Resume(_SESSION))
        told: list[Message] = [self.main.receive()]
        while not isinstance(told[-1], Resumed):
            told.append(self.main.receive())
        return told

    def join(self, listener: Listener, session: bytes = _SESSION) -> None:
        self.urgent = self.connect(listener)
        self.urgent.send(Join(session))
        self.urgent.expect(Joined)

    def touch(self, page: int) -> Touch:
        mapping = self.machine.memory.blocks["ram"].mapping
        assert isinstance(mapping, MemfdMapping)
        return Touch(mapping, page * PAGE_SIZE)

    def contents(self) -> list[int]:
        """The first byte of each page that was owed."""
        return [self.machine.system.read(page * PAGE_SIZE, 1)[0] for page in range(10, 14)]

    def send(self, page: int, value: int) -> None:
        self.main.send(Pages(0, _table(page)), [memoryview(_filled(value))])

    def answer(self, page: int, value: int) -> None:
        self.urgent.send(Page(0, page), [memoryview(_filled(value))])

    def ask(self, page: int) -> Touch:
        """Have somebody wait for a page, and the source asked for it."""
        touch = self.touch(page)
        assert self.urgent.expect(Request) == Request(0, page)
        return touch

    def finish(self, task: Task, number: int = 7) -> None:
        self.main.send(PassEnd(number))
        assert self.main.expect(PassDone) == PassDone(number, 0, 0, 0)
        task.join()


@pytest.fixture
def arriving(tmp_path: Path) -> Iterator[Arriving]:
    with ExitStack() as stack:
        yield Arriving(stack, tmp_path)


def test_machine_that_cannot_wait_is_refused_and_nothing_is_left_open() -> None:
    class Impatient(PatientMachine):
        def check_postcopy(self, *, of_kernel: bool) -> None:
            raise UsageError("cannot wait")

    machine = Impatient()
    with nothing_left(), pytest.raises(UsageError, match="cannot wait"):
        check_machine(machine)
    machine.close()
    machine.memory.close()


def test_all_that_is_owed_is_noted_and_the_state_is_what_comes_next(arriving: Arriving) -> None:
    assert not arriving.arrival.begun
    state = arriving.begin(Owed(0, _table(3)), Owed(1, _table(0, 2)))
    assert state == State(True, {})
    assert (arriving.arrival.begun, arriving.arrival.pages) == (True, 3)


def test_source_that_gives_up_while_it_says_what_it_owes_is_heard(arriving: Arriving) -> None:
    arriving.main.send(Owed(0, _table(3)))
    arriving.main.send(Failed("changed my mind"))
    first = arriving.ends.destination.expect(Owed)
    with pytest.raises(DirtylogError, match="the source gave up: changed my mind"):
        arriving.arrival.begin(arriving.ends.destination, arriving.urgent_ends.destination, first)


def test_page_is_had_while_the_state_is_loaded(arriving: Arriving) -> None:
    arriving.begin()
    touch = arriving.ask(11)
    arriving.answer(11, 0xAB)
    assert touch.result() == b"\xab"


def test_pages_come_on_both_channels_until_all_are_there(arriving: Arriving) -> None:  # D1
    task = arriving.run()
    arriving.send(10, 1)
    arriving.ask(13)
    arriving.answer(13, 4)
    arriving.main.send(ZeroPages(0, _table(11, 2)))
    arriving.finish(task)
    assert arriving.contents() == [1, 0, 0, 4]
    assert arriving.statuses == [Status.POSTCOPY_ACTIVE]
    assert arriving.arrival.lost is None


def test_page_is_asked_for_while_others_are_put_in_place(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:  # D1
    place = AbsentRAM._place
    touches: list[Touch] = []

    def slowly(ram: AbsentRAM, address: int, contents: int, size: int, serve: Callable[[], None]) -> None:
        def is_requested() -> bool:
            serve()
            return (0, 13) in ram._requested

        if not touches:
            touches.append(arriving.touch(13))
            wait_until(is_requested, "the page was asked for")
        place(ram, address, contents, size, serve)

    monkeypatch.setattr(AbsentRAM, "_place", slowly)
    task = arriving.run()
    arriving.main.send(Pages(0, _table(10, 3)), [memoryview(_filled(1, 2, 3))])
    assert arriving.urgent.expect(Request) == Request(0, 13)
    arriving.answer(13, 4)
    assert touches[0].result() == b"\4"
    arriving.finish(task)
    assert arriving.contents() == [1, 2, 3, 4]


def test_late_copy_of_a_page_that_was_asked_for_changes_nothing(arriving: Arriving) -> None:  # M9
    task = arriving.run()
    touch = arriving.ask(11)
    arriving.answer(11, 2)
    assert touch.result() == b"\2"
    arriving.machine.system.write(11 * PAGE_SIZE, b"\x99")
    arriving.main.send(Pages(0, _table(10, 3)), [memoryview(_filled(1, 2, 3))])
    arriving.send(13, 4)
    arriving.finish(task)
    assert arriving.contents() == [1, 0x99, 3, 4]


def test_answer_that_is_behind_the_copy_in_its_turn_changes_nothing(arriving: Arriving) -> None:  # M9
    task = arriving.run()
    touch = arriving.ask(11)
    arriving.send(11, 2)
    assert touch.result() == b"\2"
    arriving.machine.system.write(11 * PAGE_SIZE, b"\x99")
    arriving.answer(11, 2)
    arriving.ask(13)
    arriving.answer(13, 4)  # once this one is there, so is the one before it
    wait_until(lambda: arriving.arrival.pages == 2, "both came")
    arriving.main.send(ZeroPages(0, _table(10)))
    arriving.main.send(ZeroPages(0, _table(12, 2)))
    arriving.finish(task)
    assert arriving.contents() == [0, 0x99, 0, 4]


def test_end_that_overtakes_the_urgent_channel_waits_for_it(arriving: Arriving) -> None:
    task = arriving.run()
    arriving.ask(13)
    arriving.main.send(ZeroPages(0, _table(10, 3)))
    arriving.main.send(PassEnd(1))
    wait_until(lambda: arriving.arrival.pages == 1, "the others came")
    arriving.answer(13, 4)
    assert arriving.main.expect(PassDone).number == 1
    task.join()


def _says_it_is_all(arriving: Arriving) -> None:
    arriving.main.send(PassEnd(1))


def _sends_what_is_not_owed(arriving: Arriving) -> None:
    arriving.send(9, 1)


def _sends_it_twice(arriving: Arriving) -> None:
    arriving.send(10, 1)
    arriving.send(10, 2)


def _answers_what_it_was_not_asked_for(arriving: Arriving) -> None:
    arriving.answer(10, 1)


def _answers_twice(arriving: Arriving) -> None:
    arriving.ask(10)
    arriving.answer(10, 1)
    arriving.answer(10, 2)


def _sends_an_answered_page_twice(arriving: Arriving) -> None:
    arriving.ask(10)
    arriving.answer(10, 1)
    wait_until(lambda: arriving.arrival.pages == 3, "it came")
    arriving.send(10, 1)
    arriving.send(10, 2)


def _gives_up(arriving: Arriving) -> None:
    arriving.main.send(Failed("no more power"))


def _says_something_else_urgently(arriving: Arriving) -> None:
    arriving.urgent.send(PassEnd(1))


def _sends_in_its_turn_urgently(arriving: Arriving) -> None:
    arriving.urgent.send(Pages(0, _table(10)), [memoryview(_filled(1))])


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (_says_it_is_all, "the source says that it sent all, and 4 pages are missing"),
        (_sends_what_is_not_owed, "pages of block 'ram' that it does not owe"),
        (_sends_it_twice, "pages of block 'ram' that it does not owe"),
        (_sends_an_answered_page_twice, "pages of block 'ram' that it does not owe"),
        (_answers_what_it_was_not_asked_for, "page 10 of block 0, which it was not asked for"),
        (_answers_twice, "page 10 of block 0, which it was not asked for"),
        (_gives_up, "the source gave up: no more power"),
        (_says_something_else_urgently, "the source sent PassEnd where only pages are expected"),
        (_sends_in_its_turn_urgently, "the source sent Pages where only pages are expected"),
    ],
)
def test_source_that_does_something_wrong_is_left_and_another_connection_waited_for(  # M5
    arriving: Arriving, wrong: object, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "_COMPLETE_TIMEOUT", 0.05)
    task = arriving.run()
    assert callable(wrong)
    wrong(arriving)
    arriving.wait_for(Status.POSTCOPY_PAUSED)
    assert cause in str(arriving.arrival.lost)
    listener = arriving.listen()
    arriving.resume(listener)
    arriving.join(listener)
    arriving.wait_for(Status.POSTCOPY_ACTIVE, 2)
    arriving.main.send(ZeroPages(0, _table(10 if arriving.arrival.pages == 4 else 11, arriving.arrival.pages)))
    arriving.finish(task)


def test_connection_lost_when_nothing_is_owed_any_more_ends_it(arriving: Arriving) -> None:
    task = arriving.run()
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    wait_until(lambda: not arriving.arrival.pages, "all came")
    arriving.main.abort()
    task.join()
    assert arriving.statuses == [Status.POSTCOPY_ACTIVE]


@pytest.mark.parametrize("lost", ["main", "urgent"])
def test_recovery_says_what_is_lacking_and_asks_again_for_what_is_waited_for(arriving: Arriving, lost: str) -> None:
    task = arriving.run()
    arriving.send(10, 1)
    touch = arriving.ask(12)
    wait_until(lambda: arriving.arrival.pages == 3, "one page came")
    (arriving.main if lost == "main" else arriving.urgent).abort()
    arriving.wait_for(Status.POSTCOPY_PAUSED)
    cause = arriving.arrival.lost
    assert isinstance(cause, DisconnectedError)

    listener = arriving.listen()
    assert arriving.resume(listener) == [Lacking(0, _table(11, 3)), Resumed()]
    assert touch.waits
    arriving.join(listener)
    assert arriving.urgent.expect(Request) == Request(0, 12)
    arriving.answer(12, 3)
    assert touch.result() == b"\3"
    arriving.main.send(ZeroPages(0, _table(11)))
    arriving.main.send(ZeroPages(0, _table(13)))
    arriving.finish(task)
    assert arriving.arrival.lost is None
    assert arriving.statuses == [
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER,
        Status.POSTCOPY_ACTIVE,
    ]


def test_connection_may_be_lost_any_number_of_times(arriving: Arriving) -> None:
    task = arriving.run()
    for page in range(10, 13):
        arriving.send(page, page)
        wait_until(lambda page=page: arriving.arrival.pages == 13 - page, "the page came")  # type: ignore[misc]
        arriving.main.abort()
        arriving.wait_for(Status.POSTCOPY_PAUSED, page - 9)
        listener = arriving.listen()
        assert arriving.resume(listener) == [Lacking(0, _table(page + 1, 13 - page)), Resumed()]
        arriving.join(listener)
        arriving.wait_for(Status.POSTCOPY_ACTIVE, page - 8)
    arriving.send(13, 13)
    arriving.finish(task)
    assert arriving.contents() == [10, 11, 12, 13]


def test_source_of_another_session_is_told_so_and_the_right_one_is_waited_for(arriving: Arriving) -> None:  # M5
    task = arriving.run()
    arriving.lose()
    listener = arriving.listen()
    stranger = arriving.connect(listener)
    stranger.send(Resume(bytes(16)))
    assert stranger.receive() == Failed("this is not the migration that is to be resumed")
    arriving.resume(listener)
    arriving.join(listener)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"DIRTYLOG\x09\0\0\0"])
def test_stranger_at_the_recovery_address_is_turned_away(arriving: Arriving, said: bytes) -> None:  # M5
    task = arriving.run()
    arriving.lose()
    listener = arriving.listen()
    address = listener.address
    with closing(socket.socket(socket.AF_UNIX)) as stranger:
        stranger.connect(str(address).removeprefix("unix:"))
        with suppress(BrokenPipeError):
            stranger.sendall(said)
    arriving.resume(listener)
    arriving.join(listener)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)
    assert arriving.statuses.count(Status.POSTCOPY_RECOVER) == 1


def test_stranger_in_the_place_of_the_urgent_channel_is_told_so_and_the_right_one_is_waited_for(  # M5, M10
    arriving: Arriving,
) -> None:
    task = arriving.run()
    arriving.lose()
    listener = arriving.listen()
    arriving.resume(listener)
    stranger = arriving.connect(listener)
    stranger.send(Join(bytes(16)))
    assert stranger.receive() == Failed("this is not the migration that is to be resumed")
    arriving.join(listener)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)
    assert arriving.statuses.count(Status.POSTCOPY_RECOVER) == 1


def test_connection_that_is_lost_again_while_it_recovers_is_waited_for_anew(arriving: Arriving) -> None:
    task = arriving.run()
    arriving.lose()
    listener = arriving.listen()
    for times in (2, 3):
        arriving.resume(listener)
        arriving.main.abort()
        arriving.wait_for(Status.POSTCOPY_PAUSED, times)
    assert arriving.resume(listener) == [Lacking(0, _table(*_OWED)), Resumed()]
    arriving.join(listener)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)


def test_urgent_channel_of_an_attempt_that_failed_is_not_taken_for_the_next_ones(arriving: Arriving) -> None:  # M8
    task = arriving.run()
    arriving.lose()
    listener = arriving.listen()
    arriving.resume(listener)
    arriving.main.abort()
    arriving.wait_for(Status.POSTCOPY_PAUSED, 2)
    with arriving.connect(listener) as late:
        late.send(Join(_SESSION))
        wait_until(lambda: arriving.let_in, "it was let in")
    arriving.resume(listener)
    arriving.join(listener)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)
    assert arriving.statuses.count(Status.POSTCOPY_RECOVER) == 2


@pytest.mark.parametrize("joined", [True, False], ids=["served", "in a thread"])
def test_destination_can_be_ended_in_the_middle_of_an_urgent_page(arriving: Arriving, joined: bool) -> None:
    if joined:
        task = arriving.run()
    else:
        arriving.begin()
    arriving.urgent_ends.destination.set_timeout(0)  # as if a byte came now and then
    touch = arriving.ask(11)
    arriving.urgent.send(Page(0, 11))  # and nothing of the page
    wait_until(lambda: not select.select([arriving.urgent_ends.destination], [], [], 0)[0], "that was read")
    if not joined:
        task = Task(lambda: arriving.arrival.run(arriving.ends.destination))
        wait_until(lambda: arriving.statuses, "it waits for the thread")
    arriving.arrival.abort()
    assert isinstance(task.error(), CancelledError)
    assert touch.waits


def test_channel_of_an_arrival_that_failed_looks_at_no_descriptor_that_is_closed(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, closed = arriving.ends.destination, arriving.urgent_ends.destination.fileno()
    task = arriving.run()
    monkeypatch.setattr(MissingFaults, "copy", Mock(side_effect=HostError("out of memory")))
    arriving.send(10, 1)
    assert isinstance(task.error(), HostError)
    quiet = os.eventfd(0)
    os.dup2(quiet, closed)  # the number is another's by now
    saying = Task(lambda: main.send(Failed("out of memory")))
    assert isinstance(saying.error(), DisconnectedError)
    os.close(closed)
    os.close(quiet)


def test_second_address_takes_the_place_of_the_first(arriving: Arriving) -> None:
    task = arriving.run()
    arriving.lose()
    path = Path(str(arriving.listen().address).removeprefix("unix:"))
    listener = arriving.listen()
    arriving.resume(listener)
    arriving.join(listener)
    assert not path.exists()
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)


def test_pause_cuts_the_connection(arriving: Arriving) -> None:
    arriving.run()
    arriving.arrival.pause()
    arriving.wait_for(Status.POSTCOPY_PAUSED)
    with pytest.raises(DisconnectedError):
        arriving.main.expect(PassDone)


@pytest.mark.parametrize("when", ["active", "paused", "listening", "resumed"])
def test_abort_ends_it_at_any_time(arriving: Arriving, when: str) -> None:
    task = arriving.run()
    if when != "active":
        arriving.lose()
    if when in ("listening", "resumed"):
        listener = arriving.listen()
        if when == "resumed":
            arriving.resume(listener)
    arriving.arrival.abort()
    assert isinstance(task.error(), CancelledError)


def test_close_stops_a_guest_that_lacks_pages(arriving: Arriving) -> None:
    arriving.machine.hold(RunState.INMIGRATE)
    task = arriving.run()
    arriving.machine.release(RunState.RUNNING)
    arriving.arrival.abort()
    task.error()
    arriving.arrival.close()
    assert arriving.machine.state is RunState.PAUSED
    arriving.arrival.close()


def test_close_ends_a_guest_that_stops_only_once_it_has_its_page(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "_STOP_TIMEOUT", 0.02)
    arriving.machine.hold(RunState.INMIGRATE)
    task = arriving.run()
    arriving.machine.release(RunState.RUNNING)
    touch = arriving.touch(11)
    arriving.urgent.expect(Request)
    stopped = threading.Event()
    stop = arriving.machine._stop

    def stop_later() -> None:
        touch.result()
        stop()
        stopped.set()

    monkeypatch.setattr(arriving.machine, "_stop", stop_later)
    arriving.arrival.abort()
    task.error()
    arriving.arrival.close()
    assert stopped.is_set()
    assert touch.result() == b"\0"
    assert arriving.machine.state is RunState.PAUSED


def test_close_leaves_a_guest_that_has_everything(arriving: Arriving) -> None:
    arriving.machine.hold(RunState.INMIGRATE)
    task = arriving.run()
    arriving.machine.release(RunState.RUNNING)
    arriving.main.send(ZeroPages(0, _table(*_OWED)))
    arriving.finish(task)
    arriving.arrival.close()
    assert arriving.machine.state is RunState.RUNNING
    assert arriving.machine.system.read(10 * PAGE_SIZE, 1) == b"\0"

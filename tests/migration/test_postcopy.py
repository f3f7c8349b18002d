"""Guests that run on the destination before all of their memory is there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support.custody import Custody
from support.held_back import hold_back
from support.running import FIRST, LAST, RunningPC
from support.waiting import Task, wait_until

from dirtylog.errors import CancelledError, DisconnectedError, HostError, ProtocolError, UsageError
from dirtylog.guests.dirtier import COUNTER_ADDRESS, check_pages
from dirtylog.machine import KVMMachine, PCMachine, RunState, UnicornMachine
from dirtylog.machine.kvm import vcpu
from dirtylog.machine.pc import RAM_NAME
from dirtylog.machine.unicorn import cpu
from dirtylog.memory import TrackingReason
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    parse_address,
    postcopy,
)
from dirtylog.migration.absent import AbsentRAM
from dirtylog.migration.channel import Channel
from dirtylog.migration.connections import Connections
from dirtylog.migration.messages import Lacking, State, ZeroPage
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.urgent import Tally, UrgentAnswers
from dirtylog.units import MIB, PAGE_SIZE

_POSTCOPY = Parameters(downtime_limit=0.0, postcopy=True)
"""Never switched over in any other way."""
_MACHINES: dict[str, Callable[..., PCMachine]] = {"kvm": KVMMachine, "unicorn": UnicornMachine}


class Pair:
    """A guest that is migrated, and the machine that receives it."""

    def __init__(self, stack: ExitStack, kind: str, path: Path, size: int = 8 * MIB) -> None:
        self.source, self.destination = (self._machine(stack, _MACHINES[kind], size) for _ in range(2))
        self.custody = Custody(self.source.machine, self.destination.machine)
        self.source.boot_dirtier()
        self.source.machine.resume()
        self.source.wait_for_rounds()
        self.path = path
        self.listener = stack.enter_context(closing(Listener(parse_address(f"unix:{path}"))))
        self.incoming = IncomingMigration(self.destination.machine, self.listener)
        self.arriving = Task(self.incoming.run)
        stack.callback(self.arriving.error)
        stack.callback(self.incoming.abort)

    @staticmethod
    def _machine(stack: ExitStack, make: Callable[..., PCMachine], size: int) -> RunningPC:
        running = RunningPC(make, size)
        stack.callback(running.machine.close)
        return running

    def migrate(self, stack: ExitStack, parameters: Parameters, *, at_once: bool = False) -> None:
        self.outgoing = OutgoingMigration(self.source.machine, self.listener.address, parameters)
        if at_once:
            self.outgoing.start_postcopy()
        self.leaving = Task(self.outgoing.run)
        stack.callback(self.leaving.error)
        stack.callback(self.outgoing.close)

    def check(self) -> None:
        """The guest runs there, and its memory keeps the page rule."""
        assert self.custody.most == 1  # M1
        assert self.source.machine.state is RunState.POSTMIGRATE
        self.destination.wait_for_rounds()
        self.destination.machine.pause()
        memory = self.destination.memory.blocks[RAM_NAME].array
        rounds = int.from_bytes(self.destination.system.read(COUNTER_ADDRESS, 8), "little")
        assert check_pages(memory[FIRST:LAST:PAGE_SIZE], rounds) is None


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["kvm", "unicorn"])
def pair(request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path) -> Pair:
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    return Pair(stack, request.param, tmp_path / "m")


_HANDED_OVER = {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.COMPLETED}


class Gate:
    """What is sent in order waits for it; what the guest asks for does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        hold_back(monkeypatch, self._open.wait)

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def _hand_over(pair: Pair, stack: ExitStack) -> None:
    """Have the guest handed over with all of its memory missing."""
    pair.migrate(stack, _POSTCOPY, at_once=True)
    wait_until(lambda: {pair.outgoing.status, pair.incoming.status} <= _HANDED_OVER, "the guest was handed over")


def _lose(pair: Pair, gate: Gate, stack: ExitStack) -> None:
    """Have both sides paused, with pages missing that the guest waits for."""
    _hand_over(pair, stack)
    wait_until(lambda: pair.outgoing.statistics.postcopy_requests, "the guest has asked for a page")
    pair.outgoing.pause()
    gate.open()
    wait_until(lambda: {pair.outgoing.status, pair.incoming.status} == {Status.POSTCOPY_PAUSED}, "both sides pause")


def _recover(pair: Pair, path: Path) -> None:
    listener = Listener(parse_address(f"unix:{path}/again"))
    pair.incoming.recover(lambda: listener)
    pair.outgoing.resume(listener.address)
    assert pair.leaving.error() is None
    assert pair.arriving.error() is None


def test_guest_runs_there_before_its_memory_and_loses_nothing(pair: Pair, stack: ExitStack) -> None:  # D1, M1, M9
    _hand_over(pair, stack)
    assert pair.leaving.error() is None
    assert pair.arriving.error() is None
    assert pair.outgoing.status is pair.incoming.status is Status.COMPLETED
    pair.check()


def test_pages_that_the_guest_waits_for_come_before_the_others(pair: Pair, gate: Gate, stack: ExitStack) -> None:
    _hand_over(pair, stack)
    pair.destination.wait_for_rounds()
    gate.open()
    assert pair.leaving.error() is None
    assert pair.arriving.error() is None
    blocktime, sent = pair.incoming.blocktime, pair.outgoing.statistics
    assert blocktime is not None
    assert 0 < sent.postcopy_requests <= blocktime.requests <= sent.passes[-1].pages
    assert len(blocktime.latencies) == blocktime.requests
    assert 0 < blocktime.quantile(0.5) <= blocktime.quantile(0.99) <= blocktime.vcpu_blocked[0]
    pair.check()


def test_limit_holds_up_what_nobody_waits_for(pair: Pair, stack: ExitStack) -> None:
    pair.migrate(stack, replace(_POSTCOPY, max_postcopy_bandwidth=1), at_once=True)
    pair.destination.wait_for_rounds()  # whose pages are all asked for
    assert pair.outgoing.status is Status.POSTCOPY_ACTIVE
    assert pair.incoming.owed
    pair.outgoing.parameters = replace(pair.outgoing.parameters, max_postcopy_bandwidth=0)
    pair.leaving.join()
    pair.arriving.join()
    pair.check()


def test_pause_is_heard_though_nothing_more_may_be_sent_for_days(  # M8
    pair: Pair, stack: ExitStack, tmp_path: Path
) -> None:
    pair.migrate(stack, replace(_POSTCOPY, max_postcopy_bandwidth=1), at_once=True)
    pair.destination.wait_for_rounds()
    pair.outgoing.pause()
    wait_until(lambda: {pair.outgoing.status, pair.incoming.status} == {Status.POSTCOPY_PAUSED}, "both sides pause")
    pair.outgoing.parameters = replace(pair.outgoing.parameters, max_postcopy_bandwidth=0)
    _recover(pair, tmp_path)
    pair.check()


def test_lost_connection_pauses_both_sides_and_another_goes_on(  # M8
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path
) -> None:
    _lose(pair, gate, stack)
    _recover(pair, tmp_path)
    pair.check()


def test_what_was_lost_on_its_way_is_to_be_sent_again(pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path) -> None:
    _lose(pair, gate, stack)
    gate.shut()
    pair.outgoing.statistics.remaining_pages = 0  # as if all had been sent
    listener = Listener(parse_address(f"unix:{tmp_path}/again"))
    pair.incoming.recover(lambda: listener)
    pair.outgoing.resume(listener.address)
    wait_until(lambda: pair.outgoing.status is Status.POSTCOPY_ACTIVE, "it goes on")
    assert pair.outgoing.statistics.remaining_pages
    gate.open()
    pair.leaving.join()
    pair.arriving.join()
    assert not pair.outgoing.statistics.remaining_pages
    pair.check()


@pytest.mark.parametrize(
    ("address", "cause"),
    [("file:{}/saved", "a file runs no guest"), ("tls:localhost:1", "needs credentials")],
    ids=["file", "tls"],
)
def test_address_where_nothing_can_be_resumed_is_refused_and_another_goes_on(  # M8
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path, address: str, cause: str
) -> None:
    _lose(pair, gate, stack)
    with pytest.raises(UsageError, match=cause):
        pair.outgoing.resume(parse_address(address.format(tmp_path)))
    assert pair.outgoing.status is Status.POSTCOPY_PAUSED
    _recover(pair, tmp_path)
    pair.check()


def test_host_that_lets_nothing_be_resumed_for_a_while_ends_nothing(  # M8
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose(pair, gate, stack)
    with monkeypatch.context() as patch:
        patch.setattr(Connections, "open", Mock(side_effect=HostError("no credentials can be read")))
        pair.outgoing.resume(pair.listener.address)
        wait_until(lambda: pair.outgoing.status is Status.POSTCOPY_PAUSED, "it waits again")
        assert isinstance(pair.outgoing.lost, HostError)
    _recover(pair, tmp_path)
    pair.check()


def test_source_that_gives_up_while_it_resumes_says_what_that_means(  # M1
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path
) -> None:
    _lose(pair, gate, stack)
    with closing(Listener(parse_address(f"unix:{tmp_path}/silent"))) as silent:
        pair.outgoing.resume(silent.address)
        wait_until(lambda: pair.outgoing._connections._channels, "it is connected")
        pair.outgoing.close()
        error = pair.leaving.error()
    assert isinstance(error, DisconnectedError)
    assert "the rest of the guest's memory was not sent" in error.cause


def test_guest_that_waits_for_a_page_while_it_is_to_stop_runs_on(
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vcpu, "PARK_TIMEOUT", 0.2)
    monkeypatch.setattr(cpu, "PARK_TIMEOUT", 0.2)
    _lose(pair, gate, stack)
    with pytest.raises(HostError, match="vcpu0 did not stop") as caught:
        pair.destination.machine.pause()
    assert "its memory is still to arrive" in str(caught.value.remedy)
    _recover(pair, tmp_path)
    pair.check()


def test_destination_that_gives_up_ends_though_the_guest_waits(pair: Pair, gate: Gate, stack: ExitStack) -> None:
    _lose(pair, gate, stack)
    pair.incoming.abort()
    assert isinstance(pair.arriving.error(), CancelledError)
    assert pair.destination.machine.state is RunState.PAUSED


def test_source_that_gives_up_keeps_the_guest_stopped(pair: Pair, gate: Gate, stack: ExitStack) -> None:  # M1
    _lose(pair, gate, stack)
    pair.outgoing.close()
    assert isinstance(pair.leaving.error(), DisconnectedError)
    assert pair.outgoing.status is Status.FAILED
    assert pair.source.machine.state is RunState.POSTMIGRATE


def test_source_that_ends_while_it_sends_says_what_that_means(pair: Pair, gate: Gate, stack: ExitStack) -> None:  # M1
    _hand_over(pair, stack)
    wait_until(lambda: pair.outgoing.status is Status.POSTCOPY_ACTIVE, "the rest is sent")
    pair.outgoing.close()
    gate.open()
    error = pair.leaving.error()
    assert isinstance(error, DisconnectedError)
    assert "the rest of the guest's memory was not sent" in error.cause
    assert pair.source.machine.state is RunState.POSTMIGRATE
    wait_until(lambda: pair.incoming.status is Status.POSTCOPY_PAUSED, "the destination waits")


def test_destination_that_lacks_more_than_there_is_is_left_alone(  # M5
    pair: Pair, gate: Gate, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose(pair, gate, stack)
    page = Lacking(0, np.array([[0, 1]]))
    with monkeypatch.context() as patch:
        patch.setattr(AbsentRAM, "lacking", lambda _: repeat(page, 8 * MIB // PAGE_SIZE + 1))
        listener = Listener(parse_address(f"unix:{tmp_path}/liar"))
        pair.incoming.recover(lambda: listener)
        pair.outgoing.resume(listener.address)
        wait_until(lambda: pair.outgoing.status is Status.POSTCOPY_PAUSED, "it is left alone")
        wait_until(lambda: pair.incoming.status is Status.POSTCOPY_PAUSED, "it waits for another")
        assert "lacks more pages than there are" in str(pair.outgoing.lost)
    _recover(pair, tmp_path)
    pair.check()


def test_what_is_wrong_with_a_request_before_the_handover_is_told(  # M2, M5
    pair: Pair, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AbsentRAM, "serve", lambda _, request: request(0, 8 * MIB // PAGE_SIZE))
    monkeypatch.setattr(
        IncomingMigration, "_load", lambda self, _: wait_until(lambda: pair.outgoing.ended, "it failed")
    )
    pair.migrate(stack, _POSTCOPY, at_once=True)
    error = pair.leaving.error()
    assert isinstance(error, ProtocolError)
    assert "asks for page 2048 of block 0" in error.cause
    pair.source.wait_for_rounds()


def test_what_is_wrong_with_an_answer_before_the_handover_is_told(  # M5, M6
    pair: Pair, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Liar(UrgentAnswers):
        def __init__(self, channel: Channel, owed: OwedPages, tally: Tally, main: Channel) -> None:
            super().__init__(channel, owed, tally, main)
            channel.send(ZeroPage(0, 0))

    def load(incoming: IncomingMigration, _: State) -> None:
        arrival = incoming._arrival
        assert arrival is not None
        wait_until(lambda: arrival._service and arrival._service._error, "the answer was refused")

    monkeypatch.setattr(postcopy, "UrgentAnswers", Liar)
    monkeypatch.setattr(IncomingMigration, "_load", load)
    pair.migrate(stack, _POSTCOPY, at_once=True)
    error = pair.arriving.error()
    assert isinstance(error, ProtocolError)
    assert "page 0 of block 0, which it was not asked for" in error.cause
    pair.source.wait_for_rounds()


def test_memory_that_is_missing_is_fetched_for_the_host_and_not_watched(
    pair: Pair, gate: Gate, stack: ExitStack
) -> None:
    _hand_over(pair, stack)
    untouched = pair.destination.system.read(4 * MIB, PAGE_SIZE)
    assert untouched == pair.source.system.read(4 * MIB, PAGE_SIZE)
    with pytest.raises(UsageError, match="has not arrived here yet"):
        pair.destination.memory.start_logging(TrackingReason.DIRTY_RATE)
    gate.open()
    pair.leaving.join()
    pair.arriving.join()
    pair.destination.memory.start_logging(TrackingReason.DIRTY_RATE)
    pair.destination.memory.stop_logging(TrackingReason.DIRTY_RATE)
    pair.check()


def test_migration_without_the_capability_is_not_handed_over_early(pair: Pair, stack: ExitStack) -> None:
    pair.migrate(stack, replace(_POSTCOPY, postcopy=False))
    with pytest.raises(UsageError, match="cannot hand its guest over before"):
        pair.outgoing.start_postcopy()


def test_passes_that_do_not_converge_lead_to_postcopy(pair: Pair, stack: ExitStack) -> None:
    pair.migrate(stack, replace(_POSTCOPY, postcopy_after=1, max_bandwidth=4 * MIB))
    pair.leaving.join()
    pair.arriving.join()
    assert pair.outgoing.statistics.pass_count == 2
    assert pair.outgoing.statistics.postcopy_bytes
    pair.check()


def test_migration_that_may_be_postcopy_and_converges_is_not(pair: Pair, stack: ExitStack) -> None:
    pair.migrate(stack, replace(_POSTCOPY, downtime_limit=10.0))
    pair.leaving.join()
    pair.arriving.join()
    assert not pair.outgoing.statistics.postcopy_bytes
    pair.check()


@pytest.mark.parametrize("other", [Parameters(verify=True), Parameters(share_memory=True)], ids=["verify", "share"])
def test_what_does_not_go_together_with_postcopy_is_refused(pair: Pair, stack: ExitStack, other: Parameters) -> None:
    with pytest.raises(UsageError, match="goes together with neither"):
        pair.migrate(stack, replace(other, postcopy=True))


def test_file_is_no_place_for_postcopy(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a file runs no guest"):
        OutgoingMigration(pair.source.machine, parse_address(f"file:{tmp_path}/x"), _POSTCOPY)


def test_migration_waits_before_its_switchover_until_it_is_told(pair: Pair, stack: ExitStack) -> None:
    pair.migrate(stack, Parameters(downtime_limit=10.0, pause_before_switchover=True))
    wait_until(lambda: pair.outgoing.status is Status.PRE_SWITCHOVER, "it waits")
    assert pair.source.machine.state is RunState.FINISH_MIGRATE
    pair.outgoing.go_on()
    pair.leaving.join()
    pair.arriving.join()
    pair.check()


def test_migration_that_waits_before_its_switchover_can_be_cancelled(pair: Pair, stack: ExitStack) -> None:  # M2
    pair.migrate(stack, Parameters(downtime_limit=10.0, pause_before_switchover=True))
    wait_until(lambda: pair.outgoing.status is Status.PRE_SWITCHOVER, "it waits")
    assert pair.outgoing.cancel()
    assert isinstance(pair.leaving.error(), CancelledError)
    pair.source.wait_for_rounds()

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from support.connected import Ends, connected
from support.waiting import Task

from dirtylog.errors import DirtylogError, DisconnectedError, InDoubtError, ProtocolError, RefusedError
from dirtylog.linux.process import ProcessName
from dirtylog.migration import letting_go
from dirtylog.migration.channel import Channel
from dirtylog.migration.custody import Custody, Event
from dirtylog.migration.letting_go import LettingGo
from dirtylog.migration.messages import HEAD, Failed, Handover, Taken
from dirtylog.migration.protocol import Stage

_HERE = ProcessName.own()
_GONE = replace(_HERE, start_time=_HERE.start_time + 1)
"""Its number belongs to another process by now."""
Answer = Callable[[Channel], object]


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letting_go, "_GONE_TIMEOUT", 0.02)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with connected(Stage.READY) as ends:
        yield ends


def _refuse(channel: Channel) -> None:
    channel.send(Failed("no memory"))


def _garbage(channel: Channel) -> None:
    channel._socket.sendall(HEAD.pack(99, 0, 0))


def _hand_over(ends: Ends, answer: Answer, destination: ProcessName) -> tuple[LettingGo, BaseException | None]:
    """Let go of the guest, to a destination that hears of it, answers and hangs up; what came of it."""

    def hear() -> None:
        ends.destination.expect(Handover)
        answer(ends.destination)
        ends.destination.abort()

    owner = LettingGo()
    assert owner.custody is Custody.MINE
    owner.note(Event.HANDOVER)
    hearing = Task(hear)
    error: BaseException | None = None
    try:
        owner.hand_over(ends.source, destination)
    except DirtylogError as caught:
        error = caught
    hearing.join()
    return owner, error


def test_guest_is_there_once_the_destination_confirms_it(ends: Ends) -> None:  # M1
    owner, error = _hand_over(ends, lambda channel: channel.send(Taken()), _HERE)
    assert error is None
    assert owner.custody is Custody.THEIRS


@pytest.mark.parametrize("destination", [_HERE, _GONE], ids=["alive", "gone"])
def test_guest_is_here_if_the_destination_refuses_it(ends: Ends, destination: ProcessName) -> None:  # M2
    owner, error = _hand_over(ends, _refuse, destination)
    assert isinstance(error, RefusedError)
    assert owner.custody is Custody.MINE


@pytest.mark.parametrize("answer", [lambda _: None, _garbage], ids=["silence", "garbage"])
def test_guest_may_be_there_if_the_destination_lives_and_did_not_confirm_it(ends: Ends, answer: Answer) -> None:  # M1
    owner, error = _hand_over(ends, answer, _HERE)
    assert isinstance(error, InDoubtError)
    assert "look at the destination" in str(error.remedy)
    assert owner.custody is Custody.DOUBTFUL


@pytest.mark.parametrize(
    ("answer", "cause"), [(lambda _: None, DisconnectedError), (_garbage, ProtocolError)], ids=["silence", "garbage"]
)
def test_guest_is_here_if_the_destination_ended_without_confirming_it(
    ends: Ends, answer: Answer, cause: type[DirtylogError]
) -> None:
    owner, error = _hand_over(ends, answer, _GONE)
    assert type(error) is cause
    assert owner.custody is Custody.MINE


@pytest.mark.parametrize(
    ("late", "custody", "cause"),
    [(lambda channel: channel.send(Taken()), Custody.THEIRS, None), (_refuse, Custody.MINE, RefusedError)],
    ids=["taken", "refused"],
)
def test_what_the_destination_said_before_it_ended_counts_though_it_came_late(  # M1
    ends: Ends,
    late: Answer,
    custody: Custody,
    cause: type[DirtylogError] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ends_after_saying(_: ProcessName, timeout: float) -> bool:
        assert timeout == letting_go._GONE_TIMEOUT
        assert ends.destination.expect(Handover) == Handover()
        late(ends.destination)
        return True

    monkeypatch.setattr(ProcessName, "is_gone", ends_after_saying)
    ends.source.set_timeout(0.001)
    owner = LettingGo()
    owner.note(Event.HANDOVER)
    error: DirtylogError | None = None
    try:
        owner.hand_over(ends.source, _HERE)
    except DirtylogError as caught:
        error = caught
    assert (owner.custody, None if error is None else type(error)) == (custody, cause)


def test_guest_is_here_if_the_destination_was_not_told(ends: Ends) -> None:  # M2
    ends.source.stop_sending()
    owner = LettingGo()
    owner.note(Event.HANDOVER)
    with pytest.raises(DisconnectedError):
        owner.hand_over(ends.source, _HERE)
    assert owner.custody is Custody.MINE


def test_what_cannot_happen_is_a_defect() -> None:
    with pytest.raises(KeyError):
        LettingGo().note(Event.TAKEN)

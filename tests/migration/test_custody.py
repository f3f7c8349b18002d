"""Who has the guest: all that may happen to both sides, in every order, see `support.handover_model`."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import pytest
from support.explorer import CounterexampleError, cannot_reach, explore
from support.handover_model import Fault, Model, Rules, Table
from support.handover_outcomes import Outcome, outcome
from support.handover_world import Link, World

from dirtylog.migration.custody import DESTINATION, SOURCE, Custody, Event
from dirtylog.migration.messages import Failed, Handover, Join, PassDone, Ready, ZeroPages
from dirtylog.migration.protocol import SENDERS, TRANSITIONS, Role, Stage

_BEFALLS: Final = frozenset(Fault) - {Fault.CONT}
_DEATHS: Final = frozenset({Fault.SOURCE_DIES, Fault.DESTINATION_DIES})
_LOSS: Final = frozenset({Fault.CUT, Fault.RECOVER})
_HOSTS: Final = pytest.mark.parametrize("one_host", [True, False], ids=["one-host", "two-hosts"])

_INVARIANTS: Final[Mapping[str, Callable[[World], bool]]] = {
    "at most one side runs the guest": lambda world: not (world.source.runs and world.destination.runs),
    "who runs the guest has it": lambda world: all(
        side.custody is Custody.MINE for side in (world.source, world.destination) if side.runs
    ),
    "at most one living side has the guest": lambda world: (
        not all(side.alive and side.custody is Custody.MINE for side in (world.source, world.destination))
    ),
    "the source lets go only of what the destination is ready for": lambda world: (
        world.source.custody is Custody.MINE or world.destination.ready
    ),
    "whatever happens has a row in the tables": lambda world: not world.defect,
}


def _has_ended(model: Model) -> Callable[[World], bool]:
    return lambda world: next(model.progress(world), None) is None


def _explore(
    faults: Iterable[Fault],
    *,
    one_host: bool,
    rules: Rules | None = None,
    ends: Collection[Outcome | None] = frozenset(Outcome),
) -> tuple[Model, Collection[World]]:
    model = Model(frozenset(faults), rules or Rules())
    has_ended = _has_ended(model)
    invariants = {
        **_INVARIANTS,
        "an end is one of those that are known": lambda world: not has_ended(world) or outcome(world) in ends,
    }
    return model, explore([model.initial(one_host=one_host)], model.steps, invariants)


def _ends(model: Model, worlds: Iterable[World]) -> set[World]:
    return set(filter(_has_ended(model), worlds))


def _outcomes(faults: Iterable[Fault], *, one_host: bool, rules: Rules | None = None) -> set[Outcome | None]:
    return {outcome(world) for world in _ends(*_explore(faults, one_host=one_host, rules=rules))}


@_HOSTS
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_guest_has_one_owner_whatever_is_lost_or_dies_in_whatever_order(one_host: bool, capacity: int) -> None:  # M1
    rules = Rules(capacity=capacity)
    model, worlds = _explore(_BEFALLS, one_host=one_host, rules=rules)
    assert {outcome(world) for world in _ends(model, worlds)} == set(Outcome) - (
        set() if one_host else {Outcome.TAKEN_BACK}
    )
    assert cannot_reach(worlds, model.progress, _has_ended(model)) == set()


# What a mishap can lead to, beside what comes about without any: on one host, and on two.
_STAYED: Final = frozenset({Outcome.STAYED})
_IN_DOUBT: Final = frozenset({Outcome.IN_DOUBT, Outcome.IN_DOUBT_PAUSED})
_OF_SOURCE: Final = frozenset({Outcome.DIED_WITH_SOURCE, Outcome.STRANDED})
_OF_DESTINATION: Final = frozenset({Outcome.STAYED, Outcome.DIED_WITH_DESTINATION})
_OF_BOTH: Final = _OF_SOURCE | _OF_DESTINATION | {Outcome.BOTH_DIED}
_OF_LOSS: Final = _STAYED | _IN_DOUBT | {Outcome.MOVED_UNTOLD, Outcome.WAITS}
_OF_ABORT: Final = _STAYED | _IN_DOUBT | {Outcome.ABANDONED}
_LEADS_TO: Final[Mapping[frozenset[Fault], tuple[frozenset[Outcome], frozenset[Outcome]]]] = {
    frozenset(): (frozenset(), frozenset()),
    frozenset({Fault.CANCEL, Fault.REFUSE}): (_STAYED, _STAYED),
    frozenset({Fault.ABORT}): (_OF_ABORT, _OF_ABORT),
    frozenset({Fault.SOURCE_DIES}): (_OF_SOURCE, _OF_SOURCE),
    frozenset({Fault.DESTINATION_DIES}): (_OF_DESTINATION, _OF_DESTINATION | _IN_DOUBT),
    _DEATHS: (_OF_BOTH, _OF_BOTH | _IN_DOUBT),
    _LOSS: (_OF_LOSS, _OF_LOSS),
}


@_HOSTS
@pytest.mark.parametrize(
    "faults", _LEADS_TO, ids=lambda faults: "+".join(sorted(each.name for each in faults)) or "none"
)
def test_mishap_leads_to_the_ends_that_are_known_of_it_and_to_no_others(  # M1, M2, M6
    faults: frozenset[Fault], one_host: bool
) -> None:
    assert _outcomes(faults, one_host=one_host) == {Outcome.MOVED, *_LEADS_TO[faults][0 if one_host else 1]}


@_HOSTS
def test_postcopy_that_is_paused_goes_on_and_the_source_learns_who_has_the_guest(one_host: bool) -> None:
    model, worlds = _explore(_LOSS, one_host=one_host)
    waiting = {world for world in _ends(model, worlds) if outcome(world) is Outcome.WAITS}
    assert {world.source.custody for world in waiting} == {Custody.THEIRS, Custody.DOUBTFUL}
    recovering = Model(frozenset({Fault.RECOVER}), Rules())
    for world in waiting:
        ends = _ends(recovering, explore([world], recovering.steps, _INVARIANTS))
        assert {outcome(end) for end in ends} == {Outcome.WAITS, Outcome.MOVED}
        assert {end.source.custody for end in ends if outcome(end) is Outcome.MOVED} == {Custody.THEIRS}


@_HOSTS
def test_doubtful_guest_may_be_continued_where_the_destination_ended_or_never_will_have_it(one_host: bool) -> None:
    model, worlds = _explore(frozenset(Fault), one_host=one_host)
    doubtful = {end for end in _ends(model, worlds) if end.source.custody is Custody.DOUBTFUL}
    assert {Outcome.IN_DOUBT, Outcome.IN_DOUBT_PAUSED, Outcome.MOVED_UNTOLD} <= {outcome(end) for end in doubtful}
    for end in doubtful:
        may_continue = f"({Fault.CONT.value})" in dict(model.faults(end))
        assert may_continue is (outcome(end) is Outcome.IN_DOUBT)


def test_doubtful_guest_may_not_be_continued_merely_because_the_destination_has_it_not_yet() -> None:
    hasty = Rules(cont=lambda destination: destination.custody is not Custody.MINE)
    with pytest.raises(CounterexampleError, match="at most one living side has the guest") as caught:
        _explore(frozenset(Fault), one_host=False, rules=hasty)
    assert caught.value.trace[-2:] == (f"({Fault.CONT.value})", "destination: hears Handover")


class _Watched(Mapping[tuple[Custody, Event], Custody]):
    """A table that notes which rows are looked up."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.used: set[tuple[Custody, Event]] = set()

    def __getitem__(self, key: tuple[Custody, Event]) -> Custody:
        self.used.add(key)
        return self._table[key]

    def __iter__(self) -> Iterator[tuple[Custody, Event]]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def test_every_row_of_both_tables_is_of_use() -> None:
    source, destination = _Watched(SOURCE), _Watched(DESTINATION)
    _explore(_BEFALLS, one_host=True, rules=Rules(source=source, destination=destination))
    assert (source.used, destination.used) == (set(SOURCE), set(DESTINATION))


def test_model_says_all_that_the_protocol_lets_a_main_channel_say() -> None:
    _, worlds = _explore(_BEFALLS, one_host=True)
    heard = {
        (side.stage, inbound[0])
        for world in worlds
        for side, inbound in ((world.source, world.to_source), (world.destination, world.to_destination))
        if inbound
    }
    of_side_channels = {Stage.JOINING, Stage.SIDE, Stage.SIDE_ENDED}
    assert {(stage, kind) for stage, kind in heard if kind is not Failed} == {
        (stage, kind)
        for stage, kind in TRANSITIONS
        if stage not in of_side_channels and kind not in (Join, Failed, ZeroPages)  # which count as Pages do
    }
    assert Stage.HANDED_OVER in {stage for stage, kind in heard if kind is Failed}


class _Mistake(NamedTuple):
    rules: Rules
    faults: frozenset[Fault]
    broken: str
    one_host: bool = False
    ends: Collection[Outcome] = frozenset(Outcome)


_TWO_OWNERS: Final = "at most one living side has the guest"
_RUNS_ELSEWHERE: Final = "who runs the guest has it"
_NOT_READY: Final = "the source lets go only of what the destination is ready for"
_NO_ROW: Final = "whatever happens has a row in the tables"
_OTHER_END: Final = "an end is one of those that are known"
_MISTAKES: Final = {
    "source takes the guest back when the connection is lost": _Mistake(
        Rules(source={**SOURCE, (Custody.OFFERED, Event.LOST): Custody.MINE}), frozenset({Fault.CUT}), _TWO_OWNERS
    ),
    "source takes a death for proven that it cannot see": _Mistake(
        Rules(proof=lambda world: world.link is not Link.OPEN), frozenset({Fault.CUT}), _TWO_OWNERS
    ),
    "source keeps the guest though the destination has said Taken": _Mistake(
        Rules(source={**SOURCE, (Custody.OFFERED, Event.TAKEN): Custody.MINE}), frozenset(), _TWO_OWNERS
    ),
    "source has no row for a Taken that comes late": _Mistake(
        Rules(source={key: row for key, row in SOURCE.items() if key != (Custody.DOUBTFUL, Event.TAKEN)}),
        _BEFALLS,
        _NO_ROW,
    ),
    "source does not believe a destination that refuses": _Mistake(
        Rules(source={**SOURCE, (Custody.OFFERED, Event.REFUSED): Custody.THEIRS}),
        frozenset({Fault.REFUSE}),
        _OTHER_END,
    ),
    "source gives up a guest that it could not hand over": _Mistake(
        Rules(source={**SOURCE, (Custody.OFFERED, Event.NOT_SAID): Custody.DOUBTFUL}),
        frozenset({Fault.DESTINATION_DIES}),
        _OTHER_END,
        one_host=True,
        ends=_OF_DESTINATION | {Outcome.MOVED},
    ),
    "source cancels after the handover": _Mistake(
        Rules(cancels=frozenset({Custody.MINE, Custody.OFFERED})), frozenset({Fault.CANCEL}), _TWO_OWNERS
    ),
    "source lets the guest run on while its state is saved": _Mistake(
        Rules(stops_first=False), frozenset(), _RUNS_ELSEWHERE
    ),
    "source hands over before the destination is ready": _Mistake(
        Rules(transitions={**TRANSITIONS, (Stage.STATE_SENT, Handover): Stage.HANDED_OVER}), frozenset(), _NOT_READY
    ),
    "source may say Ready": _Mistake(Rules(senders={**SENDERS, Ready: frozenset(Role)}), frozenset(), _NOT_READY),
    "destination takes what it was not given when the connection is lost": _Mistake(
        Rules(destination={**DESTINATION, (Custody.THEIRS, Event.LOST): Custody.MINE}),
        frozenset({Fault.CUT}),
        _TWO_OWNERS,
    ),
    "destination takes what it was not given when it is told to end": _Mistake(
        Rules(destination={**DESTINATION, (Custody.THEIRS, Event.GIVEN_UP): Custody.MINE}),
        frozenset({Fault.ABORT}),
        _TWO_OWNERS,
    ),
    "destination takes the guest after it gave up": _Mistake(
        Rules(destination={**DESTINATION, (Custody.NEVER, Event.HANDOVER): Custody.MINE}), frozenset(Fault), _TWO_OWNERS
    ),
    "destination forgets the guest when the connection is lost": _Mistake(
        Rules(destination={**DESTINATION, (Custody.MINE, Event.LOST): Custody.NEVER}),
        _LOSS,
        _RUNS_ELSEWHERE,
    ),
    "destination refuses what it has": _Mistake(
        Rules(refuses=frozenset({Custody.THEIRS, Custody.MINE})), frozenset({Fault.REFUSE}), _TWO_OWNERS
    ),
    "destination starts the guest before it says Taken": _Mistake(
        Rules(starts_after=False), _DEATHS, _OTHER_END, one_host=True, ends=_OF_BOTH | {Outcome.MOVED}
    ),
    "nobody answers what owes memory": _Mistake(
        Rules(transitions={key: stage for key, stage in TRANSITIONS.items() if key != (Stage.SERVED, PassDone)}),
        frozenset(),
        _OTHER_END,
    ),
}


@pytest.mark.parametrize("mistake", _MISTAKES.values(), ids=_MISTAKES)
def test_mistake_is_found(mistake: _Mistake) -> None:
    with pytest.raises(CounterexampleError) as caught:
        _explore(mistake.faults, one_host=mistake.one_host, rules=mistake.rules, ends=mistake.ends)
    assert caught.value.broken == mistake.broken
    _explore(mistake.faults, one_host=mistake.one_host, ends=mistake.ends)  # and is none without it


def test_source_takes_the_guest_back_only_with_proof() -> None:  # M1
    back = {event for (before, event), after in SOURCE.items() if before is not Custody.MINE and after is Custody.MINE}
    assert back == {Event.NOT_SAID, Event.REFUSED, Event.GONE}
    assert {after for (before, _), after in SOURCE.items() if before is Custody.THEIRS} == {Custody.THEIRS}

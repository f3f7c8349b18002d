"""What each side may know, against the words of docs/wire-format.md."""

import pytest

from dirtylog.migration.custody import DESTINATION, SOURCE, Custody, Event

Table = dict[tuple[Custody, Event], Custody]


def _reached(table: Table, start: Custody) -> set[Custody]:
    reached, more = set[Custody](), {start}
    while more:
        reached |= more
        more = {after for (before, _), after in table.items() if before in reached} - reached
    return reached


@pytest.mark.parametrize("table", [SOURCE, DESTINATION], ids=["source", "destination"])
def test_table_has_no_state_that_cannot_be_reached(table: Table) -> None:
    start = Custody.MINE if table is SOURCE else Custody.THEIRS
    assert {state for state, _ in table} <= _reached(table, start)


def test_source_takes_the_guest_back_only_with_proof() -> None:  # M1
    back = {event for (before, event), after in SOURCE.items() if before is not Custody.MINE and after is Custody.MINE}
    assert back == {Event.NOT_SAID, Event.REFUSED, Event.GONE}
    assert {after for (before, _), after in SOURCE.items() if before is Custody.THEIRS} == {Custody.THEIRS}


def test_destination_has_the_guest_only_once_it_is_handed_over() -> None:  # M1, M6
    assert {key for key, after in DESTINATION.items() if after is Custody.MINE} == {
        (Custody.THEIRS, Event.HANDOVER),
        (Custody.MINE, Event.LOST),
    }
    assert not any(before is Custody.NEVER for before, _ in DESTINATION)

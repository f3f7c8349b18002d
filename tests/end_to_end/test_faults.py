"""Something goes wrong at each place of each message of a migration.

The whole table takes long: ``DIRTYLOG_FAULTS=all``. Otherwise each message meets each fault somewhere in it, and one
with a payload some fault at each place, on the machine that is cheap; and each meets one fault on real ones.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from support.fault_table import EVERYTHING, ON_CONNECTIONS, Case, cases, each_fault, one_fault
from support.faults import FaultyMigration, MigrationFromKilled, MigrationToKilled
from support.places import Fault

from dirtylog.migration.protocol import Role

_PATIENCE: Final = (0.25, 1.0, 4.0)
"""Seconds that a side waits in vain; the later ones are for a busy host, where that may be before the fault."""
_KILLS_IN: Final = ("precopy", "shared", "postcopy")


def _on_connections() -> list[tuple[str, Case]]:
    kinds = ("patient", "unicorn", "kvm")
    if EVERYTHING:
        return [(kind, case) for kind in kinds for case in cases(ON_CONNECTIONS)]
    chosen = (each_fault(ON_CONNECTIONS), one_fault(ON_CONNECTIONS, 0), one_fault(ON_CONNECTIONS, 3))
    return [(kind, case) for kind, some in zip(kinds, chosen, strict=True) for case in some]


def _kills(victim: Role) -> list[tuple[str, Case]]:
    """Every second one on real machines. The victims take turns, where the one can be made to ask for pages."""
    everything = cases([Fault.KILL]) if EVERYTHING else one_fault([Fault.KILL], 0)
    asked = ("Request", "Page")
    some = [case for case in everything if case.way in _KILLS_IN]
    some = [case for case in some if victim is Role.DESTINATION or case.place.message not in asked]
    if EVERYTHING:
        return [(kind, case) for kind in ("patient", "kvm") for case in some]
    first = victim is Role.SOURCE
    return [(("patient", "kvm")[index % 2], case) for index, case in enumerate(some[first::2])]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def _host(request: pytest.FixtureRequest) -> None:
    """What the kind of machine needs."""
    if request.node.callspec.params["kind"] == "kvm":
        request.getfixturevalue("kvm")


@pytest.mark.parametrize(("kind", "case"), _on_connections(), ids=str)
def test_fault_costs_nothing_and_leaves_one_owner(kind: str, case: Case, tmp_path: Path) -> None:  # D1, M1, M2, M6, M8
    for patience in _PATIENCE:
        directory = tmp_path / str(patience)
        directory.mkdir()
        with ExitStack() as stack:
            migration = FaultyMigration(stack, kind, case, directory, patience)
            if migration.settle():
                migration.check(migration.operate())
                return
    pytest.fail(f"not within {patience} s, or never: {case}")


@pytest.mark.parametrize(("kind", "case"), _kills(Role.DESTINATION), ids=str)
def test_source_has_the_guest_when_the_destination_is_killed_anywhere(  # M1, M2
    kind: str, case: Case, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = MigrationToKilled(stack, kind, case, tmp_path, monkeypatch)
    migration.settle()
    migration.check()


@pytest.mark.parametrize(("kind", "case"), _kills(Role.SOURCE), ids=str)
def test_destination_has_the_guest_or_never_will_when_the_source_is_killed_anywhere(  # M1, M6
    kind: str, case: Case, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = MigrationFromKilled(stack, kind, case, tmp_path, monkeypatch)
    migration.settle()
    migration.check()

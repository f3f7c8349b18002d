"""Postcopy in the hands of an operator who has QMP and the command line, between processes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from support.dirtier_runs import MEMORY, Place
from support.places import Boundary, Fault, Step
from support.places import Place as At
from support.processes import Run, dirtylog
from support.relay import Relay
from support.waiting import wait_until

from dirtylog.control.qmp import QMPCommandError
from dirtylog.migration import parse_address
from dirtylog.migration.protocol import Role
from dirtylog.units import MIB

_TOTAL: Final = int(MEMORY.removesuffix("M")) * MIB


class Sides(NamedTuple):
    """A guest that runs at the destination and waits for memory that is stuck on its way."""

    source: Run
    destination: Run
    place: Place

    @property
    def statuses(self) -> list[str]:
        return [run.qmp.execute("query-migrate")["status"] for run in (self.source, self.destination)]


@pytest.fixture(params=["kvm", "unicorn"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sides]:
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    place = Place(tmp_path)
    front, back = (f"unix:{place.path(name)}" for name in ("front", "back"))
    stuck = Step(At(Role.SOURCE, "Pages", Boundary.FIRST_OF_PAYLOAD, since="Taken"), Fault.STALL)
    with ExitStack() as stack:
        source = stack.enter_context(place.source("--accel", request.param))
        destination = stack.enter_context(place.destination(back, "--accel", request.param))
        stack.enter_context(Relay(parse_address(front), parse_address(back), stuck))
        source.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        source.qmp.execute("migrate-set-parameters", downtime_limit=0)
        place.wait_for_round(source)
        source.qmp.execute("migrate", uri=front)
        source.qmp.execute("migrate-start-postcopy")
        wait_until(stuck.met.is_set, "memory was stuck")
        sides = Sides(source, destination, place)
        wait_until(lambda: sides.statuses == ["postcopy-active"] * 2, "the guest runs at the destination")
        yield sides


def _refused(run: Run, command: str, **arguments: object) -> str:
    with pytest.raises(QMPCommandError) as caught:
        run.qmp.execute(command, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_operator_pauses_recovers_and_resumes_and_the_guest_loses_nothing(
    sides: Sides, side: str
) -> None:  # D1, M1, M8
    source, destination, place = sides
    assert (source.state, destination.state) == ("finish-migrate", "running")
    info = destination.qmp.execute("query-migrate")
    assert 0 < info["x-remaining"] <= _TOTAL
    getattr(sides, side).qmp.execute("migrate-pause")
    wait_until(lambda: sides.statuses == ["postcopy-paused"] * 2, "both sides knew")
    for run in (source, destination):
        assert "connection" in run.qmp.execute("query-migrate")["error-desc"]
    assert "in the hands of a migration" in _refused(source, "cont")
    assert "a migration is under way" in _refused(source, "migrate", uri="unix:x")
    assert "has not arrived here yet" in _refused(destination, "migrate", uri="unix:x")
    assert "only postcopy can be paused" in _refused(source, "migrate-pause")
    assert source.state == "finish-migrate"

    again = f"unix:{place.path('again')}"
    with dirtylog("recover", place.path("destination.qmp"), again) as recover:
        assert recover.wait() == 0, recover.err
    with dirtylog("migrate", place.path("source.qmp"), again, "--resume") as migration:
        assert migration.wait() == 0, migration.err
    wait_until(lambda: sides.statuses == ["completed"] * 2, "all of memory came")
    assert (source.state, destination.state) == ("postmigrate", "running")
    _check_told(source, destination)
    place.check_runs_on(destination)


def _check_told(source: Run, destination: Run) -> None:
    """What both know about who waited."""
    ram = source.qmp.execute("query-migrate")["ram"]
    assert ram["remaining"] == 0
    assert ram["postcopy-bytes"] > 0
    info = destination.qmp.execute("query-migrate")
    assert info.keys() == {
        *("status", "postcopy-blocktime", "postcopy-vcpu-blocktime", "postcopy-latency"),
        *("x-postcopy-latency-median", "x-postcopy-latency-99", "x-postcopy-requests", "x-remaining"),
    }
    assert info["x-remaining"] == 0
    assert info["x-postcopy-requests"] > 0
    assert ram["postcopy-requests"] > 0
    assert info["postcopy-latency"] > 0
    assert 0 < info["x-postcopy-latency-median"] <= info["x-postcopy-latency-99"]
    assert info["postcopy-vcpu-blocktime"] == [info["postcopy-blocktime"]]  # the only one is all of them


def test_operator_gives_up_and_takes_the_guest_back(sides: Sides) -> None:  # M1
    source, destination, place = sides
    destination.qmp.execute("quit")
    assert destination.wait() == 0
    wait_until(lambda: source.qmp.execute("query-migrate")["status"] == "postcopy-paused", "the source knew")
    source.qmp.execute("migrate_cancel")
    wait_until(lambda: source.qmp.execute("query-migrate")["status"] == "failed", "it was given up")
    assert source.state == "postmigrate"
    source.qmp.execute("cont")
    place.check_runs_on(source)

"""Migration between processes whose guests are emulated, as on hosts without KVM."""

from pathlib import Path

import msgspec
import pytest
from support.dirtier_runs import Place
from support.processes import Run, dirtylog
from support.waiting import wait_until

_OPTIONS = ("--accel", "unicorn")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _migrate(place: Place, destination: Run) -> None:
    wait_until(lambda: "waiting for a guest" in destination.err, "the destination waits")
    uri = f"unix:{place.path('m')}"
    with dirtylog("migrate", place.path("source.qmp"), uri, "--verify", "--json") as migration:
        assert migration.wait() == 0, migration.err
        report = msgspec.json.decode(migration.out)
    assert report["status"] == "completed"
    assert len(report["x-digests"]["pc.ram"]) == 64


def test_emulated_guest_moves_to_another_process_and_runs_on(place: Place) -> None:  # D1, M1
    uri = f"unix:{place.path('m')}"
    with place.source(*_OPTIONS) as source, place.destination(uri, *_OPTIONS) as destination:
        place.wait_for_round(source)
        _migrate(place, destination)
        assert source.state == "postmigrate"
        place.check_memory(source)
        assert place.rounds(destination) >= place.rounds(source)
        place.check_runs_on(destination)
        assert source.err == ""
        assert source.out.startswith("AB")
        assert set(destination.out) == {"B"}


def test_emulated_guest_that_was_stopped_arrives_stopped(place: Place) -> None:
    uri = f"unix:{place.path('m')}"
    with place.source(*_OPTIONS) as source, place.destination(uri, *_OPTIONS) as destination:
        place.wait_for_round(source)
        source.qmp.execute("stop")
        rounds = place.rounds(source)
        _migrate(place, destination)
        assert destination.state == "paused"
        assert place.rounds(destination) == rounds
        place.check_memory(destination)
        destination.qmp.execute("cont")
        place.check_runs_on(destination)


def test_destination_under_kvm_refuses_an_emulated_guest(kvm: object, place: Place) -> None:
    uri = f"unix:{place.path('m')}"
    with place.source(*_OPTIONS) as source, place.destination(uri, "--accel", "kvm") as destination:
        place.wait_for_round(source)
        wait_until(lambda: "waiting for a guest" in destination.err, "the destination waits")
        with dirtylog("migrate", place.path("source.qmp"), uri) as migration:
            assert migration.wait() == 5
            assert "kind 'unicorn-x86-pc', this one of kind 'kvm-x86-pc'; use the same --accel on both" in migration.err
        place.check_runs_on(source)

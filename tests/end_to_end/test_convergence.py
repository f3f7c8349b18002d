"""Guests that dirty memory faster than it is sent: what is said of them, and what is done about them."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from support.dirtier_runs import Place
from support.processes import Run, dirtylog
from support.require import require
from support.waiting import wait_until

from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import Capability

pytestmark = pytest.mark.usefixtures("kvm")

TOO_SLOW: Final = ("--max-downtime", "100ms", "--bandwidth", "16M", "--compression", "none", "--delta-cache", "0")
"""The dirtier writes its 7 MiB in the time of each pass; a tenth of a second is enough for less than 2."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def _pair(place: Place, *options: str) -> Iterator[tuple[Run, Run, str]]:
    uri = f"unix:{place.path('m')}"
    with place.source(*options) as source, place.destination(uri) as destination:
        place.wait_for_round(source)
        wait_until(lambda: "\n" in destination.err, "the destination waits")
        yield source, destination, uri


def _query(run: Run) -> Any:
    return run.qmp.execute("query-migrate")


def test_guest_that_never_converges_is_called_so_within_three_passes(place: Place) -> None:
    with _pair(place) as (source, _, uri), dirtylog("migrate", place.path("source.qmp"), uri, *TOO_SLOW) as migration:
        wait_until(lambda: "never converge" in migration.out, "it was said that it does not converge")
        line = next(line for line in migration.out.splitlines() if "never converge" in line)
        said = re.search(r"pass (\d+) .* it will never converge as it is: it takes a downtime limit of \d.*", line)
        assert said is not None, line
        assert int(said[1]) <= 4  # the one that goes on
        verdict = _query(source)["x-verdict"]
        assert verdict["converges"] is False
        assert verdict["needed-limit"] > 0.1

        migration.signal(signal.SIGINT)
        assert migration.wait() == 130
        assert "the migration was cancelled, and it will never converge as it is: it takes" in migration.err
        place.check_runs_on(source)


def test_auto_converge_brings_it_to_an_end(place: Place) -> None:
    with _pair(place) as (source, destination, uri):
        # Between two slices of 10 ms it stands still for a second then, however fast its host is.
        source.qmp.execute("migrate-set-parameters", cpu_throttle_initial=99)
        options = (*TOO_SLOW, "--auto-converge", "--verify")
        with dirtylog("migrate", place.path("source.qmp"), uri, *options) as migration:
            assert migration.wait() == 0, migration.err
            assert re.search(r"highest throttle +99 %", migration.out)
        assert "cpu-throttle-percentage" not in _query(source)
        place.check_runs_on(destination)


def test_guest_runs_freely_after_its_destination_was_killed(place: Place) -> None:
    with _pair(place) as (source, destination, uri):
        options = (*TOO_SLOW, "--auto-converge")
        with dirtylog("migrate", place.path("source.qmp"), uri, *options) as migration:
            wait_until(lambda: "cpu-throttle-percentage" in _query(source), "the guest was throttled")
            destination.kill()
            assert migration.wait() == 5
        assert "cpu-throttle-percentage" not in _query(source)
        place.check_runs_on(source)


def test_dirty_limit_holds_as_long_as_the_migration(place: Place, kvm: KVM) -> None:
    require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")
    with _pair(place, "--dirty-log", "ring", "--dirty-ring-size", "1024") as (source, _, uri):
        # Whether it converges depends on the host: see docs/convergence.md.
        options = (*TOO_SLOW, "--max-downtime", "1ms", "--dirty-limit", "1M")
        source.qmp.execute("migrate-set-parameters", x_vcpu_dirty_limit_period=100)
        with dirtylog("migrate", place.path("source.qmp"), uri, *options) as migration:
            seen: list[Any] = []

            def limited() -> bool:
                seen.append(_query(source) or {"status": "none"})
                waits = seen[-1].get("dirty-limit-throttle-time-per-round", 0)
                return bool(waits) or seen[-1]["status"] == "completed"

            wait_until(limited, "the vCPU was limited")
            if seen[-1]["status"] == "active":
                assert seen[-1]["dirty-limit-ring-full-time"] > 0
                assert source.qmp.execute("query-vcpu-dirty-limit")[0]["limit-rate"] == 1
                migration.signal(signal.SIGINT)
            assert migration.wait() in (0, 130)
        assert source.qmp.execute("query-vcpu-dirty-limit") == []
        if source.state == "running":
            place.check_runs_on(source)


def test_dirty_limit_without_rings_is_refused_and_the_guest_runs_on(place: Place) -> None:
    with _pair(place, "--dirty-log", "legacy") as (source, _, uri):
        with dirtylog("migrate", place.path("source.qmp"), uri, "--dirty-limit", "1M") as migration:
            assert migration.wait() == 5
            assert "the dirty log 'legacy' does not tell vCPUs apart" in migration.err
        assert _query(source) == {}
        place.check_runs_on(source)

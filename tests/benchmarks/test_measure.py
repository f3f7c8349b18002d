from pathlib import Path
from typing import Any

import pytest

from benchmarks.support import measure as module
from benchmarks.support.bare import COPIES, SCHEMES
from benchmarks.support.guest import Files, Guest, started
from benchmarks.support.measure import Outcome, Setup, measure
from benchmarks.support.peers import Dirtylog
from dirtylog.control.commands import PassInfo
from dirtylog.errors import GuestError, HostError
from dirtylog.linux.kvm import KVM
from dirtylog.units import MIB


class SlowDirtylog(Dirtylog):
    """Takes seconds for the guests of these tests."""

    def prepare(self, source: Guest, limit: float) -> None:
        super().prepare(source, limit)
        source.qmp.execute("migrate-set-parameters", max_bandwidth=MIB)


class TaciturnDirtylog(Dirtylog):
    """Tells nothing of single passes, as QEMU does."""

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        return []


def setup(*, scheme: str = "unix", timeout: float = 60.0) -> Setup:
    return Setup(memory=32 * MIB, first=1 * MIB, last=8 * MIB, limit=0.3, scheme=scheme, timeout=timeout)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_migration_is_measured(kvm: KVM, scheme: str) -> None:
    run = measure(Dirtylog(), setup(scheme=scheme))
    assert run.outcome is Outcome.COMPLETED
    assert (run.peer, run.first, run.last) == ("dirtylog", 1 * MIB, 8 * MIB)
    assert run.downtime is not None
    assert run.stopped is not None
    assert 0 < run.downtime < run.total < run.wall
    assert 0 < run.stopped < run.wall
    assert run.pages >= 7 * MIB // 4096
    assert run.bytes > 7 * MIB
    assert run.passes >= 2
    assert run.steal >= 0
    for side in (run.source, run.destination):
        assert side is not None
        assert side.memory.guest is not None
        assert 7 * MIB <= side.memory.guest <= 32 * MIB
        assert side.beyond_guest is not None
        assert 0 < side.beyond_guest < 200 * MIB


@pytest.mark.parametrize("scheme", SCHEMES)
def test_last_pass_is_copied_by_hand_afterwards(kvm: KVM, scheme: str) -> None:
    run = measure(Dirtylog(), setup(scheme=scheme))
    assert [one.number for one in run.x_passes] == list(range(1, run.passes + 1))
    assert sum(one.bytes for one in run.x_passes) == run.bytes
    assert run.bare is not None
    assert run.bare.size == run.x_passes[-1].bytes
    assert len(run.bare.seconds) == COPIES


def test_estimate_is_that_of_the_decision_to_stop_the_guest(kvm: KVM) -> None:
    run = measure(Dirtylog(), setup())
    assert run.expected_downtime is not None
    assert run.expected_downtime == run.x_passes[-2].expected_downtime
    assert 0 < run.expected_downtime <= 0.3
    assert run.x_passes[-1].expected_downtime is None


def test_peer_that_tells_nothing_of_passes_has_neither_estimate_nor_copies(kvm: KVM) -> None:
    run = measure(TaciturnDirtylog(), setup())
    assert run.outcome is Outcome.COMPLETED
    assert (run.x_passes, run.expected_downtime, run.bare) == ([], None, None)


def test_migration_that_takes_too_long_is_cancelled(kvm: KVM) -> None:
    run = measure(SlowDirtylog(), setup(timeout=0.2))
    assert run.outcome is Outcome.DID_NOT_CONVERGE
    assert 0.2 <= run.wall < 15
    assert 0 < run.bytes < 7 * MIB
    assert (run.downtime, run.stopped, run.destination) == (None, None, None)
    assert (run.expected_downtime, run.bare) == (None, None)
    assert run.x_passes


def test_damaged_guest_is_an_error(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_pages", lambda pages, rounds: f"{len(pages)} pages, {rounds > 2}")
    with pytest.raises(GuestError, match=f"damaged by its migration: {7 * MIB // 4096} pages, True"):
        measure(Dirtylog(), setup())


def test_process_that_ends_early_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo no such device >&2; exit 3"]
    with (
        pytest.raises(HostError, match="sh ended with status 3: no such device"),
        started(command, Files(tmp_path, "x")),
    ):
        raise AssertionError("it cannot have started")

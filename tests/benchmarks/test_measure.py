from pathlib import Path

import pytest

from benchmarks.support import measure as module
from benchmarks.support.guest import Files, Guest, started
from benchmarks.support.measure import Outcome, Setup, measure
from benchmarks.support.peers import Dirtylog
from dirtylog.errors import GuestError, HostError
from dirtylog.linux.kvm import KVM
from dirtylog.units import MIB


class SlowDirtylog(Dirtylog):
    """Takes seconds for the guests of these tests."""

    def prepare(self, source: Guest, limit: float) -> None:
        super().prepare(source, limit)
        source.qmp.execute("migrate-set-parameters", max_bandwidth=MIB)


def setup(*, scheme: str = "unix", timeout: float = 60.0) -> Setup:
    return Setup(memory=32 * MIB, first=1 * MIB, last=8 * MIB, limit=0.3, scheme=scheme, timeout=timeout)


@pytest.mark.parametrize("scheme", module.SCHEMES)
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
    for side in (run.source, run.destination):
        assert side is not None
        assert side.memory.guest is not None
        assert 7 * MIB <= side.memory.guest <= 32 * MIB
        assert side.beyond_guest is not None
        assert 0 < side.beyond_guest < 200 * MIB


def test_migration_that_takes_too_long_is_cancelled(kvm: KVM) -> None:
    run = measure(SlowDirtylog(), setup(timeout=0.2))
    assert run.outcome is Outcome.DID_NOT_CONVERGE
    assert 0.2 <= run.wall < 15
    assert 0 < run.bytes < 7 * MIB
    assert (run.downtime, run.stopped, run.destination) == (None, None, None)


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

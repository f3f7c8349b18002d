from pathlib import Path
from typing import Any

import pytest
from support.benchmark_runs import require_assembler

from benchmarks.support.bare import COPIES, SCHEMES
from benchmarks.support.guest import Files, Guest, started
from benchmarks.support.measure import Outcome, Setup, measure
from benchmarks.support.peers import Dirtylog, Terms
from benchmarks.support.pulses import ARRIVAL_SECONDS
from benchmarks.support.workloads import Idle, Pulses, RandomWrites, Rounds, Workload
from dirtylog.control.commands import PassInfo
from dirtylog.errors import GuestError, HostError
from dirtylog.guests import dirtier
from dirtylog.linux.kvm import KVM
from dirtylog.units import MIB


class SlowDirtylog(Dirtylog):
    """Takes seconds for the guests of these tests."""

    def prepare(self, source: Guest, destination: Guest, terms: Terms) -> None:
        super().prepare(source, destination, terms)
        source.qmp.execute("migrate-set-parameters", max_bandwidth=MIB)


class TaciturnDirtylog(Dirtylog):
    """Tells nothing of single passes, as QEMU does."""

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        return []


def setup(*, scheme: str = "unix", timeout: float = 60.0) -> Setup:
    return Setup(32 * MIB, Rounds(1 * MIB, 8 * MIB), Terms(limit=0.3), scheme, timeout)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_migration_is_measured(kvm: KVM, scheme: str) -> None:
    run = measure(Dirtylog(), setup(scheme=scheme))
    assert run.outcome is Outcome.COMPLETED
    assert run.peer == "dirtylog"
    assert run.setup == "guest writes 1..8 MiB; 32.0 MiB, limit 300.0 ms, 1 channel"
    assert run.downtime is not None
    assert run.stopped is not None
    assert 0 < run.downtime < run.total < run.wall
    assert 0 < run.stopped < run.wall
    assert run.pages >= 7 * MIB // 4096
    assert run.bytes > 7 * MIB
    assert run.passes >= 2
    assert run.steal >= 0
    assert run.pace is not None
    assert run.pace > 0
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


@pytest.mark.parametrize("workload", [Idle(4 * MIB), RandomWrites(1 * MIB, 3 * MIB, 4096e3, 5 * MIB)], ids=str)
def test_guest_with_contents_is_measured(kvm: KVM, workload: Workload) -> None:
    run = measure(Dirtylog(), Setup(32 * MIB, workload, Terms(limit=0.3)))
    assert run.outcome is Outcome.COMPLETED
    assert run.pages >= workload.contents // 4096
    assert (run.bare_whole is not None, run.bare is not None) == (workload.still, not workload.still)


def test_silence_of_a_guest_that_sends_characters_is_measured(kvm: KVM) -> None:
    require_assembler()
    run = measure(Dirtylog(), Setup(32 * MIB, Pulses(1 * MIB, 8 * MIB), Terms(limit=0.3)))
    assert run.outcome is Outcome.COMPLETED
    assert run.silence is not None
    assert abs(run.silence) < ARRIVAL_SECONDS


def test_guest_that_sends_nothing_has_no_silence(kvm: KVM) -> None:
    assert measure(Dirtylog(), setup()).silence is None


def test_speed_of_a_limited_still_guest_is_compared_with_its_limit_and_with_no_copies(kvm: KVM) -> None:
    run = measure(Dirtylog(), Setup(32 * MIB, Idle(4 * MIB), Terms(0.3, bandwidth=10 * MIB)))
    assert run.setup.endswith("limit 300.0 ms, 1 channel, at most 10.0 MiB/s")
    assert run.downtime is not None
    assert run.share_of_limit == run.bytes / (run.total - run.downtime) / (10 * MIB)
    assert run.share_of_limit < 1.25
    assert (run.bare, run.bare_whole) == (None, None)


@pytest.mark.parametrize(
    ("workload", "bandwidth"), [(Idle(4 * MIB), 0), (Rounds(MIB, 3 * MIB), 40 * MIB)], ids=["unlimited", "not still"]
)
def test_speed_of_another_guest_is_not_compared_with_a_limit(kvm: KVM, workload: Workload, bandwidth: int) -> None:
    assert measure(Dirtylog(), Setup(32 * MIB, workload, Terms(0.3, bandwidth=bandwidth))).share_of_limit is None


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_used(kvm: KVM, channels: int) -> None:
    run = measure(Dirtylog(), Setup(32 * MIB, Rounds(1 * MIB, 8 * MIB), Terms(0.3, channels)))
    assert run.outcome is Outcome.COMPLETED
    assert run.setup.endswith(f"{channels} channels")


@pytest.mark.parametrize("options", [((), 64 * 4096), (("--dirty-log", "legacy"), 0)], ids=["split", "at sync"])
def test_guest_that_was_watched_has_a_forecast(kvm: KVM, options: tuple[tuple[str, ...], int]) -> None:
    workload, terms = RandomWrites(1 * MIB, 3 * MIB, 4096e2, 5 * MIB), Terms(0.3, bandwidth=20 * MIB)
    run = measure(Dirtylog("named", *options), Setup(32 * MIB, workload, terms, watch=0.3))
    assert run.peer == "named"
    assert run.predicted is not None
    assert (run.predicted.bandwidth, run.predicted.clear_chunk) == (20 * MIB, options[1] or None)
    assert run.predicted.converges
    assert 0.2 < run.predicted.total < 1


def test_migration_that_takes_too_long_is_cancelled(kvm: KVM) -> None:
    run = measure(SlowDirtylog(), setup(timeout=0.2))
    assert run.outcome is Outcome.DID_NOT_CONVERGE
    assert 0.2 <= run.wall < 15
    assert 0 < run.bytes < 8 * MIB  # a batch, perhaps, of all that it writes; not a second pass
    assert (run.downtime, run.stopped, run.destination) == (None, None, None)
    assert (run.expected_downtime, run.bare) == (None, None)
    assert run.x_passes


def test_damaged_guest_is_an_error(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirtier, "check_pages", lambda pages, rounds: f"{len(pages)} pages, {rounds > 2}")
    with pytest.raises(GuestError, match=f"damaged by its migration: {7 * MIB // 4096} pages, True"):
        measure(Dirtylog(), setup())


def test_process_that_ends_early_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo no such device >&2; exit 3"]
    with (
        pytest.raises(HostError, match="sh ended with status 3: no such device"),
        started(command, Files(tmp_path, "x")),
    ):
        raise AssertionError("it cannot have started")

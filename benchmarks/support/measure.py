"""One migration, measured."""

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, structs

from benchmarks.support.bare import BareCopies, copy
from benchmarks.support.forecast import Observation, observe, scenario_of
from benchmarks.support.guest import Files, Guest, started
from benchmarks.support.peers import Launch, Peer, Terms
from benchmarks.support.pulses import listening, silence
from benchmarks.support.usage import CPUTime, ResidentMemory, stolen, thread_times
from benchmarks.support.workloads import Workload, write_files
from dirtylog.cli.prediction_report import PredictionInfo, info
from dirtylog.control.commands import PassInfo
from dirtylog.control.qmp import Event
from dirtylog.errors import GuestError, PeerError, ProtocolError
from dirtylog.migration.prediction import predict
from dirtylog.units import format_duration, format_rate, format_size

_CANCEL_SECONDS: Final = 15.0
_ARRIVAL_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What is migrated, and how. Sizes in bytes, times in seconds.

    Attributes:
        memory: RAM of the guest.
        workload: what it does.
        terms: how it is migrated.
        scheme: one of `bare.SCHEMES`.
        timeout: a migration that takes longer counts as one that does not converge.
        watch: for how long the guest is watched before, for a forecast; 0 for none.
    """

    memory: int
    workload: Workload
    terms: Terms
    scheme: str = "unix"
    timeout: float = 60.0
    watch: float = 0.0

    def __str__(self) -> str:
        """For people."""
        channels = f"{self.terms.channels} channel{'s' if self.terms.channels > 1 else ''}"
        limits = f"limit {format_duration(self.terms.limit)}, {channels}"
        if self.terms.bandwidth:
            limits += f", at most {format_rate(self.terms.bandwidth)}"
        return f"guest {self.workload}; {format_size(self.memory)}, {limits}"


class Outcome(Enum):
    """How a migration ended; any other end is an error."""

    COMPLETED = "completed"
    DID_NOT_CONVERGE = "did not converge"


class Side(Struct, frozen=True):
    """What one process used.

    Attributes:
        cpu: during the migration, with the vCPU's own.
        memory: right after it.
        beyond_guest: the most memory besides the guest's RAM.
    """

    cpu: CPUTime
    memory: ResidentMemory
    beyond_guest: int | None


class Run(Struct, frozen=True):
    """One migration. Times in seconds; None where the guest did not move.

    Attributes:
        peer: whose it was.
        setup: what was migrated, and how.
        outcome: how it ended.
        load: the host's load average over the last minute, before.
        steal: CPU time that the host lost during the migration, see `stolen`.
        wall: from the command until source and destination both had said that it is done.
        total: the peer's total-time.
        downtime: as the peer has it.
        stopped: from the source's STOP event to the destination's RESUME event.
        expected_downtime: as the peer had estimated it when it decided to stop the guest, if it tells that afterwards.
        bytes: sent.
        pages: sent with contents.
        zero_pages: sent without.
        passes: over dirty memory, the one with the guest stopped included.
        pace: rounds or writes that the guest made a second, from right before the migration to right after it.
        source: what the source used.
        destination: what the destination used.
        x_passes: what the peer tells of each pass, if anything; the last one is that with the guest stopped.
        bare: the bytes of that pass copied by hand afterwards, if the peer tells how many they were, and it took some.
        bare_whole: all the bytes copied by hand, of a guest that wrote nothing.
        predicted: what was to be expected from watching the guest, if it was watched.
        silence: from the guest's last character on the source to its first on the destination, if it sends some.
        share_of_limit: speed while the guest ran, divided by the bandwidth it was limited to; of a guest that wrote
            nothing, if it was limited.
    """

    peer: str
    setup: str
    outcome: Outcome
    load: float
    steal: float
    wall: float
    total: float
    downtime: float | None
    stopped: float | None
    expected_downtime: float | None
    bytes: int
    pages: int
    zero_pages: int
    passes: int
    pace: float | None
    source: Side
    destination: Side | None
    x_passes: list[PassInfo]
    bare: BareCopies | None = None
    bare_whole: BareCopies | None = None
    predicted: PredictionInfo | None = None
    silence: float | None = None
    share_of_limit: float | None = None


def watch_alone(peer: Peer, setup: Setup) -> Observation:
    """Watch a guest that is not migrated afterwards, and that holds its pace whatever else the host does."""
    with tempfile.TemporaryDirectory(prefix="dirtylog-bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        boot = write_files(setup.workload, directory)
        files = Files(directory, "source")
        source = stack.enter_context(started(peer.command(Launch(boot, setup.memory), files), files))
        setup.workload.ready(source)
        boot.discard()
        return replace(observe(source, setup.watch), thread=None)


def measure(peer: Peer, setup: Setup, observed: Observation | None = None) -> Run:
    """Migrate a running guest between two new processes, and check that it arrived whole.

    Args:
        peer: whose it is.
        setup: what is migrated, and how.
        observed: what such a guest was seen to write, for a forecast. If there is none, and the setup wants one, this
            one is watched before.

    Raises:
        DirtylogError: the migration failed, or the guest was damaged.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dirtylog-bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        boot = write_files(setup.workload, directory)
        uri = f"unix:{directory / 'migration'}" if setup.scheme == "unix" else "tcp:127.0.0.1:0"
        files = Files(directory, "source"), Files(directory, "destination")
        heard = [stack.enter_context(listening(each.serial)) for each in files] if setup.workload.pulses else []
        source = stack.enter_context(started(peer.command(Launch(boot, setup.memory), files[0]), files[0]))
        destination = stack.enter_context(started(peer.command(Launch(boot, setup.memory, uri), files[1]), files[1]))
        peer.prepare(source, destination, setup.terms)
        uri = peer.address(destination, uri)
        before = setup.workload.ready(source)
        boot.discard()
        if setup.watch and peer.watchable and observed is None:
            observed = observe(source, setup.watch)
        times = thread_times(source.pid)
        run = _migrate(peer, setup, source, destination, uri, load)
        if observed is not None and run.x_passes:
            speed = observed.guest_speed(times, thread_times(source.pid), run.wall - (run.stopped or 0.0))
            scenario = scenario_of(setup.terms, run.x_passes, peer.clear_chunk, speed)
            run = structs.replace(
                run, predicted=info(scenario, predict(observed.workload, scenario, give_up=setup.timeout))
            )
        if run.outcome is Outcome.COMPLETED:
            run = structs.replace(run, silence=silence(*heard) if heard else None)
            _check(peer, setup, source, destination, before)
    return _with_bare_copies(run, setup) if run.outcome is Outcome.COMPLETED else run


def _with_bare_copies(run: Run, setup: Setup) -> Run:
    if setup.terms.bandwidth:
        return run
    if setup.workload.still:
        return structs.replace(run, bare_whole=copy(run.bytes, setup.scheme))
    return structs.replace(run, bare=copy(run.x_passes[-1].bytes, setup.scheme)) if run.x_passes else run


@dataclass(frozen=True, slots=True)
class _Before:
    """What one process had used before the migration."""

    pid: int
    guest_size: int
    memory: ResidentMemory
    cpu: CPUTime

    @classmethod
    def of(cls, guest: Guest, guest_size: int) -> "_Before":
        return cls(guest.pid, guest_size, ResidentMemory.of(guest.pid, guest_size), CPUTime.of(guest.pid))

    def until_now(self) -> Side:
        cpu = CPUTime.of(self.pid).since(self.cpu)
        memory = ResidentMemory.of(self.pid, self.guest_size)
        return Side(cpu, memory, memory.beyond_guest(self.memory))


@dataclass(frozen=True, slots=True)
class _Watched:
    """What was seen of a migration from outside: see `Run`."""

    load: float
    steal: float
    wall: float
    stopped: float | None
    source: Side
    destination: Side | None
    pace: float | None


def _migrate(peer: Peer, setup: Setup, source: Guest, destination: Guest, uri: str, load: float) -> Run:
    for guest in (source, destination):
        guest.qmp.events()  # what happened before is of no interest
    made, looked = source.rounds(), time.monotonic()
    before, stolen_before = tuple(_Before.of(guest, setup.memory) for guest in (source, destination)), stolen()
    began = time.monotonic()
    source.qmp.execute("migrate", uri=uri)
    end = _follow(source, began + setup.timeout)
    arrived = end.unfinished is None
    resume = destination.qmp.wait_event("RESUME", _ARRIVAL_SECONDS) if arrived else None
    wall = time.monotonic() - began
    watched = _Watched(
        load=load,
        steal=stolen() - stolen_before,
        wall=wall,
        stopped=seconds_of(resume) - seconds_of(end.stop) if end.stop is not None and resume is not None else None,
        source=before[0].until_now(),
        destination=before[1].until_now() if arrived else None,
        pace=_pace(made, (destination if arrived else source).rounds(), looked),
    )
    return _run(peer, setup, watched, end.unfinished or final_info(source), arrived=arrived)


def _run(peer: Peer, setup: Setup, watched: _Watched, info: dict[str, Any], *, arrived: bool) -> Run:
    passes = peer.each_pass(info)
    total, downtime = info["total-time"] / 1e3, peer.downtime(info) if arrived else None
    return Run(
        peer=peer.name,
        setup=str(setup),
        outcome=Outcome.COMPLETED if arrived else Outcome.DID_NOT_CONVERGE,
        load=watched.load,
        steal=watched.steal,
        wall=watched.wall,
        total=total,
        downtime=downtime,
        stopped=watched.stopped,
        expected_downtime=_expected_downtime(passes) if arrived else None,
        bytes=info["ram"]["transferred"],
        pages=info["ram"]["normal"],
        zero_pages=info["ram"]["duplicate"],
        passes=info["ram"]["dirty-sync-count"],
        pace=watched.pace,
        source=watched.source,
        destination=watched.destination,
        x_passes=passes,
        share_of_limit=_share_of_limit(setup, info["ram"]["transferred"], total, downtime),
    )


def _share_of_limit(setup: Setup, sent: int, total: float, downtime: float | None) -> float | None:
    if not setup.workload.still or not setup.terms.bandwidth or downtime is None:
        return None
    return sent / (total - downtime) / setup.terms.bandwidth


def _pace(before: int | None, after: int | None, since: float) -> float | None:
    return None if before is None or after is None else (after - before) / (time.monotonic() - since)


def _expected_downtime(passes: Sequence[PassInfo]) -> float | None:
    """The estimate after the last pass but one made the peer stop the guest; the last pass has none."""
    return passes[-2].expected_downtime if len(passes) > 1 else None


@dataclass(frozen=True, slots=True)
class _End:
    """How a migration ended.

    Attributes:
        stop: when the source's guest was last stopped.
        unfinished: of one that was cancelled here, query-migrate's result right before; afterwards QEMU forgets it.
    """

    stop: Event | None
    unfinished: dict[str, Any] | None


def _follow(source: Guest, deadline: float) -> _End:
    """Wait for the end; cancel at the deadline."""
    qmp, stop, unfinished = source.qmp, None, None
    while True:
        event = qmp.next_event(max(0.0, deadline - time.monotonic()))
        if event is None:
            if unfinished is not None:
                raise PeerError(f"the migration was not cancelled within {_CANCEL_SECONDS:.0f} s")
            unfinished = qmp.execute("query-migrate")
            qmp.execute("migrate_cancel")
            deadline = time.monotonic() + _CANCEL_SECONDS
        elif event.event == "STOP":
            stop = event
        elif event.event == "MIGRATION":
            status = status_of(event)
            if status == "completed":  # perhaps in spite of the cancel
                return _End(stop, None)
            if status == "cancelled" and unfinished is not None:
                return _End(stop, unfinished)
            if status in ("failed", "cancelled"):
                reason = final_info(source).get("error-desc") or source.complaints() or "it did not say why"
                raise PeerError(f"the migration ended as {status!r}: {reason}")


def final_info(source: Guest) -> dict[str, Any]:
    """What query-migrate says of an ended migration. QEMU sends the event a moment before it knows the times."""

    def complete() -> dict[str, Any] | None:
        info: dict[str, Any] = source.qmp.execute("query-migrate")
        return None if info["status"] == "completed" and not info["total-time"] else info

    return source.until(complete, _ARRIVAL_SECONDS, "say how long its migration took")


def status_of(event: Event) -> str:
    """What a MIGRATION event tells.

    Raises:
        ProtocolError: nothing.
    """
    if isinstance(event.data, dict) and isinstance(event.data.get("status"), str):
        return str(event.data["status"])
    raise ProtocolError("the peer sent a MIGRATION event without a status")


def seconds_of(event: Event) -> float:
    """When it happened, by the clock of all."""
    return event.timestamp.seconds + event.timestamp.microseconds / 1e6


def _check(peer: Peer, setup: Setup, source: Guest, destination: Guest, before: int) -> None:
    """Whether the guest is whole where it went, goes on there, and does not run where it was."""
    if source.qmp.execute("query-status")["running"]:
        raise GuestError(f"{peer.name}'s guest still runs on the source after it was migrated")
    wrong = setup.workload.check(destination, before)
    if wrong is not None:
        raise GuestError(f"{peer.name}'s guest was damaged by its migration: {wrong}")

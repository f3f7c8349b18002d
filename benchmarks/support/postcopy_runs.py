"""One migration whose guest is handed over before its memory, measured."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from msgspec import Struct

from benchmarks.support.guest import Files, Guest, started
from benchmarks.support.measure import final_info, seconds_of, status_of
from benchmarks.support.peers import QEMU, Dirtylog, Launch, Peer, Terms, switch_on
from benchmarks.support.probes import Probes, long_writes, noted
from benchmarks.support.workloads import write_files
from dirtylog.errors import GuestError, PeerError
from dirtylog.units import PAGE_SIZE, format_size

_SECONDS: Final = 60.0


class Postcopying(Peer, Protocol):
    """A peer that can."""

    def prepare_postcopy(self, source: Guest, destination: Guest) -> None:
        """Set both sides up."""

    def blocktime(self, destination: Guest) -> float:
        """Seconds that all vCPUs waited for memory."""


class PostcopyQEMU(QEMU):
    """With a channel of its own for what the guest waits for."""

    def prepare_postcopy(self, source: Guest, destination: Guest) -> None:
        """See `Postcopying`."""
        for guest in (source, destination):
            switch_on(guest, "postcopy-ram", "postcopy-preempt", "postcopy-blocktime")

    def blocktime(self, destination: Guest) -> float:
        """Whole milliseconds."""
        return float(destination.qmp.execute("query-migrate")["postcopy-blocktime"]) / 1e3


class PostcopyDirtylog(Dirtylog):
    """The destination goes by what the source tells it."""

    def prepare_postcopy(self, source: Guest, destination: Guest) -> None:
        """See `Postcopying`."""
        del destination
        switch_on(source, "postcopy-ram")

    def blocktime(self, destination: Guest) -> float:
        """Whole milliseconds."""
        return float(destination.qmp.execute("query-migrate")["postcopy-blocktime"]) / 1e3


class PostcopySetup(Struct, frozen=True):
    """What is migrated: bytes of RAM, and the range that is written."""

    memory: int
    first: int
    last: int

    def __str__(self) -> str:
        """For people."""
        return f"guest {Probes(self.first, self.last)}; {format_size(self.memory)}, handed over at once"


class PostcopyRun(Struct, frozen=True):
    """One migration. Times in seconds.

    Attributes:
        peer: whose it was.
        setup: what was migrated.
        total: the peer's total-time.
        stopped: from the source's STOP event to the destination's RESUME event.
        requests: pages that the guest waited for, as the source counted them.
        latency: what the guest's longest writes took, as many as there were requests: the median.
        latency_99: what 99 % of them did not exceed.
        blocktime: that all vCPUs waited, as the destination has it.
        rate: pages a second that came after the handover, until all had.
        bytes: sent.
    """

    peer: str
    setup: str
    total: float
    stopped: float
    requests: int
    latency: float
    latency_99: float
    blocktime: float
    rate: float
    bytes: int


def measure_postcopy(peer: Postcopying, setup: PostcopySetup) -> PostcopyRun:
    """Migrate a running guest between two new processes, and hand it over as soon as memory is being sent.

    Raises:
        DirtylogError: the migration failed, or the guest was damaged.
    """
    workload = Probes(setup.first, setup.last)
    with tempfile.TemporaryDirectory(prefix="dirtylog-bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        boot, uri = write_files(workload, directory), f"unix:{directory / 'migration'}"
        files = Files(directory, "source"), Files(directory, "destination")
        source = stack.enter_context(started(peer.command(Launch(boot, setup.memory), files[0]), files[0]))
        destination = stack.enter_context(started(peer.command(Launch(boot, setup.memory, uri), files[1]), files[1]))
        peer.prepare(source, destination, Terms(limit=0.001))
        peer.prepare_postcopy(source, destination)
        uri = peer.address(destination, uri)
        source.reach(2 * (setup.last - setup.first) // PAGE_SIZE)
        before = workload.ready(source)
        run = _migrate(peer, setup, source, destination, uri)
        wrong = workload.check(destination, before)
        if wrong is not None:
            raise GuestError(f"{peer.name}'s guest was damaged by its migration: {wrong}")
        return run


def _migrate(peer: Postcopying, setup: PostcopySetup, source: Guest, destination: Guest, uri: str) -> PostcopyRun:
    for guest in (source, destination):
        guest.qmp.events()
    source.qmp.execute("migrate", uri=uri)
    stopped = _hand_over(source)
    resumed = seconds_of(destination.qmp.wait_event("RESUME", _SECONDS))
    at_handover = _sent(source.qmp.execute("query-migrate"))
    began = time.monotonic()
    _wait_for(source, "completed")
    seconds = time.monotonic() - began
    info = final_info(source)
    requests = info["ram"]["postcopy-requests"]
    latencies = np.sort(long_writes(destination, noted(source)))[-requests:]
    return PostcopyRun(
        peer=peer.name,
        setup=str(setup),
        total=info["total-time"] / 1e3,
        stopped=resumed - stopped,
        requests=requests,
        latency=float(np.median(latencies)),
        latency_99=float(np.quantile(latencies, 0.99)),
        blocktime=peer.blocktime(destination),
        rate=(_sent(info) - at_handover) / seconds,
        bytes=info["ram"]["transferred"],
    )


def _sent(info: dict[str, Any]) -> int:
    return int(info["ram"]["normal"])


def _hand_over(source: Guest) -> float:
    """Have it handed over once memory is sent; when its guest stood still."""
    _wait_for(source, "active")
    source.qmp.execute("migrate-start-postcopy")
    return seconds_of(source.qmp.wait_event("STOP", _SECONDS))


def _wait_for(source: Guest, wanted: str) -> None:
    while (status := status_of(source.qmp.wait_event("MIGRATION", _SECONDS))) != wanted:
        if status in ("failed", "cancelled", "postcopy-paused"):
            reason = source.qmp.execute("query-migrate").get("error-desc") or source.complaints()
            raise PeerError(f"the migration ended as {status!r}: {reason or 'it did not say why'}")

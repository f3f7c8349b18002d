"""QEMU's commands and events for one machine.

Names, arguments and results are those of QEMU's QAPI schema (qapi/run-state.json, migration.json, machine.json). What
QEMU does not have starts with ``x-``.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final

from msgspec import UNSET, Meta, Struct, UnsetType

from dirtylog.control.controller import Controller, ShutdownCause
from dirtylog.control.qmp import Arguments, CommandRegistry, NoArguments, QMPServer
from dirtylog.control.watch_commands import WatchCommands
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import PCMachine, RunState
from dirtylog.memory import AddressSpace
from dirtylog.migration import OutgoingMigration, PassStatistics, Status
from dirtylog.units import MIB, PAGE_SIZE

_MILLISECONDS: Final = 1e3
_MICROSECONDS: Final = 1e6
_MEGABIT: Final = 1e6


class MigrateArguments(Arguments, frozen=True):
    """Arguments of migrate. ``detach`` has no meaning in QMP, and is taken as QEMU takes it."""

    uri: str
    detach: bool | None = None


class MigrationParameters(Arguments, frozen=True, omit_defaults=True):
    """Arguments of migrate-set-parameters, and result of query-migrate-parameters: milliseconds, bytes (a second).

    `Parameters` has the bounds; those here are QEMU's, and keep what is no reasonable number out of arithmetic.
    """

    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] | UnsetType = UNSET
    max_bandwidth: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    x_clear_chunk: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    x_verify: bool | UnsetType = UNSET


class PmemsaveArguments(Arguments, frozen=True):
    """Arguments of pmemsave."""

    val: Annotated[int, Meta(ge=0)]
    size: Annotated[int, Meta(ge=0)]
    filename: str


class StatusInfo(Struct, frozen=True):
    """Result of query-status."""

    running: bool
    status: str


class RAMInfo(Struct, frozen=True, rename="kebab"):
    """MigrationStats: bytes, pages where the name says so, rates a second."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    page_size: int
    pages_per_second: int


class PassInfo(Struct, frozen=True, rename="kebab"):
    """One pass, for x-passes: see `migration.PassStatistics`. Times in seconds; expected-downtime may be unknown."""

    number: int
    pages: int
    zero_pages: int
    bytes: int
    seconds: float
    starved: float
    dirtied: int
    bandwidth: float
    expected_downtime: float | None


class MigrationInfo(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """Result of query-migrate if there was a migration. Times in milliseconds where the name does not say else.

    x-passes has the last `MOST_PASSES` passes, in order; x-digests is there after a migration that compared memory.
    """

    status: str
    total_time: int
    setup_time: int
    ram: RAMInfo
    expected_downtime: int | None = None
    downtime: int | None = None
    error_desc: str | None = None
    x_passes: list[PassInfo]
    x_downtime_us: int | None = None
    x_verify_us: int | None = None
    x_digests: dict[str, str] | None = None


class Commands:
    """The commands of one controller's machine."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._machine = controller.machine

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        registry.add("query-status", NoArguments, self._query_status)
        registry.add("stop", NoArguments, lambda _: self._machine.pause())
        registry.add("cont", NoArguments, lambda _: self._machine.resume())
        registry.add("quit", NoArguments, lambda _: None, after_reply=self._quit)
        registry.add("migrate", MigrateArguments, lambda arguments: self._controller.migrate(arguments.uri))
        registry.add("migrate_cancel", NoArguments, lambda _: self._controller.cancel_migration())
        registry.add("migrate-set-parameters", MigrationParameters, self._set_parameters)
        registry.add("query-migrate-parameters", NoArguments, self._query_parameters)
        registry.add("query-migrate", NoArguments, self._query_migrate)
        registry.add("x-query-memory", NoArguments, lambda _: self._machine.memory.describe())
        registry.add("pmemsave", PmemsaveArguments, self._pmemsave)
        WatchCommands(self._controller).register(registry)

    def _quit(self) -> None:
        self._controller.quit(ShutdownCause.HOST_QMP_QUIT)

    def _query_status(self, _: NoArguments) -> StatusInfo:
        state = self._machine.state
        return StatusInfo(state is RunState.RUNNING, state.value)

    def _set_parameters(self, wanted: MigrationParameters) -> None:
        changes: dict[str, Any] = {}
        if not isinstance(wanted.downtime_limit, UnsetType):
            changes["downtime_limit"] = wanted.downtime_limit / _MILLISECONDS
        if not isinstance(wanted.max_bandwidth, UnsetType):
            changes["max_bandwidth"] = wanted.max_bandwidth
        if not isinstance(wanted.x_clear_chunk, UnsetType):
            changes["clear_chunk"] = wanted.x_clear_chunk
        if not isinstance(wanted.x_verify, UnsetType):
            changes["verify"] = wanted.x_verify
        self._controller.change_parameters(**changes)

    def _query_parameters(self, _: NoArguments) -> MigrationParameters:
        now = self._controller.parameters
        return MigrationParameters(
            downtime_limit=_ms(now.downtime_limit),
            max_bandwidth=now.max_bandwidth,
            x_clear_chunk=now.clear_chunk,
            x_verify=now.verify,
        )

    def _query_migrate(self, _: NoArguments) -> MigrationInfo | None:
        outgoing = self._controller.outgoing
        return None if outgoing is None else describe(outgoing)

    def _pmemsave(self, wanted: PmemsaveArguments) -> None:
        machine = self._machine
        if not isinstance(machine, PCMachine):
            raise UsageError(f"a machine of kind {machine.kind!r} has no physical memory")
        if "\0" in wanted.filename:
            raise UsageError(f"{wanted.filename!r} cannot be the name of a file")
        end = wanted.val + wanted.size
        _check_memory(machine.system, wanted.val, end)
        try:
            with open(wanted.filename, "wb") as file:
                file.writelines(machine.system.read(low, min(MIB, end - low)) for low in range(wanted.val, end, MIB))
        except OSError as error:
            raise HostError(
                f"cannot write {wanted.filename!r}: {error.strerror}",
                remedy="choose a place that the machine may write to",
            ) from error


def _check_memory(system: AddressSpace, low: int, end: int) -> None:
    """Refuse a range that is not memory from end to end."""
    while low < end:
        flat = system.view.lookup(low)
        if flat is None:
            raise UsageError(f"there is no memory at {low:#x}")
        low = flat.end


def describe(outgoing: OutgoingMigration) -> MigrationInfo:
    """A migration as query-migrate shows it."""
    status = outgoing.status  # first: what it stands for was in place before it
    statistics, completed = outgoing.statistics, status is Status.COMPLETED
    passes = list(statistics.passes)
    expected = None if outgoing.ended else next(filter(None, map(_expected_downtime, reversed(passes))), None)
    return MigrationInfo(
        status=status.value,
        total_time=_ms(outgoing.elapsed),
        setup_time=_ms(statistics.setup_seconds),
        expected_downtime=None if expected is None else _ms(expected),
        downtime=_ms(statistics.downtime) if completed else None,
        error_desc=str(outgoing.error) if status is Status.FAILED else None,
        ram=_ram_info(outgoing, passes),
        x_passes=[_pass_info(one) for one in passes],
        x_downtime_us=round(statistics.downtime * _MICROSECONDS) if completed else None,
        x_verify_us=round(statistics.verify_seconds * _MICROSECONDS) if statistics.digests else None,
        x_digests={name: digest.hex() for name, digest in statistics.digests.items()} or None,
    )


def _ram_info(outgoing: OutgoingMigration, passes: Sequence[PassStatistics]) -> RAMInfo:
    statistics = outgoing.statistics
    rate = _rate(outgoing, passes)
    return RAMInfo(
        transferred=statistics.bytes,
        remaining=0 if outgoing.status is Status.COMPLETED else statistics.remaining_pages * PAGE_SIZE,
        total=statistics.total_bytes,
        duplicate=statistics.zero_pages,
        normal=statistics.pages,
        normal_bytes=statistics.pages * PAGE_SIZE,
        dirty_pages_rate=round(statistics.dirty_rate),
        mbps=rate * 8 / _MEGABIT,
        dirty_sync_count=outgoing.statistics.pass_count,
        page_size=PAGE_SIZE,
        pages_per_second=round(rate / PAGE_SIZE),
    )


def _rate(outgoing: OutgoingMigration, passes: Sequence[PassStatistics]) -> float:
    """Bytes a second: on average if it has ended, else lately."""
    if outgoing.ended and outgoing.elapsed:
        return outgoing.statistics.bytes / outgoing.elapsed
    latest = next((one for one in reversed(passes) if one.seconds), None)
    return 0.0 if latest is None else latest.bandwidth or latest.bytes / latest.seconds


def _expected_downtime(one: PassStatistics) -> float | None:
    """Seconds, if anything is known of the link."""
    return one.expected_downtime if 0 < one.expected_downtime < math.inf else None


def _pass_info(one: PassStatistics) -> PassInfo:
    return PassInfo(
        number=one.number,
        pages=one.pages,
        zero_pages=one.zero_pages,
        bytes=one.bytes,
        seconds=one.seconds,
        starved=one.starved,
        dirtied=one.dirtied,
        bandwidth=one.bandwidth,
        expected_downtime=_expected_downtime(one),
    )


def _ms(seconds: float) -> int:
    return round(seconds * _MILLISECONDS)


def emit_events(controller: Controller, server: QMPServer) -> None:
    """Have a server tell its clients of STOP, RESUME, SHUTDOWN and MIGRATION."""

    def state_changed(old: RunState, new: RunState) -> None:
        if new is RunState.RUNNING:
            server.emit("RESUME")
        elif old is RunState.RUNNING:
            server.emit("STOP")

    def shut_down(cause: ShutdownCause) -> None:
        server.emit("SHUTDOWN", {"guest": cause.by_guest, "reason": cause.value})

    controller.machine.observers.append(state_changed)
    controller.shutdown_observers.append(shut_down)
    controller.migration_observers.append(lambda status: server.emit("MIGRATION", {"status": status.value}))

"""QEMU's commands and events for one machine.

Names, arguments and results are those of QEMU's QAPI schema (qapi/run-state.json, migration.json, machine.json). What
QEMU does not have starts with ``x-``.
"""

from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from dirtylog.control.controller import Controller
from dirtylog.control.qmp import Arguments, CommandRegistry, NoArguments, QMPServer
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import KVMMachine, RunState
from dirtylog.machine.machine import ENDED
from dirtylog.migration import OutgoingMigration, PassStatistics, Status
from dirtylog.units import MIB, PAGE_SIZE

_MILLISECOND = 1e-3
_MEGABIT = 1e6


class MigrateArguments(Arguments, frozen=True):
    """Arguments of migrate. ``detach`` has no meaning in QMP, and is taken as QEMU takes it."""

    uri: str
    detach: bool | None = None


class MigrationParameters(Arguments, frozen=True, omit_defaults=True):
    """Arguments of migrate-set-parameters, and result of query-migrate-parameters: milliseconds, bytes (a second)."""

    downtime_limit: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
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


class _Kebab(Struct, frozen=True, rename="kebab", omit_defaults=True):
    pass


class RAMInfo(_Kebab, frozen=True, omit_defaults=False):
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


class PassInfo(_Kebab, frozen=True, omit_defaults=False):
    """One pass, for x-passes: see `migration.PassStatistics`. Times in seconds."""

    number: int
    pages: int
    zero_pages: int
    bytes: int
    seconds: float
    starved: float
    dirtied: int
    bandwidth: float
    expected_downtime: float


class MigrationInfo(_Kebab, frozen=True):
    """Result of query-migrate. Times in milliseconds, but for x-passes; empty if there was no migration."""

    status: str | UnsetType = UNSET
    total_time: int | UnsetType = UNSET
    setup_time: int | UnsetType = UNSET
    expected_downtime: int | UnsetType = UNSET
    downtime: int | UnsetType = UNSET
    error_desc: str | UnsetType = UNSET
    ram: RAMInfo | UnsetType = UNSET
    x_passes: list[PassInfo] | UnsetType = UNSET
    x_downtime_us: int | UnsetType = UNSET
    x_verify_us: int | UnsetType = UNSET
    x_digests: dict[str, str] | UnsetType = UNSET


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
        registry.add("quit", NoArguments, lambda _: None, after_reply=self._controller.quit)
        registry.add("migrate", MigrateArguments, lambda arguments: self._controller.migrate(arguments.uri))
        registry.add("migrate_cancel", NoArguments, lambda _: self._controller.cancel_migration())
        registry.add("migrate-set-parameters", MigrationParameters, self._set_parameters)
        registry.add("query-migrate-parameters", NoArguments, self._query_parameters)
        registry.add("query-migrate", NoArguments, self._query_migrate)
        registry.add("pmemsave", PmemsaveArguments, self._pmemsave)

    def _query_status(self, _: NoArguments) -> StatusInfo:
        state = self._machine.state
        return StatusInfo(state is RunState.RUNNING, state.value)

    def _set_parameters(self, wanted: MigrationParameters) -> None:
        changes: dict[str, Any] = {}
        if not isinstance(wanted.downtime_limit, UnsetType):
            changes["downtime_limit"] = wanted.downtime_limit * _MILLISECOND
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
            downtime_limit=round(now.downtime_limit / _MILLISECOND),
            max_bandwidth=now.max_bandwidth,
            x_clear_chunk=now.clear_chunk,
            x_verify=now.verify,
        )

    def _query_migrate(self, _: NoArguments) -> MigrationInfo:
        outgoing = self._controller.outgoing
        return MigrationInfo() if outgoing is None else describe(outgoing)

    def _pmemsave(self, wanted: PmemsaveArguments) -> None:
        machine = self._machine
        if not isinstance(machine, KVMMachine):
            raise UsageError(f"a machine of kind {machine.kind!r} has no physical memory")
        end = wanted.val + wanted.size
        try:
            with Path(wanted.filename).open("wb") as file:
                file.writelines(machine.system.read(low, min(MIB, end - low)) for low in range(wanted.val, end, MIB))
        except OSError as error:
            raise HostError(f"cannot write {wanted.filename}: {error.strerror}") from error


def describe(outgoing: OutgoingMigration) -> MigrationInfo:
    """A migration as query-migrate shows it."""
    statistics, status = outgoing.statistics, outgoing.status
    elapsed = outgoing.elapsed
    last = statistics.passes[-1] if statistics.passes else PassStatistics(0)
    running_passes = [one for one in statistics.passes if one.seconds]
    expected = next((one.expected_downtime for one in reversed(running_passes) if one.expected_downtime), None)
    rate = (
        statistics.bytes / elapsed if outgoing.ended and elapsed else last.bandwidth or _last_bandwidth(running_passes)
    )
    return MigrationInfo(
        status=status.value,
        total_time=_ms(elapsed),
        setup_time=_ms(statistics.setup_seconds),
        expected_downtime=UNSET if outgoing.ended or expected is None or expected == float("inf") else _ms(expected),
        downtime=_ms(statistics.downtime) if status is Status.COMPLETED else UNSET,
        error_desc=str(outgoing.error) if outgoing.error is not None else UNSET,
        ram=RAMInfo(
            transferred=statistics.bytes,
            remaining=0 if status is Status.COMPLETED else statistics.remaining_pages * PAGE_SIZE,
            total=statistics.total_bytes,
            duplicate=statistics.zero_pages,
            normal=statistics.pages,
            normal_bytes=statistics.pages * PAGE_SIZE,
            dirty_pages_rate=round(statistics.dirty_rate),
            mbps=rate * 8 / _MEGABIT,
            dirty_sync_count=len(statistics.passes),
            page_size=PAGE_SIZE,
            pages_per_second=round(rate / PAGE_SIZE),
        ),
        x_passes=[_pass_info(one) for one in statistics.passes],
        x_downtime_us=round(statistics.downtime * 1e6) if status is Status.COMPLETED else UNSET,
        x_verify_us=round(statistics.verify_seconds * 1e6) if statistics.digests else UNSET,
        x_digests={name: digest.hex() for name, digest in statistics.digests.items()} or UNSET,
    )


def _last_bandwidth(passes: list[PassStatistics]) -> float:
    return passes[-1].bandwidth if passes else 0.0


def _pass_info(one: PassStatistics) -> PassInfo:
    expected = one.expected_downtime if one.expected_downtime != float("inf") else 0.0
    return PassInfo(
        one.number,
        one.pages,
        one.zero_pages,
        one.bytes,
        one.seconds,
        one.starved,
        one.dirtied,
        one.bandwidth,
        expected,
    )


def _ms(seconds: float) -> int:
    return round(seconds / _MILLISECOND)


def emit_events(controller: Controller, server: QMPServer) -> None:
    """Have a server tell its clients of STOP, RESUME, SHUTDOWN and MIGRATION."""

    def state_changed(old: RunState, new: RunState) -> None:
        if new is RunState.RUNNING:
            server.emit("RESUME")
        elif old is RunState.RUNNING:
            server.emit("STOP")
        if new in ENDED:
            server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})

    controller.machine.observers.append(state_changed)
    controller.migration_observers.append(lambda status: server.emit("MIGRATION", {"status": status.value}))

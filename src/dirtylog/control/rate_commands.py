"""QEMU's commands about how fast memory is written: to measure that, and to limit it (qapi/migration.json)."""

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from dirtylog.control.controller import Controller
from dirtylog.control.qmp import Arguments, CommandRegistry, NoArguments
from dirtylog.display import RateMode

_SECONDS: Final = {"second": 1.0, "millisecond": 1e-3}

Unit = Literal["second", "millisecond"]
MiBPerSecond = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class CalcArguments(Arguments, frozen=True):
    """Arguments of calc-dirty-rate. The meter has the bounds."""

    calc_time: Annotated[int, Meta(ge=0, le=1 << 32)]
    calc_time_unit: Unit = "second"
    sample_pages: Annotated[int, Meta(ge=0, le=1 << 32)] | None = None
    mode: RateMode = RateMode.PAGE_SAMPLING


class QueryRateArguments(Arguments, frozen=True):
    """Arguments of query-dirty-rate: what its answer's calc-time is in."""

    calc_time_unit: Unit = "second"


class VCPURate(Struct, frozen=True, rename="kebab"):
    """DirtyRateVcpu, in MiB a second."""

    id: int
    dirty_rate: int


class DirtyRateInfo(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """DirtyRateInfo, in MiB a second; -1 if it could not be told, and x-error-desc why, if there was an error.

    start-time is by the wall clock, in seconds.
    """

    dirty_rate: int | None = None
    status: str
    start_time: int
    calc_time: int
    calc_time_unit: str
    sample_pages: int
    mode: str
    vcpu_dirty_rate: list[VCPURate] | None = None
    x_error_desc: str | None = None


class SetLimitArguments(Arguments, frozen=True):
    """Arguments of set-vcpu-dirty-limit; a rate of 0 ends the limit."""

    dirty_rate: MiBPerSecond
    cpu_index: int | None = None


class CancelLimitArguments(Arguments, frozen=True):
    """Arguments of cancel-vcpu-dirty-limit."""

    cpu_index: int | None = None


class DirtyLimitInfo(Struct, frozen=True, rename="kebab"):
    """DirtyLimitInfo, in MiB a second."""

    cpu_index: int
    limit_rate: int
    current_rate: int


class RateCommands:
    """The commands about a controller's machine."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        registry.add("calc-dirty-rate", CalcArguments, self._calc)
        registry.add("query-dirty-rate", QueryRateArguments, self._query)
        registry.add("set-vcpu-dirty-limit", SetLimitArguments, self._set_limit)
        registry.add("cancel-vcpu-dirty-limit", CancelLimitArguments, self._cancel_limit)
        registry.add("query-vcpu-dirty-limit", NoArguments, self._query_limit)

    def _calc(self, wanted: CalcArguments) -> None:
        seconds = wanted.calc_time * _SECONDS[wanted.calc_time_unit]
        self._controller.rate_meter.start(wanted.mode, seconds, wanted.sample_pages)

    def _query(self, wanted: QueryRateArguments) -> DirtyRateInfo:
        last = self._controller.rate_meter.last
        return DirtyRateInfo(
            dirty_rate=last.rate,
            status=last.status.value,
            start_time=int(last.began),
            calc_time=round(last.seconds * 1000) // round(_SECONDS[wanted.calc_time_unit] * 1000),
            calc_time_unit=wanted.calc_time_unit,
            sample_pages=last.sample_pages,
            mode=last.mode.value,
            vcpu_dirty_rate=[VCPURate(number, rate) for number, rate in enumerate(last.vcpus)] or None,
            x_error_desc=None if last.error is None else str(last.error),
        )

    def _set_limit(self, wanted: SetLimitArguments) -> None:
        self._controller.limit_dirty_rate(wanted.dirty_rate, wanted.cpu_index)

    def _cancel_limit(self, wanted: CancelLimitArguments) -> None:
        if self._controller.machine.has_dirty_rings:  # elsewhere there is nothing to cancel, which is no error in QEMU
            self._controller.limit_dirty_rate(0, wanted.cpu_index)

    def _query_limit(self, _: NoArguments) -> list[DirtyLimitInfo]:
        limits = self._controller.machine.dirty_limits
        return [DirtyLimitInfo(limit.cpu, limit.quota, limit.rate) for limit in limits]

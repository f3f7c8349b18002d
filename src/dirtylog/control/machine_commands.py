"""QEMU's commands that run, stop and look at one machine (qapi/run-state.json, machine.json)."""

from typing import Annotated

from msgspec import Meta, Struct

from dirtylog.control.controller import Controller, ShutdownCause
from dirtylog.control.qmp import Arguments, CommandRegistry, NoArguments
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import PCMachine, RunState
from dirtylog.memory import AddressSpace
from dirtylog.units import MIB


class PmemsaveArguments(Arguments, frozen=True):
    """Arguments of pmemsave."""

    val: Annotated[int, Meta(ge=0)]
    size: Annotated[int, Meta(ge=0)]
    filename: str


class StatusInfo(Struct, frozen=True):
    """Result of query-status."""

    running: bool
    status: str


class MachineCommands:
    """The commands about a controller's machine itself."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._machine = controller.machine

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        registry.add("query-status", NoArguments, self._query_status)
        registry.add("stop", NoArguments, lambda _: self._machine.pause())
        registry.add("cont", NoArguments, lambda _: self._machine.resume())
        registry.add("quit", NoArguments, lambda _: None, after_reply=self._quit)
        registry.add("x-query-memory", NoArguments, lambda _: self._machine.memory.describe())
        registry.add("pmemsave", PmemsaveArguments, self._pmemsave)

    def _quit(self) -> None:
        self._controller.quit(ShutdownCause.HOST_QMP_QUIT)

    def _query_status(self, _: NoArguments) -> StatusInfo:
        state = self._machine.state
        return StatusInfo(state is RunState.RUNNING, state.value)

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

"""QEMU's commands and events for one machine.

Names, arguments and results are those of QEMU's QAPI schema. What QEMU does not have starts with ``x-``.
"""

from dirtylog.control.controller import Controller, ShutdownCause
from dirtylog.control.machine_commands import MachineCommands
from dirtylog.control.migration_commands import MigrationCommands
from dirtylog.control.migration_info import MigrationInfo, PassInfo
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.control.rate_commands import RateCommands
from dirtylog.control.settings import Capability
from dirtylog.control.watch_commands import WatchCommands
from dirtylog.machine import RunState

__all__ = ["Commands", "MigrationInfo", "PassInfo", "emit_events"]


class Commands:
    """The commands of one controller's machine."""

    def __init__(self, controller: Controller) -> None:
        self._subjects = (
            MachineCommands(controller),
            MigrationCommands(controller),
            RateCommands(controller),
            WatchCommands(controller),
        )

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        for subject in self._subjects:
            subject.register(registry)


def emit_events(controller: Controller, server: QMPServer) -> None:
    """Have a server tell its clients of STOP, RESUME, SHUTDOWN, MIGRATION and, if that is on, MIGRATION_PASS."""

    def state_changed(old: RunState, new: RunState) -> None:
        if new is RunState.RUNNING:
            server.emit("RESUME")
        elif old is RunState.RUNNING:
            server.emit("STOP")

    def shut_down(cause: ShutdownCause) -> None:
        server.emit("SHUTDOWN", {"guest": cause.by_guest, "reason": cause.value})

    def pass_began(number: int) -> None:
        if Capability.EVENTS in controller.settings.capabilities:
            server.emit("MIGRATION_PASS", {"pass": number})

    controller.machine.observers.append(state_changed)
    controller.shutdown_observers.append(shut_down)
    controller.migration_observers.append(lambda status: server.emit("MIGRATION", {"status": status.value}))
    controller.pass_observers.append(pass_began)

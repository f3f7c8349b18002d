"""What runs and writes memory."""

from typing import TYPE_CHECKING, Any

from dirtylog.machine.boot import boot_flat, boot_sector
from dirtylog.machine.entry import BootMode
from dirtylog.machine.kvm.machine import KVMMachine
from dirtylog.machine.machine import Machine, MachineState, RunState
from dirtylog.machine.pc import PCMachine
from dirtylog.machine.process import Process
from dirtylog.machine.throttle import DirtyLimit

if TYPE_CHECKING:
    from dirtylog.machine.unicorn.machine import UnicornMachine

__all__ = [
    "BootMode",
    "DirtyLimit",
    "KVMMachine",
    "Machine",
    "MachineState",
    "PCMachine",
    "Process",
    "RunState",
    "UnicornMachine",
    "boot_flat",
    "boot_sector",
]


def __getattr__(name: str) -> Any:
    """Import the emulator for those who ask for it: its library is large."""
    if name == "UnicornMachine":
        from dirtylog.machine.unicorn.machine import UnicornMachine

        return UnicornMachine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

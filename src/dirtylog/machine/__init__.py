"""What runs and writes memory."""

from dirtylog.machine.boot import BootMode, boot_flat, boot_sector
from dirtylog.machine.kvm.machine import KVMMachine
from dirtylog.machine.machine import Machine, MachineState, RunState

__all__ = ["BootMode", "KVMMachine", "Machine", "MachineState", "RunState", "boot_flat", "boot_sector"]

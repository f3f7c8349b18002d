"""What a PC-like machine has, whatever runs its guest: RAM, ports, a serial port and port 0x92."""

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from dirtylog.errors import UsageError
from dirtylog.machine.devices.device import Device
from dirtylog.machine.devices.port92 import Port92
from dirtylog.machine.devices.serial import Serial
from dirtylog.machine.entry import BootMode
from dirtylog.machine.machine import Machine, MachineState
from dirtylog.memory import AddressSpace, Memory
from dirtylog.units import GIB

RAM_NAME: Final = "pc.ram"
LOW_RAM_LIMIT: Final = 3 * GIB
"""RAM beyond this is mapped from 4 GiB up; the interrupt controllers' registers are in between."""
PORTS: Final = 1 << 16


def pc_memory(ram_size: int) -> tuple[Memory, AddressSpace]:
    """A memory with one RAM block laid out as a PC's, and the address space that shows it.

    Raises:
        UsageError: the size is not a positive whole number of pages.
        HostError: the host cannot map that much.
    """
    memory = Memory()
    ram = memory.ram(RAM_NAME, ram_size)
    root = memory.container("system")
    root.add(memory.alias("ram-below-4g", ram, 0, min(ram_size, LOW_RAM_LIMIT)), 0)
    if ram_size > LOW_RAM_LIMIT:
        root.add(memory.alias("ram-above-4g", ram, LOW_RAM_LIMIT, ram_size - LOW_RAM_LIMIT), 4 * GIB)
    return memory, memory.address_space("system", root)


class PCMachine(Machine):
    """RAM and devices; what runs the guest comes with the subclass.

    Args:
        ram_size: bytes, a whole number of pages.
        transmit: takes what the guest sends on its serial port, which goes nowhere if None. Must not block.

    Attributes:
        system: what the guest's physical addresses mean. More may be mapped in its root.
        ports: what the guest's port numbers mean. More may be mapped in its root.
    """

    def __init__(self, ram_size: int, transmit: Callable[[bytes], None] | None) -> None:
        memory, self.system = pc_memory(ram_size)
        super().__init__(memory)
        self._devices: tuple[Device, ...] = (Serial(transmit or _discard), Port92())
        self.ports = self._map_devices()

    def _map_devices(self) -> AddressSpace:
        root = self.memory.container("io", PORTS)
        for device in self._devices:
            root.add(self.memory.mmio(device.name, device.size, device), device.base)
        return self.memory.address_space("io", root)

    @abstractmethod
    def set_entry(self, entry: int, mode: BootMode) -> None:
        """Have the first vCPU start at an address in a mode, as `boot_flat` describes it. For loaders.

        What the mode needs in memory is there already, and the mode can reach the entry.

        Raises:
            UsageError: the machine runs.
        """

    def _save_devices(self) -> MachineState:
        return {device.name: device.save_state() for device in self._devices}

    def _load_devices(self, state: MachineState) -> None:
        for device in self._devices:
            device.load_state(state[device.name])

    def _check_parts(self, state: MachineState, others: AbstractSet[str]) -> None:
        """Refuse a state that has not just the parts of this machine: its devices and ``others``."""
        names = others | {device.name for device in self._devices}
        if state.keys() != names:
            odd = ", ".join(sorted(state.keys() ^ names))
            raise UsageError(
                f"the state is of another machine: only one side has {odd}",
                remedy="start both sides with equal options",
            )


def _discard(data: bytes) -> None:
    del data

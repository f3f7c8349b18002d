"""Port I/O: which device answers at which port."""

import threading
from typing import Protocol

from dirtylog.errors import UsageError


class PortDevice(Protocol):
    """A device on the port bus. Its methods run one at a time for the whole bus."""

    @property
    def name(self) -> str:
        """Unique on its bus; names its part of the machine's state."""

    @property
    def ports(self) -> range:
        """The ports it answers at, one byte each."""

    def read(self, port: int) -> int:
        """The byte at a port."""

    def write(self, port: int, value: int) -> None:
        """Take a byte at a port. May raise GuestError, which ends the guest."""

    def save_state(self) -> dict[str, bytes]:
        """Its registers, by name."""

    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`.

        Raises:
            UsageError: not such a state.
        """


class PortBus:
    """Byte-wide port I/O; wider accesses are split, as on a PC's bus. Nobody's ports read as 0xff."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_port: dict[int, PortDevice] = {}
        self.devices: dict[str, PortDevice] = {}

    def attach(self, device: PortDevice) -> None:
        """Add a device.

        Raises:
            UsageError: its name or one of its ports is taken.
        """
        taken = [port for port in device.ports if port in self._by_port]
        if device.name in self.devices or taken:
            raise UsageError(f"{device.name} cannot be attached: its name or one of its ports is taken")
        self.devices[device.name] = device
        self._by_port.update(dict.fromkeys(device.ports, device))

    def access(self, port: int, size: int, data: memoryview, *, write: bool) -> None:
        """Do the accesses of one exit: ``data`` holds, or receives, ``size`` bytes each for one or more of them."""
        with self._lock:
            for index in range(len(data)):
                at = port + index % size
                device = self._by_port.get(at)
                if write and device is not None:
                    device.write(at, data[index])
                elif not write:
                    data[index] = 0xFF if device is None else device.read(at)

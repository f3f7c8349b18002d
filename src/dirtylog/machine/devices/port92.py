"""System control port A of a PC: the A20 gate and the fast reset."""

from typing import Final

from dirtylog.errors import GuestError, UsageError
from dirtylog.machine.devices.device import Device
from dirtylog.memory import AccessSizes

_FAST_RESET: Final = 0x01
_A20: Final = 0x02


class Port92(Device):
    """Remembers the A20 gate, which is open from the start and has no effect; a fast reset ends the guest."""

    name = "port92"
    base = 0x92
    size = 1
    implemented = AccessSizes(1, 1)

    def __init__(self) -> None:
        self._value = _A20

    def read(self, offset: int, size: int) -> int:
        """What was written last."""
        del offset, size
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the gate.

        Raises:
            GuestError: the guest wants to be reset.
        """
        del offset, size
        self._value = value & ~_FAST_RESET
        if value & _FAST_RESET:
            raise GuestError("the guest reset itself through port 0x92", remedy="start it again")

    def save_state(self) -> dict[str, bytes]:
        """The port's byte."""
        return {"value": bytes((self._value,))}

    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`."""
        if state.keys() != {"value"} or len(state["value"]) != 1:
            raise UsageError("not the state of port 0x92")
        self._value = state["value"][0] & ~_FAST_RESET

"""System control port A of a PC: the A20 gate and the fast reset."""

from typing import Final

from dirtylog.errors import GuestError, UsageError

_FAST_RESET: Final = 0x01
_A20: Final = 0x02


class Port92:
    """Remembers the A20 gate, which is open from the start and has no effect; a fast reset ends the guest."""

    name = "port92"
    ports = range(0x92, 0x93)

    def __init__(self) -> None:
        self._value = _A20

    def read(self, port: int) -> int:
        """What was written last."""
        del port
        return self._value

    def write(self, port: int, value: int) -> None:
        """Set the gate.

        Raises:
            GuestError: the guest wants to be reset.
        """
        del port
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

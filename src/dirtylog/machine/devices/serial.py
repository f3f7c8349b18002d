"""A 16550 serial port that only transmits."""

from collections.abc import Callable
from typing import Final

from dirtylog.errors import UsageError
from dirtylog.machine.devices.device import Device
from dirtylog.memory import AccessSizes

COM1: Final = 0x3F8

_DATA, _INTERRUPT_ENABLE, _FIFO_CONTROL, _LINE_CONTROL, _MODEM_CONTROL, _LINE_STATUS, _MODEM_STATUS, _SCRATCH = range(8)
_DIVISOR_LATCH: Final = 0x80
_TRANSMITTER_EMPTY: Final = 0x60  # holding register and shifter
_CARRIER_READY_CLEAR: Final = 0xB0  # a peer is there and ready
_NO_INTERRUPT: Final = 0x01
_FIFO_ENABLED: Final = 0xC0
_REGISTERS: Final = (
    "interrupt_enable",
    "fifo",
    "line_control",
    "modem_control",
    "scratch",
    "divisor_low",
    "divisor_high",
)


class Serial(Device):
    """Registers of a 16550 (National Semiconductor PC16550D data sheet); bytes sent go to ``transmit`` at once.

    The line is always ready and nothing is ever received. It raises no interrupts.

    Args:
        transmit: takes each byte. Called in a vCPU's thread: it must not block.
        base: the first of its eight ports.
    """

    size = 8
    implemented = AccessSizes(1, 1)

    def __init__(self, transmit: Callable[[bytes], None], *, base: int = COM1, name: str = "serial0") -> None:
        self.name = name
        self.base = base
        self._transmit = transmit
        self._registers = dict.fromkeys(_REGISTERS, 0)
        self._registers["divisor_low"] = 12  # 9600 baud, as after reset

    def read(self, offset: int, size: int) -> int:
        """The byte of a register."""
        del size
        register = offset
        latched = self._registers["line_control"] & _DIVISOR_LATCH
        if register == _LINE_STATUS:
            return _TRANSMITTER_EMPTY
        if register == _MODEM_STATUS:
            return _CARRIER_READY_CLEAR
        if register == _FIFO_CONTROL:
            return _NO_INTERRUPT | (_FIFO_ENABLED if self._registers["fifo"] & 1 else 0)
        if register == _DATA and not latched:
            return 0
        return self._registers[self._stored(register)]

    def write(self, offset: int, size: int, value: int) -> None:
        """Set a register, or send a byte."""
        del size
        register = offset
        if register in (_LINE_STATUS, _MODEM_STATUS):
            return
        if register == _DATA and not self._registers["line_control"] & _DIVISOR_LATCH:
            self._transmit(bytes((value,)))
        else:
            self._registers[self._stored(register)] = value

    def _stored(self, register: int) -> str:
        if self._registers["line_control"] & _DIVISOR_LATCH and register in (_DATA, _INTERRUPT_ENABLE):
            return "divisor_low" if register == _DATA else "divisor_high"
        return {
            _INTERRUPT_ENABLE: "interrupt_enable",
            _FIFO_CONTROL: "fifo",
            _LINE_CONTROL: "line_control",
            _MODEM_CONTROL: "modem_control",
            _SCRATCH: "scratch",
        }[register]

    def save_state(self) -> dict[str, bytes]:
        """The registers, a byte each."""
        return {name: bytes((value,)) for name, value in self._registers.items()}

    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`."""
        if state.keys() != self._registers.keys() or any(len(value) != 1 for value in state.values()):
            raise UsageError(f"not the state of {self.name}, a 16550 serial port")
        self._registers = {name: value[0] for name, value in state.items()}

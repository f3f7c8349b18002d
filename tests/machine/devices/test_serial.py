import pytest

from dirtylog.errors import UsageError
from dirtylog.machine.devices.serial import COM1, Serial

DATA, IER, FIFO, LCR, MCR, LSR, MSR, SCRATCH = range(8)
DLAB = 0x80


class Line:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.serial = Serial(self.take)

    def take(self, data: bytes) -> None:
        self.sent += data


@pytest.fixture
def line() -> Line:
    return Line()


def test_bytes_are_sent_at_once_and_in_order(line: Line) -> None:
    for byte in b"dirty":
        line.serial.write(DATA, 1, byte)
    assert line.sent == b"dirty"


def test_line_is_always_ready_and_never_has_input(line: Line) -> None:
    assert line.serial.read(LSR, 1) == 0x60
    assert line.serial.read(MSR, 1) == 0xB0
    assert line.serial.read(DATA, 1) == 0


def test_divisor_latch_turns_two_registers_into_the_divisor(line: Line) -> None:
    line.serial.write(IER, 1, 0x05)
    line.serial.write(LCR, 1, DLAB | 0x03)
    assert (line.serial.read(DATA, 1), line.serial.read(IER, 1)) == (12, 0)
    line.serial.write(DATA, 1, 0x34)
    line.serial.write(IER, 1, 0x12)
    assert (line.serial.read(DATA, 1), line.serial.read(IER, 1)) == (0x34, 0x12)
    assert line.sent == b""

    line.serial.write(LCR, 1, 0x03)
    assert (line.serial.read(DATA, 1), line.serial.read(IER, 1)) == (0, 0x05)
    line.serial.write(DATA, 1, ord("x"))
    assert line.sent == b"x"
    line.serial.write(LCR, 1, DLAB)
    assert (line.serial.read(DATA, 1), line.serial.read(IER, 1)) == (0x34, 0x12)


@pytest.mark.parametrize("register", [IER, LCR, MCR, SCRATCH])
def test_plain_registers_hold_what_was_written(line: Line, register: int) -> None:
    line.serial.write(register, 1, 0x1B)
    assert line.serial.read(register, 1) == 0x1B


@pytest.mark.parametrize("register", [LSR, MSR])
def test_status_registers_cannot_be_written(line: Line, register: int) -> None:
    before = line.serial.read(register, 1)
    line.serial.write(register, 1, 0)
    assert line.serial.read(register, 1) == before


@pytest.mark.parametrize(("control", "identification"), [(0, 0x01), (0x07, 0xC1), (0x06, 0x01)])
def test_enabled_fifo_shows_in_the_interrupt_identification(line: Line, control: int, identification: int) -> None:
    line.serial.write(FIFO, 1, control)
    assert line.serial.read(FIFO, 1) == identification


def test_state_moves_to_another_port(line: Line) -> None:
    for register, value in [(LCR, DLAB), (DATA, 1), (IER, 0), (LCR, 3), (SCRATCH, 0x42), (FIFO, 1), (MCR, 3)]:
        line.serial.write(register, 1, value)
    other = Line()

    other.serial.load_state(line.serial.save_state())

    assert other.serial.save_state() == line.serial.save_state()
    assert [other.serial.read(register, 1) for register in range(8)] == [
        line.serial.read(register, 1) for register in range(8)
    ]
    assert other.sent == b""


def test_base_and_name_can_be_chosen() -> None:
    serial = Serial(lambda data: None, base=0x2F8, name="serial1")
    assert (serial.name, serial.base, serial.size) == ("serial1", 0x2F8, 8)
    assert (Serial(lambda data: None).base, Serial(lambda data: None).name) == (COM1, "serial0")


def test_state_of_something_else_is_refused_and_changes_nothing(line: Line) -> None:
    state = line.serial.save_state()
    missing = {name: value for name, value in state.items() if name != "scratch"}
    for odd in ({}, missing, state | {"more": b"\0"}, state | {"scratch": b""}, state | {"scratch": b"\0\0"}):
        with pytest.raises(UsageError, match="not the state of serial0"):
            line.serial.load_state(odd)
    assert line.serial.save_state() == state

import pytest

from dirtylog.errors import GuestError, UsageError
from dirtylog.machine.devices.port92 import Port92


def test_gate_is_open_and_remembers_what_was_written() -> None:
    device = Port92()
    assert device.read(0, 1) == 0x02
    device.write(0, 1, 0x00)
    assert device.read(0, 1) == 0x00
    device.write(0, 1, 0xFE)
    assert device.read(0, 1) == 0xFE


@pytest.mark.parametrize("value", [0x01, 0x03, 0xFF])
def test_reset_ends_the_guest(value: int) -> None:
    device = Port92()
    with pytest.raises(GuestError, match="reset itself through port 0x92"):
        device.write(0, 1, value)
    assert device.read(0, 1) == value & 0xFE


def test_state_moves_without_the_reset_bit() -> None:
    device = Port92()
    device.load_state({"value": b"\xff"})
    assert device.save_state() == {"value": b"\xfe"}


@pytest.mark.parametrize(
    "state", [{}, {"value": b""}, {"value": b"\0\0"}, {"other": b"\0"}, {"value": b"\0", "x": b""}]
)
def test_state_of_something_else_is_refused(state: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match="not the state of port 0x92"):
        Port92().load_state(state)

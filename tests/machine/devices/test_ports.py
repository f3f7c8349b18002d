import pytest

from dirtylog.errors import GuestError, UsageError
from dirtylog.machine.devices.ports import PortBus


class Notebook:
    """Answers with the port's number and writes down what is written."""

    def __init__(self, name: str, ports: range) -> None:
        self.name = name
        self.ports = ports
        self.written: list[tuple[int, int]] = []

    def read(self, port: int) -> int:
        return port & 0xFF

    def write(self, port: int, value: int) -> None:
        if value == 0xEE:
            raise GuestError("enough")
        self.written.append((port, value))

    def save_state(self) -> dict[str, bytes]:
        return {}

    def load_state(self, state: dict[str, bytes]) -> None:
        raise UsageError("none")


@pytest.fixture
def bus() -> PortBus:
    return PortBus()


def read(bus: PortBus, port: int, size: int, count: int = 1) -> bytes:
    data = bytearray(size * count)
    bus.access(port, size, memoryview(data), write=False)
    return bytes(data)


def test_wide_accesses_are_split_among_the_ports_they_cover(bus: PortBus) -> None:
    first, second = Notebook("first", range(0x10, 0x12)), Notebook("second", range(0x12, 0x13))
    bus.attach(first)
    bus.attach(second)

    bus.access(0x11, 4, memoryview(b"abcd"), write=True)

    assert (first.written, second.written) == ([(0x11, ord("a"))], [(0x12, ord("b"))])
    assert read(bus, 0x11, 4) == b"\x11\x12\xff\xff"
    assert read(bus, 0x0F, 2) == b"\xff\x10"


def test_repeated_accesses_stay_at_their_ports(bus: PortBus) -> None:
    device = Notebook("device", range(0x10, 0x12))
    bus.attach(device)

    bus.access(0x10, 2, memoryview(b"abcd"), write=True)

    assert device.written == [(0x10, ord("a")), (0x11, ord("b")), (0x10, ord("c")), (0x11, ord("d"))]
    assert read(bus, 0x10, 1, count=3) == b"\x10\x10\x10"


@pytest.mark.parametrize("port", [0, 0x80, 0xFFFF])
def test_nobodys_ports_read_as_ones_and_swallow_writes(bus: PortBus, port: int) -> None:
    bus.access(port, 4, memoryview(b"abcd"), write=True)
    assert read(bus, port, 4) == b"\xff" * 4


def test_taken_names_and_ports_are_refused_whole(bus: PortBus) -> None:
    bus.attach(Notebook("device", range(0x10, 0x14)))
    for other in (Notebook("device", range(0x20, 0x21)), Notebook("other", range(0x0E, 0x11))):
        with pytest.raises(UsageError, match="its name or one of its ports is taken"):
            bus.attach(other)
    assert list(bus.devices) == ["device"]
    assert read(bus, 0x0E, 2) == b"\xff\xff"


def test_error_of_a_device_reaches_the_caller_and_leaves_the_bus_usable(bus: PortBus) -> None:
    device = Notebook("device", range(0x10, 0x12))
    bus.attach(device)
    with pytest.raises(GuestError, match="enough"):
        bus.access(0x10, 1, memoryview(b"\xee"), write=True)
    bus.access(0x10, 1, memoryview(b"a"), write=True)
    assert device.written == [(0x10, ord("a"))]

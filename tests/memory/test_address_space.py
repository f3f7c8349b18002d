from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.devices import ByteDevice
from support.listeners import Follower, Recorder, Told

from dirtylog.errors import AccessError, GuestError, UsageError
from dirtylog.memory import AccessSizes, AddressSpace, Client, Memory, MemoryRegion, TrackingReason
from dirtylog.memory.access import ByteOrder
from dirtylog.units import PAGE_SIZE


class Board:
    """Two RAM regions that touch at page 2, and a window on the second at page 8."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.low: MemoryRegion = self.memory.ram("low", 2 * PAGE_SIZE)
        self.high: MemoryRegion = self.memory.ram("high", 2 * PAGE_SIZE)
        self.root = root = self.memory.container("root")
        root.add(self.low, 0)
        root.add(self.high, 2 * PAGE_SIZE)
        root.add(self.memory.alias("window", self.high, PAGE_SIZE, PAGE_SIZE), 8 * PAGE_SIZE)
        self.space: AddressSpace = self.memory.address_space("space", root)

    def dirty(self, region: MemoryRegion, client: Client = Client.MIGRATION) -> list[bool]:
        return [region.is_dirty(page * PAGE_SIZE, PAGE_SIZE, client) for page in range(2)]

    def clean(self) -> None:
        for region in (self.low, self.high):
            for client in Client:
                region.test_and_clear_dirty(0, region.size, client)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def test_bytes_written_across_regions_are_read_back(board: Board) -> None:
    data = bytes(range(100))
    board.space.write(2 * PAGE_SIZE - 50, data)

    assert board.space.read(2 * PAGE_SIZE - 50, 100) == data
    assert board.low.block is not None
    assert board.low.block.array[-50:].tobytes() == data[:50]


def test_alias_reads_and_writes_its_target(board: Board) -> None:
    board.space.write(8 * PAGE_SIZE, b"here")

    assert board.space.read(3 * PAGE_SIZE, 4) == b"here"


def test_nothing_is_read_or_written_where_no_bytes_are_asked_for(board: Board) -> None:
    assert board.space.read(1 << 40, 0) == b""
    board.space.write(1 << 40, b"")


@pytest.mark.parametrize(
    ("address", "size"), [(4 * PAGE_SIZE, 1), (4 * PAGE_SIZE - 1, 2), (7 * PAGE_SIZE, 2 * PAGE_SIZE)]
)
def test_access_where_nothing_answers_is_refused_whole(board: Board, address: int, size: int) -> None:
    with pytest.raises(AccessError, match=r"nothing answers in the address space 'space': \d+ bytes at 0x[47]000"):
        board.space.read(address, size)
    with pytest.raises(UsageError, match="nothing answers"):
        board.space.write(address, b"x" * size)
    assert board.space.read(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)


def test_host_write_is_marked_for_those_who_log_in_every_page_it_touches(board: Board) -> None:  # D12 D10
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.clean()

    board.space.write(2 * PAGE_SIZE - 1, b"xy")

    assert board.dirty(board.low) == [False, True]
    assert board.dirty(board.high) == [True, False]
    assert board.dirty(board.low, Client.DISPLAY) == [False, False]


def test_host_write_is_marked_for_nobody_when_nobody_logs(board: Board) -> None:  # D12
    board.clean()
    board.space.write(0, b"x")

    assert not any(board.dirty(board.low, client)[0] for client in Client)


def test_host_write_is_marked_after_the_bytes_are_in_place(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    # D12
    at_the_mark: list[bytes] = []
    monkeypatch.setattr(
        MemoryRegion, "set_dirty", lambda region, offset, size: at_the_mark.append(board.space.read(0, 3))
    )
    board.space.write(0, b"now")

    assert at_the_mark == [b"now"]


def test_view_follows_the_tree_only_when_the_transaction_ends(board: Board) -> None:  # T1
    with board.memory.transaction():
        board.root.remove(board.low)
        assert board.space.read(0, 1) == b"\0"
    with pytest.raises(UsageError, match="nothing answers"):
        board.space.read(0, 1)


class Bus:
    """A page each of RAM, ROM, a ROM device, a device, a reservation and nothing, one after the other."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.registers = ByteDevice(PAGE_SIZE, valid=AccessSizes(1, 4))
        self.flash_registers = ByteDevice(PAGE_SIZE)
        self.ram = self.memory.ram("ram", PAGE_SIZE)
        self.rom = self.memory.rom("rom", b"rom!" * (PAGE_SIZE // 4))
        self.flash = self.memory.rom_device("flash", b"f" * PAGE_SIZE, self.flash_registers)
        self.device = self.memory.mmio("device", PAGE_SIZE, self.registers)
        self.root = self.memory.container("root")
        kept = self.memory.reservation("kept", PAGE_SIZE)
        for number, region in enumerate([self.ram, self.rom, self.flash, self.device, kept]):
            self.root.add(region, number * PAGE_SIZE)
        self.space = self.memory.address_space("bus", self.root)


RAM, ROM, FLASH, DEVICE, KEPT, NOTHING = (number * PAGE_SIZE for number in range(6))


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.memory.close()


def calls(device: ByteDevice) -> list[tuple[str, int, int]]:
    return [call[:3] for call in device.calls]


def test_read_across_memory_and_a_device_takes_each_piece_from_who_answers(bus: Bus) -> None:  # A1 A2
    bus.registers.registers[:6] = b"device"

    assert bus.space.read(DEVICE - 3, 9) == b"fffdevice"
    assert calls(bus.registers) == [("read", 0, 4), ("read", 4, 2)]


def test_write_across_devices_reaches_each_with_what_it_accepts(bus: Bus) -> None:  # A1 A2 A6
    bus.space.write(DEVICE - 5, b"12345abcdefg")

    assert calls(bus.flash_registers) == [("write", 0xFFB, 1), ("write", 0xFFC, 4)]
    assert calls(bus.registers) == [("write", 0, 4), ("write", 4, 2), ("write", 6, 1)]
    assert bus.registers.registers[:7] == b"abcdefg"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_access_of_a_size_that_the_device_accepts_is_one_callback(bus: Bus, size: int) -> None:  # A2
    bus.space.write(DEVICE + 8, bytes(range(size)))
    assert bus.space.read(DEVICE + 8, size) == bytes(range(size))
    assert calls(bus.registers) == [("write", 8, size), ("read", 8, size)]


def test_device_seen_through_an_alias_hears_offsets_of_its_own(bus: Bus) -> None:  # A1 V2
    bus.root.add(bus.memory.alias("window", bus.device, 0x100, 0x100), 16 * PAGE_SIZE)

    bus.space.write(16 * PAGE_SIZE + 4, b"here")

    assert calls(bus.registers) == [("write", 0x104, 4)]


@pytest.mark.parametrize(
    ("address", "size", "where", "length"),
    [
        (NOTHING, 1, NOTHING, 1),
        (NOTHING - 4, 8, NOTHING, 4),
        (KEPT, 2, KEPT, 2),
        (KEPT - 2, 6, KEPT, 4),
        ((1 << 64) - 2, 4, (1 << 64) - 2, 4),
        (-4, 8, -4, 8),
    ],
)
def test_read_that_nobody_answers_is_an_error_that_says_where(
    bus: Bus, address: int, size: int, where: int, length: int
) -> None:  # A5 A7
    with pytest.raises(AccessError, match=rf"{length} bytes at {where:#x}$") as caught:
        bus.space.read(address, size)
    assert (caught.value.address, caught.value.size) == (where, length)


@pytest.mark.parametrize(
    ("address", "size", "where", "length"),
    [
        (ROM, 4, ROM, 4),
        (ROM - 4, 8, ROM, 4),
        (KEPT - 4, 8, KEPT, 4),
        (NOTHING - 4, 8, NOTHING, 4),
        (NOTHING, 8, NOTHING, 8),
        (RAM, 2 * PAGE_SIZE, ROM, PAGE_SIZE),
    ],
)
def test_write_that_is_refused_anywhere_writes_nothing(
    bus: Bus, address: int, size: int, where: int, length: int
) -> None:  # A5 A6 A7
    with pytest.raises(AccessError, match=rf"{length} bytes at {where:#x}$") as caught:
        bus.space.write(address, b"x" * size)

    assert (caught.value.address, caught.value.size) == (where, length)
    assert bus.space.read(RAM, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert bus.space.read(ROM, PAGE_SIZE) == b"rom!" * (PAGE_SIZE // 4)
    assert bus.registers.calls == bus.flash_registers.calls == []


@pytest.mark.parametrize("size", [1, 4, 6])
def test_device_that_refuses_is_named_with_the_address_of_the_access(bus: Bus, size: int) -> None:  # A5
    bus.registers.refused = frozenset({0x10})

    for access in (bus.space.read, lambda address, size: bus.space.write(address, bytes(size))):
        with pytest.raises(AccessError, match=r"'device'.* refuses the access: \d bytes at 0x3010$") as caught:
            access(DEVICE + 0x10, size)
        assert (caught.value.address, caught.value.size) == (DEVICE + 0x10, min(size, 4))
        assert "the device is asleep" in str(caught.value.__cause__)


def test_size_that_the_device_does_not_accept_is_refused_with_the_address(bus: Bus) -> None:  # A2 A5
    bus.registers.valid = AccessSizes(4, 4)
    with pytest.raises(AccessError, match=r"'device'.* refuses the access: 2 bytes at 0x3004$") as caught:
        bus.space.read(DEVICE + 4, 2)
    assert "2 bytes cannot be read at once" in str(caught.value.__cause__)
    assert bus.registers.calls == []


def test_what_comes_before_a_refusal_by_a_device_was_written(bus: Bus) -> None:  # A5
    bus.registers.refused = frozenset({4})
    with pytest.raises(AccessError):
        bus.space.write(DEVICE, b"12345678")
    assert bus.registers.registers[:8] == b"1234\0\0\0\0"


def test_other_errors_of_a_device_reach_who_asked(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(offset: int, size: int) -> int:
        raise GuestError("the guest asked for the impossible")

    monkeypatch.setattr(bus.registers, "read", fail)
    with pytest.raises(GuestError, match="the impossible"):
        bus.space.read(DEVICE, 1)


def test_access_of_a_negative_size_is_refused(bus: Bus) -> None:
    with pytest.raises(UsageError, match="an access of -4 bytes"):
        bus.space.read(RAM, -4)


def test_rom_device_is_read_as_memory_until_it_is_trapped(bus: Bus) -> None:  # A6
    bus.flash_registers.registers[:2] = b"r!"
    assert bus.space.read(FLASH, 2) == b"ff"
    assert bus.flash_registers.calls == []

    bus.flash.set_trapped(True)
    assert bus.space.read(FLASH, 2) == b"r!"

    bus.flash.set_trapped(False)
    assert bus.space.read(FLASH, 2) == b"ff"
    assert calls(bus.flash_registers) == [("read", 0, 2)]


@pytest.mark.parametrize("trapped", [False, True])
def test_write_to_a_rom_device_is_a_callback_and_marks_nothing(bus: Bus, trapped: bool) -> None:  # A6
    bus.memory.start_logging(TrackingReason.MIGRATION)
    bus.flash.test_and_clear_dirty(0, PAGE_SIZE, Client.MIGRATION)
    bus.flash.set_trapped(trapped)

    bus.space.write(FLASH + 4, b"data")

    assert calls(bus.flash_registers) == [("write", 4, 4)]
    assert bus.flash.block is not None
    assert bus.flash.block.array[4] == ord("f")
    assert not bus.flash.is_dirty(0, PAGE_SIZE, Client.MIGRATION)


def test_memory_shown_through_something_readonly_refuses_writes_there_only(bus: Bus) -> None:  # V3 A5
    window = bus.memory.alias("window", bus.ram, 0, PAGE_SIZE)
    window.set_readonly(True)
    bus.root.add(window, 16 * PAGE_SIZE)

    with pytest.raises(AccessError, match="refuses writes"):
        bus.space.write(16 * PAGE_SIZE, b"x")
    bus.space.write(RAM, b"x")
    assert bus.space.read(16 * PAGE_SIZE, 1) == b"x"


def test_address_space_that_was_removed_shows_nothing(bus: Bus) -> None:
    log: list[Told] = []
    bus.memory.register(Recorder(log), bus.space)
    log.clear()

    bus.memory.remove_address_space(bus.space)
    bus.memory.remove_address_space(bus.space)

    assert [told.callback for told in log][:7] == ["begin", *["region_del"] * 5, "commit"]
    assert bus.space not in bus.memory.address_spaces
    with pytest.raises(AccessError):
        bus.space.read(RAM, 1)
    with pytest.raises(UsageError, match="was removed"):
        bus.memory.register(Recorder(log), bus.space)


def test_address_space_that_is_removed_inside_a_transaction_shows_nothing_either(bus: Bus) -> None:
    follower = Follower()
    bus.memory.register(follower, bus.space)
    with bus.memory.transaction():
        bus.memory.remove_address_space(bus.space)
    follower.check_gone()
    with pytest.raises(AccessError):
        bus.space.read(RAM, 1)


bytes_moved = st.tuples(st.integers(0, 4 * PAGE_SIZE), st.integers(1, 24), st.booleans())


@given(
    steps=st.lists(bytes_moved, max_size=12),
    valid=st.sampled_from([AccessSizes(1, 1), AccessSizes(1, 4), AccessSizes(1, 8, unaligned=True)]),
    implemented=st.sampled_from([AccessSizes(1, 2), AccessSizes(2, 8), AccessSizes(8, 8)]),
)
def test_accesses_across_ranges_are_those_of_one_array(
    steps: list[tuple[int, int, bool]], valid: AccessSizes, implemented: AccessSizes
) -> None:  # A1 A2 A3
    memory = Memory()
    root = memory.container("root")
    orders: tuple[ByteOrder, ...] = ("little", "big")
    devices = [ByteDevice(PAGE_SIZE, valid=valid, implemented=implemented, byte_order=order) for order in orders]
    for number in range(5):
        if number % 2:
            root.add(memory.mmio(f"{number}", PAGE_SIZE, devices[number // 2]), number * PAGE_SIZE)
        else:
            root.add(memory.ram(f"{number}", PAGE_SIZE), number * PAGE_SIZE)
    space = memory.address_space("space", root)
    oracle = bytearray(5 * PAGE_SIZE)
    for step, (address, size, writes) in enumerate(steps):
        near_an_edge = max(address // PAGE_SIZE * PAGE_SIZE - size // 2, 0)
        if writes:
            data = bytes((step + n) % 256 for n in range(size))
            oracle[near_an_edge : near_an_edge + size] = data
            space.write(near_an_edge, data)
        assert space.read(near_an_edge, size) == oracle[near_an_edge : near_an_edge + size]
    assert space.read(0, 5 * PAGE_SIZE) == oracle
    memory.close()

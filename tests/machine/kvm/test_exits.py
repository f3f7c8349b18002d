import pytest
from support.running import (
    CODE,
    DEVICE,
    RESULT,
    VALUE,
    Access,
    MakeRunning,
    Recorder,
    listing,
    load,
    store,
    tell_offsets,
)
from support.waiting import BOUND

from dirtylog.errors import AccessError, DirtylogError, GuestError, UsageError
from dirtylog.machine import BootMode, RunState
from dirtylog.memory import AccessSizes, MemoryRegionOps
from dirtylog.units import MIB, PAGE_SIZE

SIZES = (1, 2, 4, 8)


@pytest.mark.parametrize("size", SIZES)
def test_memory_access_reaches_the_callback_whole(run: MakeRunning, size: int) -> None:  # A3
    guest, device = run(), Recorder()
    guest.map(device)

    guest.run(load(DEVICE + 0x18, size) + store(DEVICE + 0x1008, size), BootMode.LONG)

    assert device.accesses == [("read", 0x18, size), ("write", 0x1008, size, VALUE % (1 << 8 * size))]
    assert guest.result(8) == tell_offsets(0x18, size).ljust(8, b"\0")


NARROW, WIDE, WIDEST = AccessSizes(1, 1), AccessSizes(4, 4), AccessSizes(8, 8)
ANY = AccessSizes(1, 8)
ANYWHERE = AccessSizes(1, 8, unaligned=True)


@pytest.mark.parametrize(
    ("valid", "implemented", "offset", "size", "reads"),
    [
        (ANY, NARROW, 4, 4, [(4, 1), (5, 1), (6, 1), (7, 1)]),
        (ANY, WIDE, 5, 1, [(4, 4)]),
        (ANY, WIDE, 6, 2, [(4, 4)]),
        (ANY, WIDE, 8, 8, [(8, 4), (12, 4)]),
        (ANY, WIDEST, 12, 4, [(8, 8)]),
        (AccessSizes(1, 4), ANY, 8, 8, [(8, 4), (12, 4)]),
        (ANY, ANY, 2, 4, [(2, 2), (4, 2)]),
        (ANY, ANY, 3, 8, [(3, 1), (4, 4), (8, 2), (10, 1)]),
        (ANYWHERE, ANYWHERE, 3, 8, [(3, 8)]),
        (ANYWHERE, WIDE, 2, 4, [(0, 4), (4, 4)]),
        (ANY, ANY, PAGE_SIZE - 2, 4, [(PAGE_SIZE - 2, 2), (PAGE_SIZE, 2)]),
        (ANY, ANY, PAGE_SIZE - 4, 8, [(PAGE_SIZE - 4, 4), (PAGE_SIZE, 4)]),
        (
            ANYWHERE,
            ANYWHERE,
            PAGE_SIZE - 3,
            8,
            [(PAGE_SIZE - 3, 2), (PAGE_SIZE - 1, 1), (PAGE_SIZE, 4), (PAGE_SIZE + 4, 1)],
        ),
    ],
)
def test_access_is_cut_and_widened_to_what_the_device_implements(  # A2, A3
    run: MakeRunning, valid: AccessSizes, implemented: AccessSizes, offset: int, size: int, reads: list[tuple[int, int]]
) -> None:
    guest, device = run(), Recorder(valid, implemented)
    guest.map(device)

    guest.run(load(DEVICE + offset, size), BootMode.LONG)

    assert guest.result(8) == tell_offsets(offset, size).ljust(8, b"\0")
    assert [access[1:] for access in device.accesses] == reads


@pytest.mark.parametrize(
    ("implemented", "offset", "size", "accesses"),
    [
        (NARROW, 2, 2, [("write", 2, 1, 0x11), ("write", 3, 1, 0x22)]),
        (WIDE, 8, 8, [("write", 8, 4, 0x44332211), ("write", 12, 4, 0x88776655)]),
        (WIDE, 5, 1, [("read", 4, 4), ("write", 4, 4, 0x87861184)]),
        (ANY, 2, 4, [("write", 2, 2, 0x2211), ("write", 4, 2, 0x4433)]),
        (ANY, PAGE_SIZE - 1, 2, [("write", PAGE_SIZE - 1, 1, 0x11), ("write", PAGE_SIZE, 1, 0x22)]),
    ],
)
def test_write_is_cut_and_merged_into_what_the_device_implements(  # A3
    run: MakeRunning, implemented: AccessSizes, offset: int, size: int, accesses: list[Access]
) -> None:
    guest, device = run(), Recorder(implemented=implemented)
    guest.map(device)
    guest.run(store(DEVICE + offset, size), BootMode.LONG)
    assert device.accesses == accesses


@pytest.mark.parametrize("size", SIZES)
def test_registers_of_a_big_endian_device_have_its_byte_order(run: MakeRunning, size: int) -> None:  # A4
    guest, device = run(), Recorder(byte_order="big")
    guest.map(device)

    guest.run(load(DEVICE + 8, size) + store(DEVICE, size), BootMode.LONG)

    assert guest.result(size) == tell_offsets(8, size)
    assert device.written == [int.from_bytes(VALUE.to_bytes(8, "little")[:size], "big")]


def test_access_over_two_devices_and_nobody_is_each_ones_part(run: MakeRunning) -> None:  # A1
    guest, one, two = run(), Recorder(), Recorder()
    guest.map(one, 4)
    guest.map(two, 4, DEVICE + 4)

    guest.run(load(DEVICE + 2, 8) + store(DEVICE + 2, 8), BootMode.LONG)

    assert guest.result(8) == tell_offsets(2, 2) + tell_offsets(0, 4) + b"\xff\xff"
    assert one.accesses == [("read", 2, 2), ("write", 2, 2, 0x2211)]
    assert two.accesses == [("read", 0, 4), ("write", 0, 4, 0x66554433)]


def test_access_from_memory_into_a_device_is_each_ones_part(run: MakeRunning) -> None:  # A1
    guest, device = run(2 * MIB), Recorder()
    guest.map(device, PAGE_SIZE, 2 * MIB)
    guest.system.write(2 * MIB - 2, b"ab")

    guest.run(load(2 * MIB - 2, 4), BootMode.LONG)
    assert guest.result(8) == b"ab" + tell_offsets(0, 2) + bytes(4)
    guest.run(store(2 * MIB - 2, 8), BootMode.LONG)

    assert guest.system.read(2 * MIB - 2, 2) == b"\x11\x22"
    assert device.accesses[1:] == [("write", 0, 4, 0x66554433), ("write", 4, 2, 0x8877)]


def test_nobodys_addresses_read_as_ones_and_lose_writes(run: MakeRunning) -> None:  # A5, A7
    guest = run()
    guest.root.add(guest.memory.reservation("claimed", PAGE_SIZE), DEVICE + PAGE_SIZE)
    for address in (DEVICE + 8, DEVICE + PAGE_SIZE + 8):
        for size in SIZES:
            guest.run(store(address, size) + load(address, size), BootMode.LONG)
            assert guest.result(8) == b"\xff" * size + bytes(8 - size)


def test_access_of_a_refused_size_reads_as_ones_and_reaches_no_callback(run: MakeRunning) -> None:  # A2
    guest, device = run(), Recorder(valid=AccessSizes(4, 8))
    guest.map(device)
    guest.run(store(DEVICE, 2) + load(DEVICE, 2), BootMode.LONG)
    assert guest.result(8) == b"\xff\xff" + bytes(6)
    assert device.accesses == []


class Refusing(Recorder):
    """Refuses what touches bytes 4 to 7."""

    def read(self, offset: int, size: int) -> int:
        value = super().read(offset, size)
        self._refuse(offset, size)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        super().write(offset, size, value)
        self._refuse(offset, size)

    def _refuse(self, offset: int, size: int) -> None:
        if offset < 8 and offset + size > 4:
            raise AccessError("a hole in the registers", offset, size)


def test_refused_access_reads_as_ones_and_is_tried_once(run: MakeRunning) -> None:
    guest, device = run(), Refusing()
    guest.map(device)
    guest.run(load(DEVICE + 4, 4) + store(DEVICE + 4, 4), BootMode.LONG)
    assert guest.result(8) == b"\xff\xff\xff\xff\0\0\0\0"
    assert device.accesses == [("read", 4, 4), ("write", 4, 4, 0x44332211)]


def test_refusal_of_a_part_leaves_the_other_parts(run: MakeRunning) -> None:
    guest, device = run(), Refusing(valid=AccessSizes(1, 4))
    guest.map(device)
    guest.run(load(DEVICE, 8) + store(DEVICE + 4, 8), BootMode.LONG)
    assert guest.result(8) == tell_offsets(0, 4) + b"\xff\xff\xff\xff"
    assert device.written == [0x44332211, 0x88776655]


STRINGS_AT_PORT_510 = listing("""
    fc          cld
    66ba1005    mov $0x510, %dx
    be00100200  mov $0x21000, %esi
    b905000000  mov $5, %ecx
    f36e        rep outsb
    bf00000200  mov $0x20000, %edi
    b905000000  mov $5, %ecx
    f36c        rep insb
    be00100200  mov $0x21000, %esi
    b902000000  mov $2, %ecx
    66f36f      rep outsw
""")


def test_strings_go_through_ports_in_order(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map_ports(device, 2, 0x510)
    guest.system.write(0x21000, b"dirty")

    guest.run(STRINGS_AT_PORT_510)

    assert bytes(device.written[:5]) == b"dirty"
    assert guest.result(6) == b"\x80" * 5 + b"\0"
    assert device.accesses[5:10] == [("read", 0, 1)] * 5
    assert device.accesses[10:] == [("write", 0, 2, 0x6964), ("write", 0, 2, 0x7472)]


STRINGS_OVER_THE_DEVICE = listing("""
    fc          cld
    be000000d0  mov $0xd0000000, %esi
    bf00000200  mov $0x20000, %edi
    b903000000  mov $3, %ecx
    f3a5        rep movsl
    be02000200  mov $0x20002, %esi
    bf000100d0  mov $0xd0000100, %edi
    b904000000  mov $4, %ecx
    f3a4        rep movsb
""")


def test_strings_go_through_memory_of_a_device_in_order(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map(device)

    guest.run(STRINGS_OVER_THE_DEVICE)

    assert guest.result(12) == tell_offsets(0, 12)
    assert device.accesses[:3] == [("read", 0, 4), ("read", 4, 4), ("read", 8, 4)]
    assert device.accesses[3:] == [("write", 0x100 + at, 1, 0x82 + at) for at in range(4)]


LONG_AT_PORT_510 = listing("""
    ba10050000  mov $0x510, %edx
    b811223344  mov $0x44332211, %eax
    ef          out %eax, %dx
    ed          in %dx, %eax
    a300000200  mov %eax, 0x20000
""")


def test_wide_access_is_made_of_two_byte_devices(run: MakeRunning) -> None:  # A1
    guest = run()
    one, two = (Recorder(implemented=NARROW) for _ in range(2))
    guest.map_ports(one, 2, 0x510)
    guest.map_ports(two, 2, 0x512)

    guest.run(LONG_AT_PORT_510)

    assert one.accesses == [("write", 0, 1, 0x11), ("write", 1, 1, 0x22), ("read", 0, 1), ("read", 1, 1)]
    assert two.accesses == [("write", 0, 1, 0x33), ("write", 1, 1, 0x44), ("read", 0, 1), ("read", 1, 1)]
    assert guest.result(4) == tell_offsets(0, 2) * 2


def test_ports_that_nobody_has_read_as_ones_beside_those_of_a_device(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map_ports(device, 1, 0x512)
    guest.run(LONG_AT_PORT_510)
    assert guest.result(4) == b"\xff\xff\x80\xff"
    assert device.written == [0x33]


WRITE_ABOVE_THE_DEVICE = listing("""
    c705000010d000000100  movl $0x10000, 0xd0100000
""")


def test_device_may_read_and_write_memory_and_other_devices(run: MakeRunning) -> None:
    guest, other = run(), Recorder()

    class Copier(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            guest.system.write(RESULT, guest.system.read(value, 4) + guest.system.read(DEVICE + 4, 4))

    guest.map(other)
    guest.map(Copier(), 4, DEVICE + MIB)
    guest.run(WRITE_ABOVE_THE_DEVICE)
    assert guest.result(8) == guest.system.read(CODE, 4) + tell_offsets(4, 4)


class Raising(MemoryRegionOps):
    """Raises at every access."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, offset: int, size: int) -> int:
        raise self._error

    def write(self, offset: int, size: int, value: int) -> None:
        raise self._error


TOUCH = {
    "memory-read": listing("""
        a1000000d0  mov 0xd0000000, %eax
    """),
    "memory-write": listing("""
        a3000000d0  mov %eax, 0xd0000000
    """),
    "port-read": listing("""
        ba10050000  mov $0x510, %edx
        ec          in %dx, %al
    """),
    "port-write": listing("""
        ba10050000  mov $0x510, %edx
        ee          out %al, %dx
    """),
}
CLEAR_AL = bytes.fromhex("30c0")  # xor %al, %al
KEEP_AL = bytes.fromhex("a2 00000200")  # mov %al, 0x20000
touch = pytest.mark.parametrize("kind", TOUCH)


@touch
@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (GuestError("it asked for the end"), RunState.SHUTDOWN, "it asked for the end"),
        (UsageError("it cannot be"), RunState.INTERNAL_ERROR, "it cannot be"),
        (
            ZeroDivisionError("oops"),
            RunState.INTERNAL_ERROR,
            "a defect in dirtylog stopped a vCPU: ZeroDivisionError('oops')",
        ),
    ],
    ids=["guest-error", "dirtylog-error", "defect"],
)
def test_callback_that_fails_ends_the_guest(
    run: MakeRunning, kind: str, error: Exception, state: RunState, message: str
) -> None:
    guest = run()
    guest.map(Raising(error))
    guest.map_ports(Raising(error), 1, 0x510)

    guest.start(TOUCH[kind])
    assert guest.ended.wait(BOUND)

    assert guest.machine.state is state
    failure = guest.machine.failure
    assert isinstance(failure, DirtylogError)
    assert failure is error or failure.__cause__ is error
    assert str(failure) == message
    with pytest.raises(UsageError, match="has ended"):
        guest.machine.resume()


@touch
def test_callback_that_refuses_reads_as_ones_and_the_guest_goes_on(run: MakeRunning, kind: str) -> None:
    guest, error = run(), AccessError("not now", 0, 1)
    guest.map(Raising(error))
    guest.map_ports(Raising(error), 1, 0x510)
    guest.run(CLEAR_AL + TOUCH[kind] + KEEP_AL)
    assert guest.result(1) == (b"\0" if kind.endswith("write") else b"\xff")

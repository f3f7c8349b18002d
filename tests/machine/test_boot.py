from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.kvm import SerialOutput

from dirtylog.errors import UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import Segment
from dirtylog.machine import BootMode, KVMMachine, MachineState, PCMachine, UnicornMachine, boot_flat, boot_sector
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

SECTOR = bytes(510) + b"\x55\xaa"


class Unplugged(PCMachine):
    """A machine without a processor, which is not looked at before an image is refused."""

    def __init__(self, ram_size: int) -> None:
        super().__init__(ram_size, None)

    def set_entry(self, entry: int, mode: BootMode) -> None:
        raise NotImplementedError

    def save_state(self) -> MachineState:
        raise NotImplementedError

    def load_state(self, state: MachineState) -> None:
        raise NotImplementedError

    def _throttle(self, share: float) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.memory.close()


@contextmanager
def unplugged(ram_size: int) -> Iterator[Unplugged]:
    machine = Unplugged(ram_size)
    yield machine
    machine.close()


@pytest.fixture
def machine(kvm: KVM) -> Iterator[KVMMachine]:
    machine = KVMMachine(2 * MIB)
    yield machine
    machine.close()
    machine.memory.close()


@pytest.mark.parametrize(
    ("image", "ram_size", "message"),
    [
        (b"", MIB, "the image is empty"),
        (SECTOR[:-1], MIB, "is not a boot sector: its first 512 bytes do not end in 55 aa"),
        (SECTOR[1:], MIB, "is not a boot sector"),
        (bytes(512), MIB, "is not a boot sector"),
        (bytes(1024) + SECTOR, MIB, "is not a boot sector"),
        (SECTOR + bytes(MIB), MIB, r"the image of 1\.0 MiB does not fit in 1\.0 MiB of memory"),
        (SECTOR, PAGE_SIZE, "does not fit in .* of memory at 0x7c00"),
        (SECTOR, 28 * KIB, "does not fit in .* of memory at 0x7c00"),
    ],
)
def test_image_that_cannot_be_booted_is_refused(image: bytes, ram_size: int, message: str) -> None:
    with unplugged(ram_size) as machine, pytest.raises(UsageError, match=message):
        boot_sector(machine, image)


@pytest.mark.parametrize(
    ("image", "address", "entry", "mode", "message"),
    [
        (b"", 0, None, BootMode.REAL, "the image is empty"),
        (b"x", MIB, None, BootMode.PROTECTED, r"does not fit in 1\.0 MiB of memory at 0x100000"),
        (b"xx", MIB - 1, None, BootMode.PROTECTED, "does not fit"),
        (b"x", -1, None, BootMode.REAL, "does not fit"),
        (b"x", 4 * GIB, None, BootMode.PROTECTED, "does not fit"),
        (b"x", 0, MIB, BootMode.REAL, "the entry 0x100000 cannot be reached in real mode"),
        (b"x", 0, -1, BootMode.REAL, "cannot be reached in real mode"),
        (b"x", 0, 4 * GIB, BootMode.PROTECTED, "the entry 0x100000000 cannot be reached in protected mode"),
        (b"x", 0, 4 * GIB, BootMode.LONG, "the entry 0x100000000 cannot be reached in long mode"),
        (b"x", 0x1000, None, BootMode.LONG, "lies where long mode's page tables go, 0x1000 to 0x7000"),
        (b"x", 0x6FFF, None, BootMode.LONG, "lies where long mode's page tables go"),
        (bytes(0x1001), 0, None, BootMode.LONG, "lies where long mode's page tables go"),
    ],
)
def test_flat_image_that_cannot_be_started_is_refused(
    image: bytes, address: int, entry: int | None, mode: BootMode, message: str
) -> None:
    with unplugged(MIB) as machine, pytest.raises(UsageError, match=message):
        boot_flat(machine, image, address, entry=entry, mode=mode)


def test_memory_too_small_for_page_tables_is_refused() -> None:
    with unplugged(6 * PAGE_SIZE) as machine, pytest.raises(UsageError, match="long mode needs memory up to 0x7000"):
        boot_flat(machine, b"x", 0, mode=BootMode.LONG)


def test_image_too_large_comes_with_a_remedy() -> None:
    with unplugged(MIB) as machine, pytest.raises(UsageError) as caught:
        boot_flat(machine, bytes(2 * MIB), 0, mode=BootMode.REAL)
    assert caught.value.remedy == "give the machine more with --memory"


def test_boot_sector_starts_as_a_bios_starts_it(machine: KVMMachine) -> None:
    boot_sector(machine, SECTOR + b"more of the disk")

    regs, sregs = machine.boot_cpu.get_regs(), machine.boot_cpu.get_sregs()
    assert machine.system.read(0x7C00, 513) == SECTOR + b"\0"
    assert (sregs.cs.base, sregs.cs.selector, regs.rip) == (0, 0, 0x7C00)
    assert (regs.rdx & 0xFF, regs.rsp, regs.rflags) == (0x80, 0x7C00, 2)
    assert sregs.cr0 & 1 == 0
    assert {(segment.base, segment.selector) for segment in (sregs.ds, sregs.es, sregs.ss)} == {(0, 0)}


@pytest.mark.parametrize(
    ("entry", "selector", "offset"),
    [(0x500, 0, 0x500), (0xFFFF, 0, 0xFFFF), (0x10000, 0x1000, 0), (0x1234F, 0x1234, 0xF), (0xFFFF0, 0xFFFF, 0)],
)
def test_real_mode_entry_is_segment_and_offset(machine: KVMMachine, entry: int, selector: int, offset: int) -> None:
    boot_flat(machine, b"\xf4", entry, mode=BootMode.REAL)

    regs, sregs = machine.boot_cpu.get_regs(), machine.boot_cpu.get_sregs()
    assert (sregs.cs.selector, sregs.cs.base, regs.rip) == (selector, selector << 4, offset)
    assert machine.system.read(entry, 1) == b"\xf4"


def test_protected_mode_entry_has_flat_segments(machine: KVMMachine) -> None:
    boot_flat(machine, b"image", 0x1000, entry=0x1003, mode=BootMode.PROTECTED)

    regs, sregs = machine.boot_cpu.get_regs(), machine.boot_cpu.get_sregs()
    assert (regs.rip, sregs.cr0 & 0x8000_0001) == (0x1003, 1)
    assert machine.system.read(0x1000, 5) == b"image"

    def shape(segment: Segment) -> tuple[int, ...]:
        return segment.base, segment.limit, segment.db, segment.g, segment.present, segment.s

    segments = [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss]
    assert {shape(segment) for segment in segments} == {(0, 0xFFFFFFFF, 1, 1, 1, 1)}


@pytest.mark.parametrize("address", [0xFFF, 0x7000, 0x10_0000])
def test_long_mode_entry_has_a_64_bit_code_segment_and_paging(machine: KVMMachine, address: int) -> None:
    boot_flat(machine, b"x", address, mode=BootMode.LONG)

    regs, sregs = machine.boot_cpu.get_regs(), machine.boot_cpu.get_sregs()
    assert (regs.rip, regs.rsp, regs.rflags) == (address, 0x7C00, 2)
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.base) == (1, 0, 0)
    assert (sregs.cr0 & 0x8000_0001, sregs.cr4 & 0x20, sregs.efer & 0x500) == (0x8000_0001, 0x20, 0x500)
    assert sregs.cr3 == 0x1000


def translate(machine: KVMMachine, address: int) -> int | None:
    """What the page tables make of an address, by 2 MiB pages."""
    table = int(machine.boot_cpu.get_sregs().cr3)
    for shift in (39, 30, 21):
        index = address >> shift & 0x1FF
        entry = int.from_bytes(machine.system.read(table + 8 * index, 8), "little")
        if not entry & 1:
            return None
        assert entry & 2, "read-only"
        assert bool(entry & 0x80) is (shift == 21)
        table = entry & ~0xFFF
    return table + address % (2 * MIB)


def test_long_mode_maps_the_first_4_gib_to_themselves(machine: KVMMachine) -> None:
    boot_flat(machine, b"x", 0, mode=BootMode.LONG)
    inside = [0, 1, 2 * MIB - 1, 2 * MIB, GIB - 1, GIB, 2 * GIB + 0x12345, 3 * GIB, 0xD000_0000, 4 * GIB - 1]
    assert [translate(machine, address) for address in inside] == inside
    assert [translate(machine, address) for address in (4 * GIB, 512 * GIB, 1 << 47)] == [None] * 3


@pytest.mark.parametrize(
    ("mode", "address", "code"),
    [
        (BootMode.REAL, 0x600, "baf803 b021 ee f4"),  # mov $0x3f8, %dx; mov $'!', %al; out %al, %dx; hlt
        (BootMode.REAL, 0x20000, "baf803 b021 ee f4"),
        (BootMode.PROTECTED, 0x100000, "baf8030000 b021 ee f4"),
        # movabs $0x2100000000, %rax; shr $32, %rax; mov $0x3f8, %edx; out %al, %dx; hlt
        (BootMode.LONG, 0x7000, "48b80000000021000000 48c1e820 baf8030000 ee f4"),
        (BootMode.LONG, 0x100000, "48b80000000021000000 48c1e820 baf8030000 ee f4"),
    ],
)
@pytest.mark.parametrize("kind", ["kvm", "unicorn"])
def test_flat_image_runs(request: pytest.FixtureRequest, kind: str, mode: BootMode, address: int, code: str) -> None:
    output = SerialOutput()
    if kind == "kvm":
        request.getfixturevalue("kvm")
    make = KVMMachine if kind == "kvm" else UnicornMachine
    machine = make(2 * MIB, transmit=output.take)
    boot_flat(machine, bytes.fromhex(code), address, mode=mode)
    machine.resume()

    assert output.wait_for(1) == b"!"

    machine.close()
    machine.memory.close()

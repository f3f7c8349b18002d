import random

import pytest
from support.running import DONE, MakeEmulated
from unicorn import Uc
from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from dirtylog.errors import UsageError
from dirtylog.machine import BootMode
from dirtylog.machine.unicorn.registers import SIZES, at_entry, hidden_flags, read, write

_HIDDEN_FLAGS = slice(40 + 176, 40 + 180)
_OF_THE_MODE = ~(1 << 21)
"""All but that there are intercepts."""


@pytest.fixture
def uc() -> Uc:
    return Uc(const.UC_ARCH_X86, const.UC_MODE_64, x86.UC_CPU_X86_QEMU64)


def kept_flags(uc: Uc) -> int:
    return int.from_bytes(bytes(uc.context_save())[_HIDDEN_FLAGS], "little") & _OF_THE_MODE


@pytest.mark.parametrize("mode", BootMode)
def test_what_is_written_is_read(uc: Uc, mode: BootMode) -> None:
    registers = at_entry(0x1234, mode)
    write(uc, registers)
    assert read(uc) == registers


def test_every_part_of_a_state_is_carried(uc: Uc) -> None:
    chance = random.Random(1)  # noqa: S311 - not for secrets
    registers = at_entry(0x1234, BootMode.LONG)
    # What a processor keeps of these is less than their size.
    narrow = {"rflags", "cr0", "cr4", "efer", "mxcsr", "fpcw", "fptag", "fpsw", "sysenter_cs"}
    for name in SIZES.keys() - narrow:
        whole = not name.endswith(("dtr_selector", "dtr_flags"))
        limit = 16 if name in ("gdtr_limit", "idtr_limit") else 8 * SIZES[name]
        registers[name] = chance.getrandbits(limit) if whole else 0
    registers |= {"rflags": 0xCD7, "mxcsr": 0x9F80, "fpcw": 0x27F, "fptag": 0xC003, "fpsw": 0x3041, "sysenter_cs": 8}
    registers |= {f"fp{n}_mantissa": 1 << 63 | n for n in range(8)} | {f"fp{n}_exponent": 0x3FFF for n in range(8)}
    write(uc, registers)
    found = read(uc)
    different = {name: (hex(found[name]), hex(registers[name])) for name in SIZES if found[name] != registers[name]}
    assert different.keys() <= {"fptag"}  # which is computed from what registers hold


@pytest.mark.parametrize(
    ("code", "mode"),
    [
        ("", BootMode.REAL),
        ("b80010 8ed8 8ed0", BootMode.REAL),  # mov $0x1000, %ax; mov %ax, %ds; mov %ax, %ss
        ("", BootMode.PROTECTED),
        # mov %cr4, %eax; or $0x200, %eax; mov %eax, %cr4; mov %cr0, %eax; or $0xa, %eax; mov %eax, %cr0
        ("0f20e0 0d00020000 0f22e0 0f20c0 0d0a000000 0f22c0", BootMode.PROTECTED),
        ("", BootMode.LONG),
    ],
    ids=["real", "segments", "protected", "control", "long"],
)
def test_hidden_flags_are_those_that_unicorn_comes_to(run: MakeEmulated, code: str, mode: BootMode) -> None:
    guest = run()
    send = bytes.fromhex("baf803 b021 ee ebfe")  # mov $0x3f8, %dx; mov $'!', %al; out %al, %dx; jmp .
    guest.start(bytes.fromhex(code) + (send if mode is BootMode.REAL else DONE), mode)
    guest.output.wait_for(1)
    guest.machine.pause()
    engine = guest.machine._engine
    assert engine is not None
    assert kept_flags(engine._uc) == hidden_flags(engine.read_registers())


def test_segments_keep_what_the_descriptor_table_no_longer_says(run: MakeEmulated) -> None:
    """A guest in real mode with limits of protected mode, as boot loaders use it, is moved with them."""
    source, target = run(), run()
    # lgdt 0x8000 (at %cs * 16 + 0x20); enter protected mode; mov $8, %bx; mov %bx, %fs; leave it; store through %fs
    table = bytes.fromhex("0000000000000000 ffff00000093cf00")
    source.system.write(0x8000, (15).to_bytes(2, "little") + (0x8010).to_bytes(4, "little"))
    source.system.write(0x8010, table)
    store = "64 67 fe 83 00002000 66ff060050 ebf1"  # 1: incb %fs:0x200000(%ebx); incl 0x5000; jmp 1b
    source.start("0f01160080 0f20c0 0c01 0f22c0 bb0800 8ee3 24fe 0f22c0 6631db" + store, BootMode.REAL)
    source.wait_until_counted()
    source.machine.pause()
    source.system.write(0x8010, bytes(16))
    target.memory.blocks["pc.ram"].array[:] = source.memory.blocks["pc.ram"].array
    target.machine.load_state(source.machine.save_state())
    target.machine.resume()
    target.wait_until_counted()


@pytest.mark.parametrize(
    "change",
    [{"cr0": 1 << 31}, {"efer": 1 << 10}, {"cr0": 1 << 31 | 1, "efer": 1 << 8}, {"efer": 1 << 12}],
    ids=["paging unprotected", "long mode without paging", "paging without long mode", "svm"],
)
def test_state_that_no_processor_has_is_refused(uc: Uc, change: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        write(uc, at_entry(0, BootMode.REAL) | change)


def test_state_is_made_of_known_sizes() -> None:
    assert all(0 < size <= 16 for size in SIZES.values())
    assert at_entry(0, BootMode.REAL).keys() == SIZES.keys()

"""A processor's registers in Unicorn, as numbers by name: what a machine saves, moves and starts with.

Unicorn names most registers, but neither the hidden parts of segments (base, limit, attributes) nor the flags it keeps
of the mode that it translates for. Both are in the context that it saves. The layout below is that of QEMU's
CPUX86State, unchanged since before Unicorn 2; `has_layout` asks the library at hand. What a context holds besides,
pointers among it, never leaves the process: only named numbers do, each of a known size.

Unicorn returns in the same way from HLT as when it has run as far as it was told to. So the processor is told that it
runs under a hypervisor (AMD's SVM) that wants to hear of HLT, and of nothing else: then it comes as an exception, with
the instruction pointer still at the HLT. A guest sees nothing of it, unless it uses SVM itself.
"""

import copy
import struct
from typing import Final

from unicorn import Uc
from unicorn import x86_const as x86

from dirtylog.errors import UsageError
from dirtylog.machine.entry import (
    CODE_SELECTOR,
    CR0_PAGING,
    CR0_PROTECTION,
    CR4_PHYSICAL_ADDRESS_EXTENSION,
    DATA_SELECTOR,
    EFER_LONG_MODE,
    FIRST_HARD_DISK,
    PAGE_TABLES_ADDRESS,
    RFLAGS_RESERVED,
    STACK_TOP,
    BootMode,
    real_mode_address,
)

Registers = dict[str, int]

_GENERAL: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs")
_TABLES: Final = ("gdtr", "idtr", "ldtr", "tr")
_PARTS: Final = {"selector": 2, "base": 8, "limit": 4, "flags": 4}
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4")
_EFER: Final = 0xC000_0080

_PLAIN: Final = (
    dict.fromkeys((*_GENERAL, "rip", "rflags", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7", "fip", "fdp"), 8)
    | dict.fromkeys(("fpsw", "fpcw", "fptag", "fcs", "fds", "fop"), 2)
    | {"mxcsr": 4}
    | {f"xmm{n}": 16 for n in range(16)}
)
"""Read and written by Unicorn under these names, and their sizes."""

_MSRS: Final = {
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "misc_enable": 0x1A0,
    "pat": 0x277,
    "mtrr_default": 0x2FF,
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "fmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "tsc_aux": 0xC000_0103,
} | {f"mtrr_{number:x}": number for number in (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))}

SIZES: Final = (
    _PLAIN
    | dict.fromkeys((*_CONTROL, "efer"), 8)
    | {f"{name}_{part}": size for name in (*_SEGMENTS, *_TABLES) for part, size in _PARTS.items()}
    | {f"fp{n}_{part}": size for n in range(8) for part, size in (("mantissa", 8), ("exponent", 2))}
    | dict.fromkeys(_MSRS, 8)
)
"""All that a processor's state is made of: name → bytes."""

_HEADER: Final = 40  # of Unicorn's context, before the processor's
_GENERAL_AT: Final = _HEADER  # and the instruction pointer after them
_HIDDEN_FLAGS_AT: Final = _HEADER + 176
_SEGMENTS_AT: Final = _HEADER + 184
_CONTROL_AT: Final = _HEADER + 424
_EFER_AT: Final = _HEADER + 592
_INTERCEPTS_FROM_END: Final = 48
_SEGMENT: Final = struct.Struct("<I4xQII")

_CODE: Final = 0x9B << 8  # present, executable, readable, accessed, as in a descriptor's upper half
_DATA: Final = 0x93 << 8
_BIG: Final = 1 << 22
_LONG: Final = 1 << 21
_FLAT: Final = 1 << 23  # counts its limit in pages

_CR0_EXTENSION_TYPE: Final = 1 << 4
_EFER_ACTIVE: Final = 1 << 10
_EFER_SVM: Final = 1 << 12
_VIRTUAL_8086: Final = 1 << 17  # of RFLAGS


HALT_INTERCEPTED: Final = 0x178
"""The exception that stands for HLT."""
_INTERCEPT_HALT: Final = 1 << 24
_GUEST: Final = 1 << 21
"""Of the hidden flags: whether there are intercepts."""


def read(uc: Uc) -> Registers:
    """All registers of a processor that stands still."""
    registers: Registers = {name: uc.reg_read(_number(name)) for name in (*_PLAIN, *_CONTROL)}
    registers["efer"] = uc.reg_read(x86.UC_X86_REG_MSR, _EFER)
    for name, index in _MSRS.items():
        registers[name] = uc.reg_read(x86.UC_X86_REG_MSR, index)
    context = bytes(uc.context_save())
    for n, name in enumerate(_SEGMENTS):
        registers |= _named(name, _SEGMENT.unpack_from(context, _SEGMENTS_AT + n * _SEGMENT.size))
    for name in _TABLES:
        registers |= _named(name, uc.reg_read(_number(name)))
    for n in range(8):
        registers[f"fp{n}_mantissa"], registers[f"fp{n}_exponent"] = uc.reg_read(_number(f"fp{n}"))
    return registers


def write(uc: Uc, registers: Registers) -> None:
    """The reverse of `read`. The caller flushes the TLB.

    Raises:
        UsageError: no processor can be in that state.
    """
    _check(registers)
    saved = uc.context_save()
    context = bytearray(bytes(saved))
    for n, name in enumerate(_SEGMENTS):
        parts = (registers[f"{name}_{part}"] for part in _PARTS)
        _SEGMENT.pack_into(context, _SEGMENTS_AT + n * _SEGMENT.size, *parts)
    struct.pack_into("<I", context, _HIDDEN_FLAGS_AT, hidden_flags(registers) | _GUEST)
    struct.pack_into("<Q", context, len(context) - _INTERCEPTS_FROM_END, _INTERCEPT_HALT)
    for name in _CONTROL:
        struct.pack_into("<Q", context, _CONTROL_AT + 8 * int(name[2:]), registers[name])
    struct.pack_into("<Q", context, _EFER_AT, registers["efer"])
    patched = copy.copy(saved)  # one that owns its memory, as Python sees it
    patched.__setstate__((bytes(context), saved.size, saved.arch, saved.mode))
    uc.context_restore(patched)
    for name in _PLAIN:
        uc.reg_write(_number(name), registers[name])
    for name in _TABLES:
        uc.reg_write(_number(name), tuple(registers[f"{name}_{part}"] for part in _PARTS))
    for n in range(8):
        uc.reg_write(_number(f"fp{n}"), (registers[f"fp{n}_mantissa"], registers[f"fp{n}_exponent"]))
    for name, index in _MSRS.items():
        uc.reg_write(x86.UC_X86_REG_MSR, (index, registers[name]))


def at_entry(entry: int, mode: BootMode) -> Registers:
    """What a processor starts a guest with: the state after a reset, but for what the mode is and wants."""
    registers = dict.fromkeys(SIZES, 0) | _AFTER_RESET
    registers |= {"rflags": RFLAGS_RESERVED, "rdx": FIRST_HARD_DISK, "rsp": STACK_TOP, "rip": entry}
    if mode is BootMode.REAL:
        selector, registers["rip"] = real_mode_address(entry)
        return registers | _named("cs", (selector, selector << 4, 0xFFFF, _CODE))
    registers["cr0"] |= CR0_PROTECTION
    for name in _SEGMENTS:
        registers |= _named(name, (DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA | _BIG | _FLAT))
    width = _BIG
    if mode is BootMode.LONG:
        registers["cr0"] |= CR0_PAGING
        registers["cr3"] = PAGE_TABLES_ADDRESS
        registers["cr4"] = CR4_PHYSICAL_ADDRESS_EXTENSION
        registers["efer"] = EFER_LONG_MODE
        width = _LONG
    return registers | _named("cs", (CODE_SELECTOR, 0, 0xFFFF_FFFF, _CODE | width | _FLAT))


def hidden_flags(registers: Registers) -> int:
    """What Unicorn keeps of a state to translate by: QEMU's hflags, as it computes them after loading a processor."""
    cr0, cr4, cs, ss = (registers[name] for name in ("cr0", "cr4", "cs_flags", "ss_flags"))
    flags = ss >> 13 & 3 | (cr0 & 1) << 7 | (cr0 & 0xE) << 8 | (cr4 >> 9 & 1) << 22 | (cr4 >> 21 & 1) << 23
    if registers["efer"] & _EFER_ACTIVE:
        flags |= 1 << 14
        if cs & _LONG:
            return flags | 1 << 15 | 1 << 4 | 1 << 5
    big_code = cs >> 22 & 1
    flags |= big_code << 4 | (ss >> 22 & 1) << 5
    bases = registers["ds_base"] | registers["es_base"] | registers["ss_base"]
    if not cr0 & 1 or registers["rflags"] & _VIRTUAL_8086 or not big_code or bases:
        flags |= 1 << 6
    return flags


def has_layout(uc: Uc) -> bool:
    """Whether a new processor's context is laid out as this module reads it. Leaves it as it was."""
    before = uc.context_save()
    expected = {_GENERAL_AT + 8 * n: (_number(name), 0x1111 * (n + 1)) for n, name in enumerate((*_GENERAL, "rip"))}
    expected |= {_CONTROL_AT + 8 * n: (_number(f"cr{n}"), 0x0123_4000 * n) for n in (2, 3)}
    expected |= {_SEGMENTS_AT + n * _SEGMENT.size + 8: (_number(f"{_SEGMENTS[n]}_base"), 0x5678 * n) for n in (4, 5)}
    for register, value in expected.values():
        uc.reg_write(register, value)
    context = bytes(uc.context_save())
    uc.context_restore(before)
    values = {at: value for at, (_, value) in expected.items()}
    values[_EFER_AT] = uc.reg_read(x86.UC_X86_REG_MSR, _EFER)
    found = {at: int.from_bytes(context[at : at + 8], "little") for at in values}
    hidden = int.from_bytes(context[_HIDDEN_FLAGS_AT : _HIDDEN_FLAGS_AT + 4], "little")
    return found == values and hidden == _FLAT_MODE


_FLAT_MODE: Final = 0xC0B0
"""The hidden flags of a new processor: 64-bit mode without paging, which no real one has."""

_AFTER_RESET: Final = (
    {"cr0": _CR0_EXTENSION_TYPE, "dr6": 0xFFFF_0FF0, "dr7": 0x400, "fpcw": 0x37F, "fptag": 0xFFFF, "mxcsr": 0x1F80}
    | {f"{name}_limit": 0xFFFF for name in (*_SEGMENTS, *_TABLES)}
    | {f"{name}_flags": _DATA for name in _SEGMENTS}
    | {"cs_flags": _CODE, "ldtr_flags": 0x82 << 8, "tr_flags": 0x8B << 8, "pat": 0x0007_0406_0007_0406}
)


def _check(registers: Registers) -> None:
    """Refuse what the reverse of `read` cannot have read, and what is not moved."""
    paging, active = registers["cr0"] & CR0_PAGING, registers["efer"] & _EFER_ACTIVE
    if (paging and not registers["cr0"] & CR0_PROTECTION) or bool(active) != bool(
        paging and registers["efer"] & 1 << 8
    ):
        raise UsageError(f"no processor has CR0 {registers['cr0']:#x} with EFER {registers['efer']:#x}")
    if registers["efer"] & _EFER_SVM:
        raise UsageError("a guest that uses SVM cannot be moved", remedy="run it under KVM")


def _named(name: str, parts: tuple[int, ...]) -> Registers:
    return {f"{name}_{part}": value for part, value in zip(_PARTS, parts, strict=True)}


def _number(name: str) -> int:
    return int(getattr(x86, f"UC_X86_REG_{name.upper()}"))

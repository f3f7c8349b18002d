"""Ways to start a guest from an image."""

from enum import Enum
from typing import Final

import numpy as np

from dirtylog.errors import UsageError
from dirtylog.linux.kvm_abi import Segment
from dirtylog.machine.kvm.machine import KVMMachine
from dirtylog.units import GIB, HUGE_PAGE_SIZE, PAGE_SIZE, format_size

BOOT_SECTOR_ADDRESS: Final = 0x7C00
BOOT_SECTOR_SIZE: Final = 512
_SIGNATURE: Final = b"\x55\xaa"
_FIRST_HARD_DISK: Final = 0x80
_RESERVED_FLAG: Final = 2

PAGE_TABLES_ADDRESS: Final = 0x1000
"""Where the page tables of `BootMode.LONG` are."""
PAGE_TABLES_SIZE: Final = 6 * PAGE_SIZE
_MAPPED: Final = 4 * GIB
_PRESENT_WRITABLE: Final = 0x03
_LARGE: Final = 0x80
_PROTECTION: Final = 1 << 0  # of CR0
_PAGING: Final = 1 << 31
_PHYSICAL_ADDRESS_EXTENSION: Final = 1 << 5  # of CR4
_LONG_MODE: Final = 1 << 8 | 1 << 10  # of EFER: enabled, and active


class BootMode(Enum):
    """The processor's mode at the entry of a flat image."""

    REAL = "real"
    PROTECTED = "protected"
    LONG = "long"


def boot_sector(machine: KVMMachine, image: bytes) -> None:
    """Start as a PC BIOS starts a disk: its first sector at 0x7c00, in real mode, DL naming the disk.

    There is no BIOS to call. The stack grows down from the sector.

    Raises:
        UsageError: the image is empty, larger than memory, or its first sector is not a boot sector.
    """
    _check_fits(machine, image, 0)
    if len(image) < BOOT_SECTOR_SIZE or image[BOOT_SECTOR_SIZE - 2 : BOOT_SECTOR_SIZE] != _SIGNATURE:
        raise UsageError(
            "the image is not a boot sector: its first 512 bytes do not end in 55 aa",
            remedy="give a flat image's load address with --load-address",
        )
    _check_fits(machine, image[:BOOT_SECTOR_SIZE], BOOT_SECTOR_ADDRESS)
    machine.system.write(BOOT_SECTOR_ADDRESS, image[:BOOT_SECTOR_SIZE])
    _start_at(machine, BOOT_SECTOR_ADDRESS, BootMode.REAL)


def boot_flat(machine: KVMMachine, image: bytes, address: int, *, entry: int | None = None, mode: BootMode) -> None:
    """Start a flat image at ``entry``, its load address if None.

    In real mode the code segment is 0 below 64 KiB, else the one in which the entry has offset 0 to 15. In protected
    mode segments are flat and 32 bits wide, paging is off, and there is no descriptor table yet. In long mode the code
    segment is a 64-bit one, and the first 4 GiB are mapped to themselves by page tables from 0x1000 to 0x7000: a PML4,
    a page directory pointer table, and four page directories of 2 MiB pages. The stack grows down from 0x7c00.

    Raises:
        UsageError: the image is empty, does not fit in memory at that address, or lies where the page tables go; or
            the mode cannot reach the entry.
    """
    _check_fits(machine, image, address)
    entry = address if entry is None else entry
    if not 0 <= entry < (1 << 20 if mode is BootMode.REAL else _MAPPED):
        raise UsageError(f"the entry {entry:#x} cannot be reached in {mode.value} mode")
    if mode is BootMode.LONG:
        _write_page_tables(machine, address, len(image))
    machine.system.write(address, image)
    _start_at(machine, entry, mode)


def _check_fits(machine: KVMMachine, image: bytes, address: int) -> None:
    if not image:
        raise UsageError("the image is empty", remedy="name a boot image; 'dirtylog guest' writes one")
    low = machine.system.view.ranges[0]
    if address < 0 or address + len(image) > low.end:
        raise UsageError(
            f"the image of {format_size(len(image))} does not fit in {format_size(low.size)} of memory at {address:#x}",
            remedy="give the machine more with --memory",
        )


def _write_page_tables(machine: KVMMachine, address: int, size: int) -> None:
    """Map the first 4 GiB to themselves, by tables as in section 5.3 of the AMD64 manual's volume 2."""
    end = PAGE_TABLES_ADDRESS + PAGE_TABLES_SIZE
    if end > machine.system.view.ranges[0].end:
        raise UsageError(f"long mode needs memory up to {end:#x}", remedy="give the machine more with --memory")
    if address < end and address + size > PAGE_TABLES_ADDRESS:
        raise UsageError(
            f"the image at {address:#x} lies where long mode's page tables go, {PAGE_TABLES_ADDRESS:#x} to {end:#x}",
            remedy="load it elsewhere with --load-address",
        )
    entries = np.zeros(PAGE_TABLES_SIZE // 8, "<u8")
    pml4, pointers, directories = np.split(entries, [PAGE_SIZE // 8, 2 * PAGE_SIZE // 8])
    pml4[0] = PAGE_TABLES_ADDRESS + PAGE_SIZE | _PRESENT_WRITABLE
    pointers[: _MAPPED // GIB] = np.arange(PAGE_TABLES_ADDRESS + 2 * PAGE_SIZE, end, PAGE_SIZE) | _PRESENT_WRITABLE
    directories[:] = np.arange(0, _MAPPED, HUGE_PAGE_SIZE) | _LARGE | _PRESENT_WRITABLE
    machine.system.write(PAGE_TABLES_ADDRESS, entries.tobytes())


def _start_at(machine: KVMMachine, entry: int, mode: BootMode) -> None:
    cpu = machine.boot_cpu
    sregs, regs = cpu.get_sregs(), cpu.get_regs()
    if mode is BootMode.REAL:
        paragraph = 0 if entry < 1 << 16 else entry >> 4
        sregs.cs.selector, sregs.cs.base = paragraph, paragraph << 4
        regs.rip = entry - (paragraph << 4)
    else:
        sregs.cr0 |= _PROTECTION
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            _make_flat(segment, selector=0x10, code=False)
        _make_flat(sregs.cs, selector=0x08, code=True)
        regs.rip = entry
    if mode is BootMode.LONG:
        sregs.cr0 |= _PAGING
        sregs.cr3 = PAGE_TABLES_ADDRESS
        sregs.cr4 |= _PHYSICAL_ADDRESS_EXTENSION
        sregs.efer |= _LONG_MODE
        sregs.cs.l, sregs.cs.db = 1, 0
    regs.rflags = _RESERVED_FLAG
    regs.rdx = _FIRST_HARD_DISK
    regs.rsp = BOOT_SECTOR_ADDRESS
    cpu.set_sregs(sregs)
    cpu.set_regs(regs)


def _make_flat(segment: Segment, *, selector: int, code: bool) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type = 0xB if code else 0x3  # accessed, and executable and readable, or writable
    segment.present, segment.dpl, segment.db, segment.s, segment.l, segment.g = 1, 0, 1, 1, 0, 1

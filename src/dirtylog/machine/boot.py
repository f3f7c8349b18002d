"""Ways to start a guest from an image."""

from typing import Final

import numpy as np

from dirtylog.errors import UsageError
from dirtylog.machine.entry import PAGE_TABLES_ADDRESS, BootMode
from dirtylog.machine.pc import PCMachine
from dirtylog.units import GIB, HUGE_PAGE_SIZE, PAGE_SIZE, format_size

BOOT_SECTOR_ADDRESS: Final = 0x7C00
BOOT_SECTOR_SIZE: Final = 512
_SIGNATURE: Final = b"\x55\xaa"

PAGE_TABLES_SIZE: Final = 6 * PAGE_SIZE
_MAPPED: Final = 4 * GIB
_PRESENT_WRITABLE: Final = 0x03
_LARGE: Final = 0x80


def boot_sector(machine: PCMachine, image: bytes) -> None:
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
    machine.set_entry(BOOT_SECTOR_ADDRESS, BootMode.REAL)


def boot_flat(machine: PCMachine, image: bytes, address: int, *, entry: int | None = None, mode: BootMode) -> None:
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
    machine.set_entry(entry, mode)


def _check_fits(machine: PCMachine, image: bytes, address: int) -> None:
    if not image:
        raise UsageError("the image is empty", remedy="name a boot image; 'dirtylog guest' writes one")
    low = machine.system.view.ranges[0]
    if address < 0 or address + len(image) > low.end:
        raise UsageError(
            f"the image of {format_size(len(image))} does not fit in {format_size(low.size)} of memory at {address:#x}",
            remedy="give the machine more with --memory",
        )


def _write_page_tables(machine: PCMachine, address: int, size: int) -> None:
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

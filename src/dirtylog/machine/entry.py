"""How a processor starts a guest: the modes, and what is where on an x86 then."""

from enum import Enum
from typing import Final

STACK_TOP: Final = 0x7C00
"""Where the stack grows down from: under a boot sector, as a PC BIOS leaves it."""
PAGE_TABLES_ADDRESS: Final = 0x1000
"""Where the page tables of `BootMode.LONG` are."""
FIRST_HARD_DISK: Final = 0x80
"""What a PC BIOS has in DL to name the disk that it boots."""
CODE_SELECTOR: Final = 0x08
DATA_SELECTOR: Final = 0x10
RFLAGS_RESERVED: Final = 1 << 1
CR0_PROTECTION: Final = 1 << 0
CR0_PAGING: Final = 1 << 31
CR4_PHYSICAL_ADDRESS_EXTENSION: Final = 1 << 5
EFER_LONG_MODE: Final = 1 << 8 | 1 << 10  # enabled, and active


class BootMode(Enum):
    """The processor's mode at the entry of a flat image."""

    REAL = "real"
    PROTECTED = "protected"
    LONG = "long"


def real_mode_address(address: int) -> tuple[int, int]:
    """Segment and offset of an entry: segment 0 below 64 KiB, else the one in which it has offset 0 to 15."""
    segment = 0 if address < 1 << 16 else address >> 4
    return segment, address - (segment << 4)

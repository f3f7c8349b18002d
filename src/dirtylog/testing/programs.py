"""Two programs for guests in flat 32-bit mode that write memory, and what is where in their memory."""

from typing import Final

from dirtylog.testing.board import LEAST, STAMPED
from dirtylog.units import KIB, MIB, PAGE_SIZE

CODE: Final = 64 * KIB
LIST: Final = CODE + PAGE_SIZE
LIST_END: Final = 128 * KIB
BOARD: Final = LIST_END
MEMORY: Final = 1 * MIB
"""Where the memory is that is tested."""

WRITE_LIST: Final = """
    ad            again: lodsl               # the address
    fe00          incb (%eax)
    e2fb          loop again
    f4            hlt
"""
"""Adds 1 to the byte at each of ECX addresses listed at ESI, then halts."""

STAMP: Final = """
    837b0400      again: cmpl $0, 4(%ebx)    # told to stand still?
    7538          jne still
    69f60d661900  imull $1664525, %esi, %esi # a linear congruential generator (Numerical Recipes), whose high bits are
    81c65ff36e3c  addl $1013904223, %esi     # the good ones
    89f0          movl %esi, %eax
    f7630c        mull 12(%ebx)              # below how many there are to write
    035308        addl 8(%ebx), %edx         # from the first of them on, and at the end from page 0 on
    3b5310        cmpl 16(%ebx), %edx
    7203          jb inside
    2b5310        subl 16(%ebx), %edx
    c1e20c        inside: shll $12, %edx
    3b2b          cmpl (%ebx), %ebp          # another round?
    7302          jae same
    8b2b          movl (%ebx), %ebp
    8d4501        same: leal 1(%ebp), %eax
    a9ffff0300    testl $0x3ffff, %eax       # not on into the next round's
    7402          jz store
    89c5          movl %eax, %ebp
    892c17        store: movl %ebp, (%edi, %edx)
    8929          movl %ebp, (%ecx)
    ebc2          jmp again
    f4            still: hlt
    ebbf          jmp again
"""
"""Stamps random pages of those that the board at EBX names, and notes each stamp at ECX, for ever; halts while it is to
stand still. EDI is where the stamp of page 0 is, ESI the generator's state, EBP the last stamp."""


def assembled(listing: str) -> bytes:
    """The bytes of a listing: a line an instruction, its bytes in hex and, after a space, its text."""
    return b"".join(bytes.fromhex(line.split()[0]) for line in listing.splitlines() if line.strip())


def stamp_registers(writer: int, place: int, seed: int) -> dict[str, int]:
    """What `STAMP` starts with; ``place`` is the index of the stamp among a page's 32-bit words."""
    return {
        "ebx": BOARD + 4 * LEAST,
        "ecx": BOARD + 4 * (STAMPED + 16 * writer),
        "ebp": 0,
        "esi": seed,
        "edi": MEMORY + 4 * place,
    }

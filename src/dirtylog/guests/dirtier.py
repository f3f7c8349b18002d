"""The dirtier: a boot sector that adds 1 to byte 0 of every page of a range, in ascending order, for ever.

``guests/dirtier.S`` is its source and says how it works; ``docs/guests.md`` how to use it.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dirtylog.errors import UsageError
from dirtylog.guests import sector

LOAD_ADDRESS: Final = sector.LOAD_ADDRESS
"""Where a PC BIOS loads a boot sector, and starts it in real mode."""

COUNTER_ADDRESS: Final = sector.COUNTER_ADDRESS
"""Where the guest counts completed rounds: a little-endian 64-bit word."""

STARTED_ADDRESS: Final = sector.STARTED_ADDRESS
STARTED: Final = sector.STARTED
"""What stands at ``STARTED_ADDRESS`` from the moment when the page rule and the counter hold."""

DEFAULT_RANGE: Final = sector.DEFAULT_RANGE
"""The range of the shipped image, as ``(first, last)``; ``last`` is the address after it."""


def build(first: int, last: int) -> bytes:
    """The boot sector, set to write the pages of ``[first, last)``.

    Args:
        first: address of the first page; the guest's own code and counter lie below 64 KiB.
        last: address after the last page; at most 3 GiB, where a PC's memory makes room for its devices.
    """
    return sector.build("dirtier.img", b"DLP1", first, last)


def check_pages(bytes_per_page: NDArray[np.uint8], rounds: int | None = None) -> str | None:
    """What breaks the dirtier's page rule, or None.

    The rule holds whenever the guest is stopped and its started marker is set: walking up, the bytes are equal, except
    that at one place at most the value drops by exactly 1 (mod 256). With the counter known, the values are known too:
    ``rounds + 1`` below that place and ``rounds`` above it.

    Args:
        bytes_per_page: byte 0 of each page of the range, in ascending order.
        rounds: the guest's round counter, read at the same stop.
    """
    if bytes_per_page.dtype != np.uint8 or bytes_per_page.ndim != 1 or bytes_per_page.size == 0:
        raise UsageError(
            f"the page rule wants a row of bytes, not {bytes_per_page.dtype} of shape {bytes_per_page.shape}",
            remedy="pass memory[first:last:PAGE_SIZE] of an uint8 array",
        )
    drops = np.flatnonzero(bytes_per_page[:-1] != bytes_per_page[1:])
    for page in drops[:2]:
        before, after = int(bytes_per_page[page]), int(bytes_per_page[page + 1])
        if (before - after) % 256 != 1:
            return f"page {page} holds {before} and page {page + 1} holds {after}, neither the same nor 1 less"
    if drops.size > 1:
        return f"the value drops more than once: after page {drops[0]} and again after page {drops[1]}"
    return None if rounds is None else _check_rounds(int(bytes_per_page[-1]), bool(drops.size), rounds)


def _check_rounds(last_page: int, in_round: bool, rounds: int) -> str | None:
    ahead = (last_page - rounds) % 256
    if ahead == 0 or (ahead == 1 and not in_round):
        return None
    return f"the last page holds {last_page}, which {rounds} completed rounds do not explain"

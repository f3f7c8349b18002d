"""What the tests of `dirtylog.watch` have in common."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from support.own_memory import require_soft_dirty, require_write_watch

from dirtylog.trackers.watch import TRACKERS, Written
from dirtylog.units import PAGE_SIZE

PAGES: Final = 100
EXACT: Final = [name for name in TRACKERS if name != "null"]
"""Those that report what was written, and nothing else."""

Array = npt.NDArray[Any]


def supported(name: str) -> str:
    """Skips the test where there is no such mechanism."""
    if name == "write-watch":
        require_write_watch()
    if name == "soft-dirty":
        require_soft_dirty()
    return name


def write(array: Array, *pages: int) -> bool:
    for page in pages:
        array.reshape(-1).view(np.uint8)[page * PAGE_SIZE] += 1
    return True


def pages(written: Written) -> list[int]:
    found: list[int] = written.pages.indices().tolist()
    return found

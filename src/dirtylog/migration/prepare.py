"""Memory made ready while a destination waits for its guest.

The first touch of a page costs more than receiving what belongs there: the kernel finds and clears it, and inside a
virtual machine its host does so again. A destination that waits has the time. What turns out to be zero in the guest
is given back as it would be anyway (M4).
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import HostError, KernelError
from dirtylog.linux.host import available_memory
from dirtylog.memory import RAMBlock
from dirtylog.units import HUGE_PAGE_SIZE

_SHARE: Final = 2
"""At most one part in so many of the memory that is free."""


class Preparer:
    """Populates blocks in a thread of its own, until it is stopped, done, or has taken half of what was free.

    Contents are not touched, so the blocks may be filled meanwhile. Where the host does not let it, it does nothing:
    what is not ready is made ready as it arrives.

    Args:
        blocks: what is to be populated, in this order.
        ready: for each block, a flag for each `HUGE_PAGE_SIZE` of it, set here once that is populated.
    """

    def __init__(self, blocks: Sequence[RAMBlock], ready: Sequence[npt.NDArray[np.bool_]]) -> None:
        self._blocks = blocks
        self._ready = ready
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prepare", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def stop(self) -> None:
        """Have it end with what it is at, which takes milliseconds; idempotent."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until it has ended; the blocks may be closed then."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(HostError, KernelError):  # no memory, no such call, or nobody tells what is free
            left = available_memory() // _SHARE
            for block, ready in zip(self._blocks, self._ready, strict=True):
                for index, start in enumerate(range(0, block.size, HUGE_PAGE_SIZE)):
                    size = min(HUGE_PAGE_SIZE, block.size - start)
                    left -= size
                    if left < 0 or self._stopped.is_set():
                        return
                    if not block.mapping.make_huge(start):
                        block.mapping.populate(start, size)
                    ready[index] = True

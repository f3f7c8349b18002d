"""Taking a share of its time from a vCPU.

As in QEMU (cpu-throttle.c) a vCPU runs for a slice of 10 ms, then stands still for as long as makes up the share:
share / (1 - share) slices. Each vCPU's slices are its own: they begin when it runs again, not at the ticks of a clock
that goes on while it comes late, so that a starved host does not make the share larger.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Final

SLICE: Final = 0.01
"""Seconds."""
MOST_THROTTLE: Final = 0.99


class Slices:
    """When a vCPU runs and when it stands still: arithmetic, without a clock of its own.

    Attributes:
        share: of its time that is taken from it; 0 for none.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._began = 0.0

    @property
    def rest(self) -> float:
        """Seconds to stand still after each slice."""
        return SLICE * self.share / (1 - self.share)

    @property
    def end(self) -> float:
        """When the slice is over that began last, or that will begin; never without a share."""
        return self._began + SLICE if self.share else math.inf

    def begin(self, moment: float) -> None:
        """A slice begins then."""
        self._began = moment


class Throttle:
    """Has a vCPU's thread stand still outside the guest.

    Args:
        changed: guards what the thread goes by, and is notified when that changes.
        wanted: whether the vCPU is to run; whatever it stands still for ends when it is not. Asked under ``changed``.
    """

    def __init__(self, changed: threading.Condition, wanted: Callable[[], bool]) -> None:
        self._changed = changed
        self._wanted = wanted
        self._slices = Slices()

    def set(self, share: float) -> None:
        """Take another share from now on: one that stands still for the old one goes by the new one at once."""
        with self._changed:
            if not self._slices.share:
                self._slices.begin(time.monotonic())
            self._slices.share = share
            self._changed.notify_all()

    @property
    def left(self) -> float:
        """Seconds until the slice is over, or since it was: negative then."""
        return self._slices.end - time.monotonic()

    def rest(self) -> None:
        """Stand still if the slice is over. For the vCPU's thread."""
        if self.left > 0:
            return
        with self._changed:
            began = time.monotonic()
            while self._wanted() and (left := began + self._slices.rest - time.monotonic()) > 0:
                self._slices.begin(time.monotonic() + left)
                self._changed.wait(left)
            self._slices.begin(time.monotonic())

    def stand_still(self, seconds: float) -> None:
        """Stand still for some time, which counts to no slice. For the vCPU's thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted(), seconds)
            self._slices.begin(time.monotonic())

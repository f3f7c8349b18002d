"""Taking a share of its time from a vCPU.

As in QEMU (cpu-throttle.c) a vCPU runs for a slice of 10 ms, then stands still for as long as makes up the share:
share / (1 - share) slices. Each vCPU's slices are its own: they begin when it goes on, not at the ticks of a clock
that does not care how late that is.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

SLICE: Final = 0.01
"""Seconds."""
MOST_THROTTLE: Final = 0.99
DEFAULT_PERIOD: Final = 1.0
"""Seconds between two adjustments of what a dirty limit costs."""


@dataclass(frozen=True, slots=True)
class DirtyLimit:
    """How one vCPU is limited.

    Attributes:
        cpu: its number.
        quota: MiB that it may write a second.
        rate: MiB that it wrote a second in the last period.
        penalty: seconds that it stands still whenever its ring is full.
        ring_full: seconds that it takes to fill its ring at the highest rate so far; 0 if none is known.
    """

    cpu: int
    quota: int
    rate: int = 0
    penalty: float = 0.0
    ring_full: float = 0.0


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

    def stand_still(self, seconds: Callable[[], float]) -> None:
        """Stand still for some time, which counts to no slice. For the vCPU's thread.

        Args:
            seconds: how long; asked anew after `look_again`, and a longer time is not taken then.
        """
        with self._changed:
            began, planned = time.monotonic(), seconds()
            while self._wanted() and (left := began + min(planned, seconds()) - time.monotonic()) > 0:
                self._changed.wait(left)
            self._slices.begin(time.monotonic())

    def look_again(self) -> None:
        """Have a vCPU that stands still ask again for how long."""
        with self._changed:
            self._changed.notify_all()

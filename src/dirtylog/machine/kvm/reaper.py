"""A thread that takes what is in dirty rings before they are full."""

import threading
from collections.abc import Callable
from typing import Final

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.kvm.vcpu import PARK_TIMEOUT, failure_from

PERIOD: Final = 0.05
"""Seconds. Where KVM emulates a guest and notes each of its stores, a ring of the largest size is full after 0.1 s."""


class Reaper:
    """Calls ``reap`` again and again, so that a guest that nobody looks after need not leave for a full ring.

    Args:
        reap: takes what is there.
        failed: told what `reap` raised, in the thread, which ends with it.
        period: seconds between two calls.
    """

    def __init__(
        self, reap: Callable[[], None], failed: Callable[[DirtylogError], None], *, period: float = PERIOD
    ) -> None:
        self._reap = reap
        self._failed = failed
        self._period = period
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="reaper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._over.set()
        self._thread.join(PARK_TIMEOUT)
        if self._thread.is_alive():
            raise HostError(f"{self._thread.name} did not end within {PARK_TIMEOUT:.0f} s")

    def _main(self) -> None:
        try:
            while not self._over.wait(self._period):
                self._reap()
        except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave its rings to fill
            self._failed(failure_from(error))

"""A thread that does something again and again for a machine."""

import threading
from collections.abc import Callable

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.kvm.vcpu import PARK_TIMEOUT
from dirtylog.machine.machine import failure_from


class Ticker:
    """Calls ``tick`` until it is closed, or a call fails.

    Args:
        name: of the thread.
        tick: does it; the seconds until it is to be called again.
        failed: told what `tick` raised, in the thread, which ends with it.
    """

    def __init__(self, name: str, tick: Callable[[], float], failed: Callable[[DirtylogError], None]) -> None:
        self._tick = tick
        self._failed = failed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._over.set()
        self._thread.join(PARK_TIMEOUT)
        if self._thread.is_alive():
            raise HostError(f"{self._thread.name} did not end within {PARK_TIMEOUT:.0f} s")

    def _main(self) -> None:
        try:
            while not self._over.wait(self._tick()):
                pass
        except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave it without what was done
            self._failed(failure_from(error))

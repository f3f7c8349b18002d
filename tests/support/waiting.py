"""Waiting for what other threads and processes do, with a bound."""

import threading
import time
from collections.abc import Callable
from typing import Final

BOUND: Final = 30.0
"""Seconds until a test gives up on what should have happened. It takes milliseconds; the rest is for a busy host."""

_POLL_SECONDS: Final = 0.002


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return as soon as a condition holds; ``what`` says what was waited for, should it never."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(_POLL_SECONDS)


class Task:
    """Runs a callable in a thread of its own, and keeps what it raised."""

    def __init__(self, target: Callable[[], object]) -> None:
        self._target = target
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self._target()
        except BaseException as error:  # noqa: BLE001 - the test looks at it, whatever it is
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def error(self) -> BaseException | None:
        """What the callable raised, once it has ended."""
        self._thread.join(BOUND)
        assert not self._thread.is_alive(), f"{self._target} did not end"
        return self._error

    def join(self) -> None:
        """Wait for its end, and raise what it raised."""
        error = self.error()
        if error is not None:
            raise error

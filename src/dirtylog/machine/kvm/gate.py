"""Keeping vCPUs out of the guest while its memory slots change."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from dirtylog.errors import HostError

_TIMEOUT = 5.0


class RunGate:
    """Every vCPU enters it around KVM_RUN. `closed` waits until all are out, and lets none in meanwhile.

    A slot cannot be replaced in one step: it is deleted and made anew, and a guest that looks in between finds nothing.
    vCPUs that serve an exit, even one that waits for whoever closed the gate, are outside and hinder nobody.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closers = 0

    def __enter__(self) -> Self:
        with self._changed:
            self._changed.wait_for(lambda: not self._closers)
            self._inside += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def closed(self, kick: Callable[[], None]) -> Iterator[None]:
        """Keep all vCPUs out.

        Args:
            kick: makes those inside leave.

        Raises:
            HostError: one did not within some seconds.
        """
        with self._changed:
            self._closers += 1
        try:
            kick()
            with self._changed:
                if not self._changed.wait_for(lambda: not self._inside, _TIMEOUT):
                    raise HostError(f"a vCPU did not leave the guest within {_TIMEOUT:.0f} s")
            yield
        finally:
            with self._changed:
                self._closers -= 1
                self._changed.notify_all()

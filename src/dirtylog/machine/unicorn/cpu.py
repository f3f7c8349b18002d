"""A thread that runs an emulated processor, and can be stopped within a bound."""

import atexit
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.machine import failure_from
from dirtylog.machine.throttle import Throttle
from dirtylog.machine.unicorn.engine import Engine

PARK_TIMEOUT: Final = 5.0
"""Seconds until a processor that does not stop is reported. It takes milliseconds; the rest is for a starved host."""


class _Wish(Enum):
    PARK = auto()
    RUN = auto()
    QUIT = auto()


class EmulatedCPU:
    """Owns the thread that runs engines. It starts parked.

    The thread is in the guest for some milliseconds at a time, or outside: parked, halted, preparing, or in a callback
    of a device. Outside it hinders nobody, since it looks what is wanted before it goes back in.

    Args:
        name: of the thread.
        prepare: gives the engine to run, up to date; called outside the guest.
        ended: told what ended the guest, in its thread, which is parked then.

    Attributes:
        failure: what `ended` is told, known as soon as the processor stands still.
        throttle: takes time from it.
        in_callback: whether a device is being accessed; the guest is in the midst of an instruction then.
    """

    def __init__(self, name: str, prepare: Callable[[], Engine], ended: Callable[[DirtylogError], None]) -> None:
        self._prepare = prepare
        self._ended = ended
        self._changed = threading.Condition()
        self._wish = _Wish.PARK
        self._parked = True
        self._inside = False
        self._times_left = 0
        self._holders = 0
        self._outdated = False
        self._engine: Engine | None = None
        self.failure: DirtylogError | None = None
        self.throttle = Throttle(self._changed, lambda: self._wish is _Wish.RUN)
        self.in_callback = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def native_id(self) -> int:
        """The kernel's number of the thread."""
        return self._thread.native_id or 0

    def run(self) -> None:
        """Let the processor run."""
        atexit.register(self._quit)  # Unicorn is freed at the interpreter's exit, and must not run then
        self._wish_for(_Wish.RUN)

    def request_park(self) -> None:
        """Ask the processor to stop; `wait_parked` waits until it has."""
        self._wish_for(_Wish.PARK)

    def wait_parked(self) -> None:
        """Wait until the processor stands still.

        Raises:
            HostError: it did not within `PARK_TIMEOUT`.
        """
        self._wait_for(lambda: self._parked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it out of the guest.

        Raises:
            HostError: it did not leave within `PARK_TIMEOUT`.
        """
        with self._changed:
            self._holders += 1
        try:
            self._wait_for(lambda: not self._inside)
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    def refresh(self) -> None:
        """Have it prepare anew before it goes on in the guest. From a callback: before its next instruction.

        Raises:
            HostError: it did not leave the guest within `PARK_TIMEOUT`.
        """
        with self._changed:
            self._outdated = True
            times = self._times_left
        self._wait_for(lambda: not self._inside or self._times_left != times)

    def close(self) -> None:
        """Stop, and end the thread; idempotent. Not to be called by its own thread."""
        self._quit()
        atexit.unregister(self._quit)
        if self._thread.is_alive():
            raise HostError(f"{self._thread.name} did not end within {PARK_TIMEOUT:.0f} s")

    @contextmanager
    def callback(self) -> Iterator[None]:
        """For what the guest calls, in the processor's thread: outside the guest until it is done."""
        with self._changed:
            self.in_callback = True
            self._set_outside()
        try:
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self._holders)
                self._inside, self.in_callback = True, False
                if self._engine is not None and (self._outdated or self._wish is not _Wish.RUN):
                    self._engine.end_soon()

    def _quit(self) -> None:
        self._wish_for(_Wish.QUIT)
        self._thread.join(PARK_TIMEOUT)

    def _wish_for(self, wish: _Wish) -> None:
        with self._changed:
            if self._wish is not _Wish.QUIT:  # a close is final, whatever the guest or its machine still do
                self._wish = wish
                self._changed.notify_all()

    def _wait_for(self, done: Callable[[], bool]) -> None:
        if self._thread is threading.current_thread():  # it is outside, and will not go back in before it has looked
            return
        with self._changed:
            if not self._changed.wait_for(done, PARK_TIMEOUT):
                raise HostError(
                    f"{self._thread.name} did not stop within {PARK_TIMEOUT:.0f} s",
                    remedy="the host is overloaded, a device model blocks, or its memory is still to arrive",
                )

    def _main(self) -> None:
        while self._wait_to_run():
            try:
                self._run_until_parked()
            except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave it waiting for us
                self._fail(failure_from(error))

    def _wait_to_run(self) -> bool:
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wish is not _Wish.PARK)
            if self._wish is _Wish.QUIT:
                return False
            self._parked = False
            return True

    def _fail(self, error: DirtylogError) -> None:
        with self._changed:
            self.failure = error
            self._wish_for(_Wish.PARK)
            self._parked = True
            self._changed.notify_all()
        self._ended(error)

    def _run_until_parked(self) -> None:
        halted = False
        while self._wait_to_enter(halted):
            engine = self._engine = self._prepare()
            while not halted and self._enter():
                try:
                    halted = engine.run()
                finally:
                    with self._changed:
                        self._set_outside()

    def _wait_to_enter(self, halted: bool) -> bool:
        """Whether to go on: not if the processor is to park. Nothing else wakes one that has halted."""
        self.throttle.rest()
        with self._changed:
            self._changed.wait_for(lambda: not (halted or self._holders) or self._wish is not _Wish.RUN)
            self._outdated = False
            return self._wish is _Wish.RUN

    def _enter(self) -> bool:
        """Go into the guest, unless somebody wants otherwise."""
        with self._changed:
            wanted = self._wish is _Wish.RUN and self.throttle.left > 0
            self._inside = wanted and not (self._outdated or self._holders)
            return self._inside

    def _set_outside(self) -> None:
        self._inside = False
        self._times_left += 1
        self._changed.notify_all()

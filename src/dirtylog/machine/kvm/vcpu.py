"""A thread that runs one vCPU, and can be stopped within a bound."""

import signal
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from dirtylog.errors import DirtylogError, HostError
from dirtylog.linux.kvm import KICK_SIGNAL, VCPU
from dirtylog.linux.kvm_abi import ExitReason
from dirtylog.machine.kvm.gate import RunGate
from dirtylog.machine.machine import failure_from
from dirtylog.machine.throttle import SLICE, Throttle

PARK_TIMEOUT: Final = 5.0
"""Seconds until a vCPU that does not stop is reported. It takes microseconds; the rest is for a starved host."""

_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
"""Signals that the thread itself causes."""


class _Wish(Enum):
    PARK = auto()
    RUN = auto()
    QUIT = auto()


class VCPUThread:
    """Owns a vCPU and the thread that runs it. It starts parked.

    To stop, the kernel is told twice, since either alone has a gap: ``immediate_exit`` is seen by a KVM_RUN that has
    not begun, a signal by one that has. The thread parks only after a KVM_RUN that returned for this, because KVM
    completes the last exit's I/O at the start of the next KVM_RUN: before that, registers are half-way.

    Args:
        vcpu: closed with the thread.
        name: of the thread.
        serve: does what the guest asked for at an exit. A DirtylogError that it raises ends the guest.
        ended: told when `serve` or KVM failed, in the vCPU's thread, which is parked then.
        gate: entered around KVM_RUN.

    Attributes:
        failure: what `ended` is told, known as soon as the vCPU stands still.
        throttle: takes time from it, as long as somebody calls `end_slice`.
    """

    def __init__(
        self,
        vcpu: VCPU,
        name: str,
        serve: Callable[[VCPU, int], None],
        ended: Callable[[DirtylogError], None],
        gate: RunGate,
    ) -> None:
        self.vcpu = vcpu
        self._gate = gate
        self._serve = serve
        self._ended = ended
        self._changed = threading.Condition()
        self._wish = _Wish.PARK
        self._parked = True
        self.failure: DirtylogError | None = None
        self.throttle = Throttle(self._changed, lambda: self._wish is _Wish.RUN)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def native_id(self) -> int:
        """The kernel's number of the thread."""
        return self._thread.native_id or 0

    def run(self) -> None:
        """Let the vCPU run."""
        with self._changed:
            self._wish_for(_Wish.RUN)

    def kick(self) -> None:
        """Have the vCPU leave the guest, if it is there; unless told to stop, it comes back."""
        with self._changed:
            self._leave()

    def end_slice(self) -> float:
        """Have the vCPU leave the guest if its slice is over; in how many seconds to look again."""
        with self._changed:
            left = self.throttle.left
            if self._wish is not _Wish.RUN or left >= SLICE:
                return SLICE
            if left <= 0:
                self._leave()
            return max(left, SLICE / 10)

    def request_park(self) -> None:
        """Ask the vCPU to stop; `wait_parked` waits until it has. Ask all first, then wait for each."""
        self._request(_Wish.PARK)

    def wait_parked(self) -> None:
        """Wait until the vCPU stands still.

        Raises:
            HostError: it did not within `PARK_TIMEOUT`.
        """
        if self._thread is threading.current_thread():
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._parked, PARK_TIMEOUT):
                raise HostError(
                    f"{self._thread.name} did not stop within {PARK_TIMEOUT:.0f} s",
                    remedy="the host is overloaded, a device model blocks, or its memory is still to arrive",
                )

    def close(self) -> None:
        """Stop, end the thread, close the vCPU; idempotent. Not to be called by a vCPU's thread."""
        self._request(_Wish.QUIT)
        self._thread.join(PARK_TIMEOUT)
        if self._thread.is_alive():
            raise HostError(f"{self._thread.name} did not end within {PARK_TIMEOUT:.0f} s")
        self.vcpu.close()

    def _request(self, wish: _Wish) -> None:
        with self._changed:
            self._wish_for(wish)
            self._leave()

    def _leave(self) -> None:
        if not self._parked and self._thread.ident is not None:
            self.vcpu.request_exit(True)
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def _wish_for(self, wish: _Wish) -> None:
        if self._wish is not _Wish.QUIT:  # a close is final, whatever the guest or its machine still do
            self._wish = wish
            self._changed.notify_all()

    def _main(self) -> None:
        # KVM_RUN changes the mask twice. A thread that lets other signals through then takes some that were the main
        # thread's, which sleeps on: Python's handlers run in that thread only.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        self.vcpu.let_kick_through()
        while self._wait_to_run():
            try:
                self._run_until_kicked()
            except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave it waiting for us
                self._fail(failure_from(error))

    def _fail(self, error: DirtylogError) -> None:
        with self._changed:
            self.failure = error
            self._wish_for(_Wish.PARK)
            self._set_parked()
        self._ended(error)

    def _run_until_kicked(self) -> None:
        while True:
            self.throttle.rest()
            with self._gate:
                reason = self.vcpu.run()
            if reason != ExitReason.INTR:
                self._serve(self.vcpu, reason)
                continue
            signal.sigtimedwait((KICK_SIGNAL,), 0)
            with self._changed:
                if self._wish is not _Wish.RUN:
                    return
                self.vcpu.request_exit(False)  # it was only to get out of somebody's way

    def _wait_to_run(self) -> bool:
        with self._changed:
            self._set_parked()
            self._changed.wait_for(lambda: self._wish is not _Wish.PARK)
            if self._wish is _Wish.QUIT:
                return False
            self.vcpu.request_exit(False)
            self._parked = False
            return True

    def _set_parked(self) -> None:
        self._parked = True
        self._changed.notify_all()

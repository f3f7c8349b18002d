import signal
import threading
from collections.abc import Iterator

import pytest
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import DirtylogError, GuestError, HostError
from dirtylog.linux.kvm import KICK_SIGNAL, VCPU
from dirtylog.linux.kvm_abi import ExitReason
from dirtylog.machine.kvm import vcpu as vcpu_module
from dirtylog.machine.kvm.gate import RunGate
from dirtylog.machine.kvm.vcpu import VCPUThread
from dirtylog.machine.throttle import SLICE


class FakeVCPU(VCPU):
    """Runs a guest that does nothing but exit, until it is asked to stop; no KVM is needed."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.closed = threading.Event()
        self.runs = 0

    def run(self) -> int:
        self.runs += 1
        return ExitReason.INTR if self.asked.is_set() else ExitReason.IO

    def request_exit(self, on: bool) -> None:
        if on:
            self.asked.set()
        else:
            self.asked.clear()

    def let_kick_through(self) -> None:
        pass

    def close(self) -> None:
        self.closed.set()


class Bench:
    """A vCPU thread, and what it serves and how it ends."""

    def __init__(self) -> None:
        self.vcpu = FakeVCPU()
        self.served = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.raises: BaseException | None = None
        self.failures: list[DirtylogError] = []
        self.ended = threading.Event()
        self.gate = RunGate()
        self.thread = VCPUThread(self.vcpu, "vcpu0", self._serve, self._end, self.gate)

    def _serve(self, vcpu: VCPU, reason: int) -> None:
        assert (vcpu, reason) == (self.vcpu, ExitReason.IO)
        self.served.set()
        assert self.go_on.wait(BOUND)
        if self.raises is not None:
            raise self.raises

    def _end(self, error: DirtylogError) -> None:
        self.failures.append(error)
        self.ended.set()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.raises = None
    bench.go_on.set()
    bench.thread.close()


def test_thread_starts_parked_and_runs_only_when_told(bench: Bench) -> None:
    bench.thread.wait_parked()
    assert bench.vcpu.runs == 0
    bench.thread.run()
    assert bench.served.wait(BOUND)


def test_parked_thread_runs_no_more_until_it_is_told_again(bench: Bench) -> None:
    for _ in range(20):
        bench.served.clear()
        bench.thread.run()
        assert bench.served.wait(BOUND)

        bench.thread.request_park()
        bench.thread.wait_parked()
        runs = bench.vcpu.runs

        bench.thread.request_park()
        bench.thread.wait_parked()
        assert bench.vcpu.runs == runs


def test_vcpu_is_kept_out_by_the_gate_and_comes_back_when_it_opens(bench: Bench) -> None:
    bench.thread.run()
    assert bench.served.wait(BOUND)
    for _ in range(20):
        with bench.gate.closed(bench.thread.kick):
            runs = bench.vcpu.runs
            bench.served.clear()
            assert bench.vcpu.runs == runs
        assert bench.served.wait(BOUND)
        bench.served.clear()
        assert bench.served.wait(BOUND)


def test_kick_of_a_parked_vcpu_does_nothing(bench: Bench) -> None:
    bench.thread.wait_parked()
    bench.thread.kick()
    assert not bench.vcpu.asked.is_set()
    assert bench.vcpu.runs == 0


def test_defect_ends_the_guest_with_its_cause(bench: Bench) -> None:
    bench.raises = ZeroDivisionError("oops")
    bench.thread.run()
    assert bench.ended.wait(BOUND)
    (failure,) = bench.failures
    assert str(failure) == "a defect in dirtylog stopped a vCPU: ZeroDivisionError('oops')"
    assert failure.__cause__ is bench.raises


def test_failure_parks_the_thread_and_is_told_once(bench: Bench) -> None:
    bench.raises = GuestError("triple fault")
    bench.thread.run()
    assert bench.ended.wait(BOUND)

    bench.thread.wait_parked()
    assert bench.failures == [bench.raises]
    assert bench.thread.failure is bench.raises


def test_failure_is_known_as_soon_as_the_vcpu_stands_still(bench: Bench) -> None:
    bench.raises = GuestError("triple fault")
    bench.go_on.clear()
    bench.thread.run()
    assert bench.served.wait(BOUND)
    bench.thread.request_park()
    bench.go_on.set()

    bench.thread.wait_parked()

    assert bench.thread.failure is bench.raises


@pytest.mark.parametrize("error", [None, GuestError("triple fault")], ids=["runs", "fails"])
def test_close_ends_a_vcpu_whatever_it_is_doing(bench: Bench, error: GuestError | None) -> None:
    bench.raises = error
    bench.go_on.clear()
    bench.thread.run()
    assert bench.served.wait(BOUND)
    closer = Task(bench.thread.close)
    assert bench.vcpu.asked.wait(BOUND)  # the close has begun; only now does the guest fail, or stop
    bench.go_on.set()
    closer.join()

    assert bench.vcpu.closed.is_set()
    bench.thread.close()


def test_vcpu_that_does_not_stop_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu_module, "PARK_TIMEOUT", 0.01)
    bench.go_on.clear()
    bench.thread.run()
    assert bench.served.wait(BOUND)
    bench.thread.request_park()

    with pytest.raises(HostError, match="vcpu0 did not stop within") as caught:
        bench.thread.wait_parked()
    assert caught.value.remedy is not None
    with pytest.raises(HostError, match="vcpu0 did not end within"):
        bench.thread.close()
    monkeypatch.undo()


def test_kick_signal_is_blocked_only_in_vcpu_threads(bench: Bench) -> None:
    assert KICK_SIGNAL not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_vcpu_is_made_to_leave_when_its_slice_is_over_and_not_before(bench: Bench) -> None:
    bench.thread.run()
    assert bench.served.wait(BOUND)
    assert bench.thread.end_slice() == SLICE  # nobody takes time from it
    bench.go_on.clear()
    bench.thread.throttle.set(0.99)
    kicks = 0
    while not bench.vcpu.asked.is_set():
        assert 0 < bench.thread.end_slice() <= SLICE
        kicks += 1
    assert kicks > 1
    bench.go_on.set()


def test_vcpu_that_rests_stops_at_once(bench: Bench) -> None:
    bench.thread.run()
    bench.thread.throttle.set(0.99)
    for _ in range(20):
        wait_until(lambda: bench.thread.end_slice() == SLICE and bench.thread.throttle.left > SLICE, "it rested")
        bench.thread.request_park()
        bench.thread.wait_parked()
        assert bench.thread.end_slice() == SLICE
        bench.thread.run()

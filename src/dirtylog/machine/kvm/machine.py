"""A PC-like guest under KVM."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Final

from dirtylog.errors import ClosedError, DirtylogError, GuestError, HostError, UsageError
from dirtylog.linux.kvm import KVM, KVM_DEVICE, VCPU
from dirtylog.linux.kvm_abi import Capability, ExitReason
from dirtylog.linux.userfaultfd import USERFAULTFD_DEVICE
from dirtylog.machine.entry import BootMode
from dirtylog.machine.kvm.dirty_limit import DirtyLimiter
from dirtylog.machine.kvm.exits import ExitHandler
from dirtylog.machine.kvm.gate import RunGate
from dirtylog.machine.kvm.io import IOListener
from dirtylog.machine.kvm.registers import start_at
from dirtylog.machine.kvm.slots import MemorySlots
from dirtylog.machine.kvm.ticker import Ticker
from dirtylog.machine.kvm.vcpu import VCPUThread
from dirtylog.machine.machine import MachineState, RunState, failure_from
from dirtylog.machine.pc import PCMachine
from dirtylog.machine.throttle import DEFAULT_PERIOD, DirtyLimit
from dirtylog.memory import MemoryListener
from dirtylog.trackers import DirtyRings, KVMLogMode
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.trackers.kvm_ring import DEFAULT_RING_ENTRIES

REAP_PERIOD: Final = 0.05
"""Seconds. Where KVM emulates a guest and notes each of its stores, a ring of the largest size is full after 0.1 s."""


class KVMMachine(PCMachine):
    """vCPUs, interrupt controllers and timer in the kernel; a serial port and port 0x92 here.

    Args:
        ram_size: bytes, a whole number of pages.
        cpus: how many vCPUs.
        log_mode: how the dirty log behaves; the best that the kernel offers, but for rings, if None.
        ring_size: entries of each vCPU's ring, a power of two, where ``log_mode`` is `KVMLogMode.RING`.
        transmit: takes what the guest sends on its serial port, which goes nowhere if None. Must not block.
        device: where KVM is.

    Attributes:
        system: what the guest's physical addresses mean. More may be mapped in its root.
        ports: what the guest's port numbers mean. More may be mapped in its root.
        log_mode: how the dirty log behaves.
    """

    kind = "kvm-x86-pc"

    def __init__(
        self,
        ram_size: int,
        *,
        cpus: int = 1,
        log_mode: KVMLogMode | None = None,
        ring_size: int | None = None,
        transmit: Callable[[bytes], None] | None = None,
        device: str = KVM_DEVICE,
    ) -> None:
        if cpus < 1:
            raise UsageError(f"a machine of {cpus} vCPUs")
        if ring_size is not None and log_mode is not KVMLogMode.RING:
            raise UsageError(f"a ring size without dirty rings: {ring_size}", remedy="choose the dirty log 'ring'")
        self._rings: DirtyRings | None = None
        self._reaper: Ticker | None = None
        self._ticker: Ticker | None = None
        self._limiter: DirtyLimiter | None = None
        self._cpus: list[VCPUThread] = []
        self._listeners: tuple[MemoryListener, ...] = ()
        with ExitStack() as undo:
            self._kvm = undo.enter_context(KVM(device))
            self._vm = undo.enter_context(self._kvm.create_vm())
            super().__init__(ram_size, transmit)
            undo.callback(self.close)
            self.log_mode = choose_mode(self._vm, log_mode)
            self._vm.create_irqchip()
            self._exits = ExitHandler(self.system, self.ports, self._coalesced_writes)
            self._gate = RunGate()
            entries = DEFAULT_RING_ENTRIES if ring_size is None else ring_size
            if self.log_mode is KVMLogMode.RING:
                self._rings = DirtyRings(self._vm, self._vcpus_held, entries)
                self._reaper = Ticker("reaper", self._reap, self._guest_ended)
            self._follow()
            self._msr_indices = self._kvm.msr_indices()
            self._create_cpus(cpus)
            if self._rings is not None:
                self._limiter = DirtyLimiter(self._rings, entries, self.memory, self._guest_ended)
            undo.pop_all()

    def _follow(self) -> None:
        """Have KVM do what the address spaces say."""
        self._coalesced_page = self._vm.check(Capability.COALESCED_MMIO)
        slots = MemorySlots(self._vm, self._rings or self.log_mode).listener(self._vcpus_held)
        memory_io, port_io = IOListener(self._vm, pio=False), IOListener(self._vm, pio=True)
        for listener, space in ((slots, self.system), (memory_io, self.system), (port_io, self.ports)):
            self.memory.register(listener, space)
            self._listeners += (listener,)
        self.memory.flush = self._flush

    def _vcpus_held(self) -> AbstractContextManager[None]:
        def kick() -> None:
            for cpu in self._cpus:
                cpu.kick()

        return self._gate.closed(kick)

    def _coalesced_writes(self) -> Iterator[tuple[bool, int, bytes]]:
        if not self._cpus or not self._coalesced_page:
            return iter(())
        return self._cpus[0].vcpu.drain_coalesced(self._coalesced_page)

    def _flush(self) -> None:
        """Deliver the writes that were held back. What a device raises then ends the guest, as it does at an exit."""
        try:
            self._exits.flush()
        except Exception as error:  # noqa: BLE001 - the caller has no part in it
            self._guest_ended(failure_from(error))

    def _create_cpus(self, count: int) -> None:
        limit = self._kvm.check(Capability.MAX_VCPUS)
        if count > limit:
            raise HostError(f"KVM runs at most {limit} vCPUs, not {count}", remedy="ask for fewer with --cpus")
        cpuid = self._kvm.supported_cpuid()
        for index in range(count):
            cpu = VCPUThread(self._vm.create_vcpu(index), f"vcpu{index}", self._serve, self._guest_ended, self._gate)
            self._cpus.append(cpu)
            if self._rings is not None:
                self._rings.add(cpu.vcpu)
            cpu.vcpu.set_cpuid(cpuid)

    @property
    def boot_cpu(self) -> VCPU:
        """The vCPU that starts; for loaders, while the machine stands still."""
        return self._cpus[0].vcpu

    def dirty_pages(self) -> tuple[int, ...]:
        """For each vCPU, how many pages it wrote that were logged; see `DirtyRings.dirty_pages`. Two make a rate.

        Raises:
            UsageError: the machine has no dirty rings.
        """
        if self._closed:
            raise ClosedError("the machine was closed")
        if self._rings is None:
            raise self._without_rings()
        self._rings.reap()
        return self._rings.dirty_pages

    def _without_rings(self) -> UsageError:
        return UsageError(
            f"the dirty log {self.log_mode.value!r} does not tell vCPUs apart",
            remedy="start the machine with the dirty log 'ring'",
        )

    def check_postcopy(self, *, of_kernel: bool) -> None:
        """See `Machine.check_postcopy`."""
        if not of_kernel:
            raise HostError(
                "this process is not served the page faults that KVM takes for it",
                remedy=f"give it access to {USERFAULTFD_DEVICE}, or run 'sysctl vm.unprivileged_userfaultfd=1'",
            )

    @property
    def writer_threads(self) -> Sequence[int]:
        """See `Machine.writer_threads`."""
        return tuple(cpu.native_id for cpu in self._cpus)

    @property
    def dirty_limits(self) -> tuple[DirtyLimit, ...]:
        """See `Machine.dirty_limits`."""
        return () if self._limiter is None else self._limiter.limits

    @property
    def has_dirty_rings(self) -> bool:
        """See `Machine.has_dirty_rings`."""
        return self.log_mode is KVMLogMode.RING

    def limit_dirty_rate(self, quota: int, cpu: int | None = None, *, period: float = DEFAULT_PERIOD) -> None:
        """See `Machine.limit_dirty_rate`. What counts as written is what is in the rings, see `dirty_pages`."""
        if self._limiter is None:
            raise self._without_rings()
        with self._throttle_lock:
            if self._closed and quota:
                raise ClosedError("the machine was closed")
            self._limiter.limit(quota, cpu, period)
        for one in self._cpus:
            one.throttle.look_again()

    def set_entry(self, entry: int, mode: BootMode) -> None:
        """Set the boot vCPU's registers."""
        self._check_still()
        start_at(self.boot_cpu, entry, mode)

    def _reap(self) -> float:
        if self._rings is not None and not (self._limiter is not None and self._limiter.active):
            self._rings.reap()
        return REAP_PERIOD

    def _throttle(self, share: float) -> None:
        for cpu in self._cpus:
            cpu.throttle.set(share)
        if share and self._ticker is None:
            self._ticker = Ticker("throttle", self._end_slices, self._guest_ended)
        elif not share and self._ticker is not None:
            self._ticker.close()
            self._ticker = None

    def _end_slices(self) -> float:
        return min(cpu.end_slice() for cpu in self._cpus)

    def _run(self) -> None:
        for cpu in self._cpus:
            cpu.run()

    def _stop(self) -> None:
        for cpu in self._cpus:
            cpu.request_park()
        try:
            for cpu in self._cpus:
                cpu.wait_parked()
        except HostError:
            self._run()  # the state stays running, so let it be true
            raise
        self._flush()
        # A vCPU that failed meanwhile cannot say so itself before this thread lets the state lock go.
        for cpu in self._cpus:
            if cpu.failure is not None:
                self._guest_ended(cpu.failure)

    def _serve(self, vcpu: VCPU, reason: int) -> None:
        if reason == ExitReason.IO:
            self._exits.port_io(vcpu)
        elif reason == ExitReason.MMIO:
            self._exits.mmio(vcpu)
        elif reason == ExitReason.DIRTY_RING_FULL and self._rings is not None:
            self._ring_full(self._rings, vcpu)
        elif reason == ExitReason.SHUTDOWN:
            raise GuestError("the guest shut down by a triple fault", remedy="look for a fault in the guest's code")
        else:
            raise GuestError(_describe(vcpu, reason), remedy="see the kernel's log for what KVM could not do")

    def _ring_full(self, rings: DirtyRings, vcpu: VCPU) -> None:
        limiter = self._limiter if self._limiter is not None and self._limiter.active else None
        rings.make_room(vcpu, alone=limiter is not None)
        if limiter is not None:
            number = next(n for n, cpu in enumerate(self._cpus) if cpu.vcpu is vcpu)
            self._cpus[number].throttle.stand_still(lambda: limiter.penalty(number))

    def _guest_ended(self, error: DirtylogError) -> None:
        # This vCPU counts as parked already: whoever holds the lock while waiting for all to park does not wait for it.
        with self._state_lock:
            for cpu in self._cpus:
                cpu.request_park()
            self._end(RunState.SHUTDOWN if isinstance(error, GuestError) else RunState.INTERNAL_ERROR, error)

    def save_state(self) -> MachineState:
        """Registers of vCPUs, interrupt controllers, timer, clock, devices."""
        self._check_still()
        self._flush()
        state = {f"cpu{n}": cpu.vcpu.save_state(self._msr_indices) for n, cpu in enumerate(self._cpus)}
        state["kvm"] = self._vm.save_state()
        return state | self._save_devices()

    def load_state(self, state: MachineState) -> None:
        """The reverse of `save_state`."""
        self._check_still()
        self._check_parts(state, {f"cpu{n}" for n in range(len(self._cpus))} | {"kvm"})
        self._vm.load_state(state["kvm"])
        for n, cpu in enumerate(self._cpus):
            cpu.vcpu.load_state(state[f"cpu{n}"])
        self._load_devices(state)

    def close(self) -> None:
        """End the vCPUs, give KVM and the memory up."""
        self._closed = True
        self.memory.flush = None
        self.throttle(0)
        if self._limiter is not None:
            self._limiter.close()
        if self._reaper is not None:
            self._reaper.close()
        for cpu in self._cpus:
            cpu.close()
        with ExitStack() as last_first:
            for handle in (self.memory, self._kvm, self._vm):
                last_first.callback(handle.close)
            if self._rings is not None:
                last_first.callback(self._rings.close)
            for listener in reversed(self._listeners):
                last_first.callback(self.memory.unregister, listener)


def _describe(vcpu: VCPU, reason: int) -> str:
    names = {int(known): known.name for known in ExitReason}
    text = f"KVM cannot go on (exit {names.get(reason, reason)}"
    if reason == ExitReason.INTERNAL_ERROR:
        internal = vcpu.exit.internal
        data = " ".join(f"{value:#x}" for value in internal.data[: min(internal.ndata, 16)])
        text += f", suberror {internal.suberror}, data {data or 'none'}"
    elif reason == ExitReason.FAIL_ENTRY:
        text += f", hardware reason {vcpu.exit.hardware_entry_failure_reason:#x}"
    return f"{text}) at rip {vcpu.get_regs().rip:#x}"

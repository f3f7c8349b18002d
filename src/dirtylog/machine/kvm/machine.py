"""A PC-like guest under KVM."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from dirtylog.errors import DirtylogError, GuestError, UsageError
from dirtylog.linux.kvm import KVM, KVM_DEVICE, VCPU
from dirtylog.linux.kvm_abi import ExitReason
from dirtylog.machine.devices.port92 import Port92
from dirtylog.machine.devices.ports import PortBus, PortDevice
from dirtylog.machine.devices.serial import Serial
from dirtylog.machine.kvm.slots import MemorySlots
from dirtylog.machine.kvm.vcpu import VCPUThread
from dirtylog.machine.machine import Machine, MachineState, RunState
from dirtylog.memory import AddressSpace, Memory
from dirtylog.trackers import KVMLogMode
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.units import GIB

RAM_NAME: Final = "pc.ram"
LOW_RAM_LIMIT: Final = 3 * GIB
"""RAM beyond this is mapped from 4 GiB up; the interrupt controllers' registers are in between."""


def pc_memory(ram_size: int) -> tuple[Memory, AddressSpace]:
    """A memory with one RAM block laid out as a PC's, and the address space that shows it.

    Raises:
        UsageError: the size is not a positive whole number of pages.
        HostError: the host cannot map that much.
    """
    memory = Memory()
    ram = memory.ram(RAM_NAME, ram_size)
    root = memory.container("system")
    root.add(memory.alias("ram-below-4g", ram, 0, min(ram_size, LOW_RAM_LIMIT)), 0)
    if ram_size > LOW_RAM_LIMIT:
        root.add(memory.alias("ram-above-4g", ram, LOW_RAM_LIMIT, ram_size - LOW_RAM_LIMIT), 4 * GIB)
    return memory, memory.address_space("system", root)


class KVMMachine(Machine):
    """vCPUs, interrupt controllers and timer in the kernel; a serial port and port 0x92 here.

    Args:
        ram_size: bytes, a whole number of pages.
        cpus: how many vCPUs.
        log_mode: how the dirty log behaves; the best that the kernel offers if None.
        transmit: takes what the guest sends on its serial port, which goes nowhere if None. Must not block.
        device: where KVM is.

    Attributes:
        system: what the guest's physical addresses mean.
        log_mode: how the dirty log behaves.
    """

    kind = "kvm-x86-pc"

    def __init__(
        self,
        ram_size: int,
        *,
        cpus: int = 1,
        log_mode: KVMLogMode | None = None,
        transmit: Callable[[bytes], None] | None = None,
        device: str = KVM_DEVICE,
    ) -> None:
        if cpus < 1:
            raise UsageError(f"a machine of {cpus} vCPUs")
        self._cpus: list[VCPUThread] = []
        with ExitStack() as undo:
            self._kvm = undo.enter_context(KVM(device))
            self._vm = undo.enter_context(self._kvm.create_vm())
            memory, self.system = pc_memory(ram_size)
            super().__init__(memory)
            undo.callback(self.close)
            self._ports = PortBus()
            self._devices: tuple[PortDevice, ...] = (Serial(transmit or _discard), Port92())
            for port_device in self._devices:
                self._ports.attach(port_device)
            self.log_mode = choose_mode(self._vm, log_mode)
            self._vm.create_irqchip()
            self._slots = MemorySlots(self._vm, self.log_mode).listener()
            memory.register(self._slots, self.system)
            self._msr_indices = self._kvm.msr_indices()
            self._create_cpus(cpus)
            undo.pop_all()

    def _create_cpus(self, count: int) -> None:
        cpuid = self._kvm.supported_cpuid()
        for index in range(count):
            cpu = VCPUThread(self._vm.create_vcpu(index), f"vcpu{index}", self._serve, self._guest_ended)
            self._cpus.append(cpu)
            cpu.vcpu.set_cpuid(cpuid)

    @property
    def boot_cpu(self) -> VCPU:
        """The vCPU that starts; for loaders, while the machine stands still."""
        return self._cpus[0].vcpu

    def _run(self) -> None:
        for cpu in self._cpus:
            cpu.run()

    def _stop(self) -> None:
        for cpu in self._cpus:
            cpu.request_park()
        for cpu in self._cpus:
            cpu.wait_parked()
        # A vCPU that failed meanwhile cannot say so itself before this thread lets the state lock go.
        for cpu in self._cpus:
            if cpu.failure is not None:
                self._guest_ended(cpu.failure)

    def _serve(self, vcpu: VCPU, reason: int) -> None:
        if reason == ExitReason.IO:
            io = vcpu.exit.io
            self._ports.access(io.port, io.size, vcpu.io_data(), write=bool(io.direction))
        elif reason == ExitReason.MMIO:
            if not vcpu.exit.mmio.is_write:  # nobody answers: the bus floats high
                vcpu.exit.mmio.data[:] = (0xFF,) * 8
        elif reason == ExitReason.SHUTDOWN:
            raise GuestError("the guest shut down by a triple fault", remedy="look for a fault in the guest's code")
        else:
            raise GuestError(_describe(vcpu, reason), remedy="see the kernel's log for what KVM could not do")

    def _guest_ended(self, error: DirtylogError) -> None:
        # This vCPU counts as parked already: whoever holds the lock while waiting for all to park does not wait for it.
        with self._state_lock:
            for cpu in self._cpus:
                cpu.request_park()
            self._end(RunState.SHUTDOWN if isinstance(error, GuestError) else RunState.INTERNAL_ERROR, error)

    def save_state(self) -> MachineState:
        """Registers of vCPUs, interrupt controllers, timer, clock, devices."""
        state = {f"cpu{n}": cpu.vcpu.save_state(self._msr_indices) for n, cpu in enumerate(self._cpus)}
        state["kvm"] = self._vm.save_state()
        return state | {device.name: device.save_state() for device in self._devices}

    def load_state(self, state: MachineState) -> None:
        """The reverse of `save_state`."""
        names = {f"cpu{n}" for n in range(len(self._cpus))} | {"kvm"} | {device.name for device in self._devices}
        if state.keys() != names:
            odd = ", ".join(sorted(state.keys() ^ names))
            raise UsageError(
                f"the state is of another machine: only one side has {odd}",
                remedy="start both sides with equal options",
            )
        self._vm.load_state(state["kvm"])
        for n, cpu in enumerate(self._cpus):
            cpu.vcpu.load_state(state[f"cpu{n}"])
        for device in self._devices:
            device.load_state(state[device.name])

    def close(self) -> None:
        """End the vCPUs, give KVM and the memory up."""
        for cpu in self._cpus:
            cpu.close()
        self._vm.close()
        self._kvm.close()
        self.memory.close()


def _discard(data: bytes) -> None:
    del data


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

"""A PC-like guest in Unicorn."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from dirtylog.errors import DirtylogError, GuestError, HostError, UsageError
from dirtylog.machine.bus import read_bus, write_bus
from dirtylog.machine.entry import BootMode
from dirtylog.machine.machine import MachineState, RunState
from dirtylog.machine.pc import PCMachine
from dirtylog.machine.unicorn.cpu import EmulatedCPU
from dirtylog.machine.unicorn.engine import Engine, MappedRAM, check_unicorn, mapped_ram
from dirtylog.machine.unicorn.registers import SIZES, Registers, at_entry
from dirtylog.machine.unicorn.tracking import choose_tracker
from dirtylog.machine.unicorn.translations import HostWrites
from dirtylog.memory import AddressSpace, Client, MemoryListener, MemoryRegion
from dirtylog.trackers.own_memory import own_memory_listener


class UnicornMachine(PCMachine):
    """One emulated processor; a serial port and port 0x92. There are no interrupts: HLT halts for ever.

    Unicorn delivers no exceptions: one ends the guest.

    Args:
        ram_size: bytes, a whole number of pages.
        cpus: how many vCPUs: one.
        transmit: takes what the guest sends on its serial port, which goes nowhere if None. Must not block.
        tracker: what tells which pages the guest wrote, by a name of `TRACKERS`; the best that the host has if None.

    Attributes:
        tracker: the name of what tells which pages the guest wrote.
    """

    kind = "unicorn-x86-pc"

    def __init__(
        self,
        ram_size: int,
        *,
        cpus: int = 1,
        transmit: Callable[[bytes], None] | None = None,
        tracker: str | None = None,
    ) -> None:
        if cpus != 1:
            raise UsageError(f"Unicorn runs one vCPU, not {cpus}", remedy="use KVM for more")
        check_unicorn()
        self.tracker = choose_tracker(tracker)
        self._engine: Engine | None = None
        self._host_writes = HostWrites()
        self._listeners: tuple[MemoryListener, ...] = ()
        self._remapped_in_callback = False
        super().__init__(ram_size, transmit)
        self._cpu = EmulatedCPU("vcpu0", self._prepare, self._guest_ended)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._prepare()
            self._follow()
            undo.pop_all()

    def _follow(self) -> None:
        """Have the processor's memory be what the address space says, and hear of writes to it."""
        # What the guest writes into its own code, Unicorn sees by itself.
        tracked = own_memory_listener(self.tracker, self._cpu.held, clients=~Client.CODE)
        for listener in (_MapListener(self._map_changed), tracked):
            self.memory.register(listener, self.system)
            self._listeners += (listener,)
        self.memory.code_written = self._code_written
        self.memory.set_code_client(True)

    def _map_changed(self) -> None:
        if self._engine is not None and self._engine.ram != mapped_ram(self.system):
            self._remapped_in_callback |= self._cpu.in_callback
            self._cpu.refresh()

    def _code_written(self, region: MemoryRegion, first: int, count: int) -> None:
        self._host_writes.note(region, first, count)
        self._cpu.refresh()

    def _prepare(self) -> Engine:
        """The engine, with memory as the address space shows it, and no translations of what the host wrote over."""
        ram = mapped_ram(self.system)
        engine = self._engine
        if engine is None or engine.ram != ram:
            engine = self._replace(engine, ram)
        written = self._host_writes.take(engine.ram)
        if written:
            engine.drop_translations(written)
        return engine

    def _replace(self, old: Engine | None, ram: tuple[MappedRAM, ...]) -> Engine:
        engine = Engine(ram, _Bus(self._cpu, self.system, self.ports))
        engine.write_registers(at_entry(0, BootMode.REAL) if old is None else old.read_registers())
        if old is not None and self._remapped_in_callback:
            # What the rest of that instruction wrote came after what goes was collected for the last time (D1).
            for part in set(old.ram) - set(ram):
                part.region.set_dirty(part.offset, part.size)
        self._remapped_in_callback = False
        self._engine = engine
        return engine

    def set_entry(self, entry: int, mode: BootMode) -> None:
        """Set the processor's registers to those after a reset, and those of the mode."""
        with self._state_lock:
            self._check_still()
            self._prepare().write_registers(at_entry(entry, mode))

    def check_postcopy(self, *, of_kernel: bool) -> None:
        """Do not refuse: the guest's accesses are the process's own, and are made without the interpreter's lock."""
        del of_kernel

    @property
    def writer_threads(self) -> Sequence[int]:
        """See `Machine.writer_threads`."""
        return (self._cpu.native_id,)

    def _throttle(self, share: float) -> None:
        self._cpu.throttle.set(share)

    def _run(self) -> None:
        self._cpu.run()

    def _stop(self) -> None:
        self._cpu.request_park()
        try:
            self._cpu.wait_parked()
        except HostError:
            self._run()  # the state stays running, so let it be true
            raise
        # If it failed meanwhile it cannot say so itself before this thread lets the state lock go.
        if self._cpu.failure is not None:
            self._guest_ended(self._cpu.failure)

    def _guest_ended(self, error: DirtylogError) -> None:
        with self._state_lock:
            self._end(RunState.SHUTDOWN if isinstance(error, GuestError) else RunState.INTERNAL_ERROR, error)

    def save_state(self) -> MachineState:
        """Registers, and devices. A processor that has halted is at its HLT, and halts again."""
        with self._state_lock:
            self._check_still()
            registers = self._prepare().read_registers()
            cpu = {name: value.to_bytes(SIZES[name], "little") for name, value in registers.items()}
            return {"cpu0": cpu} | self._save_devices()

    def load_state(self, state: MachineState) -> None:
        """The reverse of `save_state`."""
        with self._state_lock:
            self._check_still()
            self._check_parts(state, {"cpu0"})
            registers = _parse(state["cpu0"])
            engine = self._prepare()
            engine.drop_all_translations()  # whoever filled memory need not have told
            engine.write_registers(registers)
            self._load_devices(state)

    def close(self) -> None:
        """End the processor, give the memory up."""
        self._closed = True
        self.memory.code_written = None
        self.throttle(0)
        self._cpu.close()
        with ExitStack() as last_first:
            last_first.callback(self.memory.close)
            for listener in reversed(self._listeners):
                last_first.callback(self.memory.unregister, listener)
        self._engine = None


class _MapListener(MemoryListener):
    """Comes before the trackers: what it lets go is no longer written when they collect from it for the last time."""

    priority = 0

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def commit(self) -> None:
        """The address space shows something else, perhaps."""
        self._changed()


class _Bus:
    """Carries what leaves the guest to the address spaces."""

    def __init__(self, cpu: EmulatedCPU, system: AddressSpace, ports: AddressSpace) -> None:
        self._cpu = cpu
        self._system = system
        self._ports = ports

    def read_port(self, port: int, size: int) -> int:
        return self._read(self._ports, port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        self._write(self._ports, port, size, value)

    def read_memory(self, address: int, size: int) -> int:
        return self._read(self._system, address, size)

    def write_memory(self, address: int, size: int, value: int) -> None:
        self._write(self._system, address, size, value)

    def _read(self, space: AddressSpace, address: int, size: int) -> int:
        with self._cpu.callback():
            return int.from_bytes(read_bus(space, address, size), "little")

    def _write(self, space: AddressSpace, address: int, size: int, value: int) -> None:
        with self._cpu.callback():
            write_bus(space, address, value.to_bytes(size, "little"))


def _parse(cpu: dict[str, bytes]) -> Registers:
    """A processor's state from a peer, each part of the size that it has."""
    if {name: len(value) for name, value in cpu.items()} != SIZES:
        raise UsageError("not the state of an emulated x86 processor", remedy="use the same dirtylog on both sides")
    return {name: int.from_bytes(value, "little") for name, value in cpu.items()}

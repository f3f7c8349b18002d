"""One Unicorn with a fixed map of memory, run a few milliseconds at a time.

Asked to stop by another thread, Unicorn may stop within an instruction, after its store, and execute it again later:
what it adds to memory is added twice. Told how many instructions to execute, it stops exactly between two of them; so
that is how it is run. A callback, too, has it stop there, by a hook that is called before the next instruction.

Memory is laid out once: where it changes, another engine is made and takes the registers over. Unicorn could unmap, but
walks each page of what goes, which takes for ever where nothing is mapped, and frees what a callback may be in.

Everything that is not RAM goes to callbacks, addresses where nothing is included, up to the end of what a page table
can name. Unicorn cuts accesses of devices to 4 bytes, and those that are not aligned to single bytes (writes) or to two
aligned ones (reads).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from unicorn import Uc, UcError
from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from dirtylog.errors import GuestError, HostError
from dirtylog.machine.entry import BootMode
from dirtylog.machine.unicorn import registers as cpu
from dirtylog.memory import AddressSpace, MemoryRegion
from dirtylog.units import MIB, PAGE_SIZE

T = TypeVar("T")

PHYSICAL_END: Final = 1 << 52
_CODE_BUFFER: Final = 64 * MIB
"""For translations; Unicorn would reserve a GiB."""
_NO_EXIT: Final = 0
_HLT: Final = b"\xf4"
_SLICE: Final = 0.002
"""About how many seconds `Engine.run` takes."""
_FEWEST_INSTRUCTIONS: Final = 1_000
_MOST_INSTRUCTIONS: Final = 1_000_000
_NOWHERE: Final = (1 << 64) - 1
_EXCEPTIONS: Final = {0: "a divide error", 3: "a breakpoint", 13: "a protection fault", 14: "a page fault"}


class Bus(Protocol):
    """Takes what leaves the guest. Called in the thread that runs it."""

    def read_port(self, port: int, size: int) -> int:
        """IN."""

    def write_port(self, port: int, size: int, value: int) -> None:
        """OUT."""

    def read_memory(self, address: int, size: int) -> int:
        """A read of what is not RAM."""

    def write_memory(self, address: int, size: int, value: int) -> None:
        """A write to what is not RAM, or is read-only."""


@dataclass(frozen=True, slots=True)
class MappedRAM:
    """Host memory at a guest address; ``memory`` keeps it, whatever becomes of its block."""

    start: int
    size: int
    host: int
    writable: bool
    region: MemoryRegion
    offset: int
    memory: memoryview = field(compare=False)

    @property
    def end(self) -> int:
        """The address after it."""
        return self.start + self.size


def mapped_ram(space: AddressSpace) -> tuple[MappedRAM, ...]:
    """What an address space shows of memory that the guest reads without a callback; whole pages only."""
    found = []
    for flat in space.view.ranges:
        section = space.section(flat).whole_pages()
        block = flat.region.block
        if section is not None and block is not None and section.direct:
            start, offset = section.offset_within_address_space, section.offset_within_region
            writable = not section.readonly and section.region.ops is None
            host = block.mapping.address + offset
            found.append(MappedRAM(start, section.size, host, writable, flat.region, offset, block.memory))
    return tuple(found)


def check_unicorn() -> None:
    """Whether the library at hand is such as `registers` takes it to be.

    Raises:
        HostError: it is not.
    """
    heard: list[int] = []

    def note(uc: Uc, number: int, _: object) -> None:
        heard.append(number)
        uc.emu_stop()

    try:
        uc = Uc(const.UC_ARCH_X86, const.UC_MODE_64, x86.UC_CPU_X86_QEMU64)
        uc.mem_map(0, PAGE_SIZE)
        uc.mem_write(0, _HLT)
        uc.hook_add(const.UC_HOOK_INTR, note)
        as_expected = cpu.has_layout(uc)
        cpu.write(uc, cpu.at_entry(0, BootMode.REAL))
        uc.emu_start(0, PAGE_SIZE, count=1)
    except UcError as error:
        raise HostError(f"Unicorn cannot run guests here: {error}") from error
    if not as_expected or heard != [cpu.HALT_INTERCEPTED]:
        raise HostError("this Unicorn keeps its processor in another way", remedy="install unicorn 2.1.4")


class Engine:
    """An x86-64 processor with memory. It belongs to one thread at a time.

    Args:
        ram: what is mapped, ascending.
        bus: where everything else goes.

    Raises:
        HostError: Unicorn cannot do that here.
    """

    def __init__(self, ram: tuple[MappedRAM, ...], bus: Bus) -> None:
        self.ram = ram
        self._bus = bus
        self._instructions = _FEWEST_INSTRUCTIONS
        self._exception: int | None = None
        self._failure: Exception | None = None
        self._end: int | None = None
        try:
            self._uc = Uc(const.UC_ARCH_X86, const.UC_MODE_64, x86.UC_CPU_X86_QEMU64)
            self._uc.ctl_set_tcg_buffer_size(_CODE_BUFFER)
            self._uc.ctl_exits_enabled(True)  # and none set: no address ends a run
            self._flat = self._uc.context_save()
            self._map()
            self._hook()
        except UcError as error:
            raise HostError(f"Unicorn cannot run the machine: {error}") from error

    def _map(self) -> None:
        for part in self.ram:
            self._uc.mem_map_ptr(part.start, part.size, const.UC_PROT_ALL, part.host)
            if not part.writable:
                self._uc.mem_protect(part.start, part.size, const.UC_PROT_READ | const.UC_PROT_EXEC)
        for start, end in self._gaps():
            self._uc.mmio_map(start, end - start, self._read, start, self._write, start)

    def _gaps(self) -> Iterator[tuple[int, int]]:
        start = 0
        for part in self.ram:
            if start < part.start:
                yield start, part.start
            start = part.end
        if start < PHYSICAL_END:
            yield start, PHYSICAL_END

    def _hook(self) -> None:
        add = self._uc.hook_add
        add(const.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        add(const.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        add(const.UC_HOOK_MEM_WRITE_PROT, self._write_readonly)
        add(const.UC_HOOK_INTR, self._interrupt)
        # With one hook of instructions, the one that counts, others that come later are not called.
        add(const.UC_HOOK_CODE, _never, None, _NOWHERE, _NOWHERE)

    def run(self) -> bool:
        """Run the guest for some milliseconds, or until it halts; whether it halted. It stays at the HLT then.

        Raises:
            GuestError: the guest did what Unicorn cannot do.
            Exception: what the bus raised.
        """
        self._exception = self._failure = None
        began = time.monotonic()
        try:
            self._uc.emu_start(self._rip(), _NO_EXIT, count=self._instructions)
        except UcError as error:
            raise GuestError(
                f"Unicorn cannot go on: {error}, at rip {self._rip():#x}", remedy="look for a fault in the guest's code"
            ) from error
        finally:
            self._forget_end()
        self._raise_failure()
        self._adapt(time.monotonic() - began)
        return self._halted()

    def end_soon(self) -> None:
        """Have `run` return before the next instruction. For those who are called by it."""
        if self._end is None:
            self._end = self._uc.hook_add(const.UC_HOOK_CODE, lambda uc, *_: uc.emu_stop())

    def _forget_end(self) -> None:
        if self._end is not None:
            self._uc.hook_del(self._end)
            self._end = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _adapt(self, seconds: float) -> None:
        if seconds < _SLICE / 2:
            self._instructions = min(2 * self._instructions, _MOST_INSTRUCTIONS)
        elif seconds > 2 * _SLICE:
            self._instructions = max(self._instructions // 2, _FEWEST_INSTRUCTIONS)

    def _halted(self) -> bool:
        if self._exception is None:
            return False
        if self._exception == cpu.HALT_INTERCEPTED:
            return True
        what = _EXCEPTIONS.get(self._exception, f"exception or interrupt {self._exception}")
        raise GuestError(
            f"the guest caused {what} at rip {self._rip():#x}, and Unicorn delivers none",
            remedy="look for a fault in the guest's code, or run it under KVM",
        )

    def read_registers(self) -> cpu.Registers:
        """The processor's state."""
        return cpu.read(self._uc)

    def write_registers(self, registers: cpu.Registers) -> None:
        """Set the processor's state.

        Raises:
            UsageError: no processor can be in it.
        """
        cpu.write(self._uc, registers)
        self._flush_tlb()

    def drop_translations(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Forget what was translated from ranges of guest-physical addresses, as (start, end)."""
        # Unicorn takes linear addresses. A new processor's are physical ones.
        guest = self._uc.context_save()
        self._uc.context_restore(self._flat)
        self._flush_tlb()
        for start, end in ranges:
            self._uc.ctl_remove_cache(start, end)
        self._uc.context_restore(guest)
        self._flush_tlb()

    def drop_all_translations(self) -> None:
        """Forget what was translated."""
        self._uc.ctl_flush_tb()

    def _flush_tlb(self) -> None:
        self._uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)

    def _rip(self) -> int:
        return int(self._uc.reg_read(x86.UC_X86_REG_RIP))

    def _in(self, _: Uc, port: int, size: int, __: object) -> int:
        return self._serve(lambda: self._bus.read_port(port, size)) or 0

    def _out(self, _: Uc, port: int, size: int, value: int, __: object) -> None:
        self._serve(lambda: self._bus.write_port(port, size, value & _ones(size)))

    def _read(self, _: Uc, offset: int, size: int, start: int) -> int:
        return self._serve(lambda: self._bus.read_memory(start + offset, size)) or 0

    def _write(self, _: Uc, offset: int, size: int, value: int, start: int) -> None:
        self._serve(lambda: self._bus.write_memory(start + offset, size, value & _ones(size)))

    def _write_readonly(self, _: Uc, _kind: int, address: int, size: int, value: int, __: object) -> bool:
        if address % size == 0:  # others come again, byte by byte
            self._serve(lambda: self._bus.write_memory(address, size, value & _ones(size)))
        return True

    def _serve(self, access: Callable[[], T]) -> T | None:
        """Do it, or have `run` raise what it raises: Unicorn is C, and cannot."""
        try:
            return access()
        except Exception as error:  # noqa: BLE001 - see above
            self._failure = self._failure or error
            self._uc.emu_stop()
            return None

    def _interrupt(self, uc: Uc, number: int, _: object) -> None:
        self._exception = number
        uc.emu_stop()


def _never(*_: object) -> None: ...


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1

"""Guests that run a few instructions given as bytes, and devices that write down what reaches them."""

import struct
import threading
from collections.abc import Callable
from typing import Any, Final, Self

import numpy as np
import pytest
from support.kvm import SerialOutput
from support.waiting import wait_until

from dirtylog.guests import dirtier
from dirtylog.linux.kvm import VCPU
from dirtylog.machine import BootMode, KVMMachine, PCMachine, RunState, UnicornMachine, boot_flat, boot_sector
from dirtylog.machine.kvm.exits import ExitHandler
from dirtylog.machine.pc import RAM_NAME
from dirtylog.memory import AccessSizes, MemoryRegion, MemoryRegionOps, PageBitmap
from dirtylog.memory.access import ByteOrder
from dirtylog.units import MIB, PAGE_SIZE

CODE: Final = 0x10000
"""Where the instructions are; 32-bit protected mode unless said."""
RESULT: Final = 0x20000
"""Where the programs of the tests leave what they read."""
COUNTER: Final = 0x5000
"""Where programs that run on count, in 32 bits."""
DEVICE: Final = 0xD000_0000
"""Where tests map what is not RAM."""

FIRST, LAST = 1 * MIB, 2 * MIB
"""What the dirtier writes in these tests: 256 pages, a few thousand rounds a second at least."""


def listing(text: str) -> bytes:
    """The bytes of an assembler's listing: a line an instruction, its bytes in hex and, after two spaces, its text."""
    return b"".join(bytes.fromhex(line.strip().partition("  ")[0]) for line in text.splitlines())


DONE: Final = listing("""
    66baf803  mov $0x3f8, %dx
    b021      mov $'!', %al
    ee        out %al, %dx
    ebfe      jmp .
""")
"""Says on the serial port that the program is through, and stays there; the same bytes in 32 and 64 bits."""


VALUE: Final = 0x8877_6655_4433_2211
"""What `store` writes, or its low bytes."""
_LOAD: Final = {1: "8a03", 2: "668b03", 4: "8b03", 8: "488b03"}  # mov (%rbx), %al or %ax or %eax or %rax
_STORE: Final = {1: "8803", 2: "668903", 4: "8903", 8: "488903"}  # mov %al or %ax or %eax or %rax, (%rbx)


def load(address: int, size: int) -> bytes:
    """Read from an address and leave the value at RESULT, in long mode."""
    return (
        b"\xbb"  # mov $address, %ebx
        + address.to_bytes(4, "little")
        + bytes.fromhex("31c0" + _LOAD[size])  # xor %eax, %eax; mov (%rbx), ...
        + bytes.fromhex("48890425 00000200")  # mov %rax, 0x20000
    )


def store(address: int, size: int, value: int = VALUE) -> bytes:
    """Write a value's low bytes, in long mode."""
    return (
        b"\xbb"  # mov $address, %ebx
        + address.to_bytes(4, "little")
        + bytes.fromhex("48b8")  # movabs $value, %rax
        + value.to_bytes(8, "little")
        + bytes.fromhex(_STORE[size])  # mov ..., (%rbx)
    )


class RunningPC:
    """A machine, and what it sends."""

    machine: PCMachine

    def __init__(self, make: Callable[..., PCMachine], ram_size: int, **options: Any) -> None:
        self.output = SerialOutput()
        self.ended = threading.Event()
        self.machine = make(ram_size, transmit=self.output.take, **options)
        self.memory, self.system = self.machine.memory, self.machine.system
        self.machine.observers.append(self._observe)

    def _observe(self, old: RunState, new: RunState) -> None:
        if new in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR):
            self.ended.set()

    def boot_dirtier(self) -> Self:
        boot_sector(self.machine, dirtier.build(FIRST, LAST))
        return self

    def map(self, ops: MemoryRegionOps, size: int = 2 * PAGE_SIZE, address: int = DEVICE) -> MemoryRegion:
        """A device in memory."""
        region = self.memory.mmio(f"device-{address:x}", size, ops)
        self.root.add(region, address)
        return region

    def map_ports(self, ops: MemoryRegionOps, size: int, port: int) -> MemoryRegion:
        """A device at ports."""
        region = self.memory.mmio(f"ports-{port:x}", size, ops)
        root = self.machine.ports.root
        assert root is not None
        root.add(region, port)
        return region

    @property
    def root(self) -> MemoryRegion:
        """What holds all that is seen in memory."""
        assert self.system.root is not None
        return self.system.root

    def start(self, code: str | bytes, mode: BootMode = BootMode.PROTECTED) -> Self:
        """Have it run some instructions."""
        image = bytes.fromhex(code) if isinstance(code, str) else code
        boot_flat(self.machine, image, CODE, mode=mode)
        self.machine.resume()
        return self

    def run(self, code: bytes, mode: BootMode = BootMode.PROTECTED) -> None:
        """Have it run some instructions to their end; it stands still again when this returns."""
        before = len(self.output.data)
        self.start(code + DONE, mode)
        self.output.wait_for(before + 1)
        self.machine.pause()

    def result(self, size: int, offset: int = 0) -> bytes:
        """What the program left."""
        return self.system.read(RESULT + offset, size)

    def word(self, address: int) -> int:
        """32 bits of memory."""
        return int.from_bytes(self.system.read(address, 4), "little")

    def wait_until_counted(self, counter: int = COUNTER) -> None:
        """Return once the program has counted on; so it runs."""
        start = self.word(counter)

        def counted() -> bool:
            assert not self.ended.is_set(), self.machine.failure
            return self.word(counter) != start

        wait_until(counted, "the guest counted on")

    def wait_for_rounds(self, more: int = 2) -> None:
        self.output.wait_for(len(self.output.data) + more)

    def wait_until_both_sent(self) -> None:
        while set(self.output.data) != set(b"12"):
            self.wait_for_rounds(1)

    @property
    def rounds(self) -> int:
        (rounds,) = struct.unpack("<Q", self.system.read(dirtier.COUNTER_ADDRESS, 8))
        return int(rounds)

    def violation(self) -> str | None:
        """What breaks the dirtier's page rule; the machine stands still."""
        assert self.system.read(dirtier.STARTED_ADDRESS, 4) == dirtier.STARTED
        memory = np.frombuffer(self.system.read(FIRST, LAST - FIRST), np.uint8)
        return dirtier.check_pages(memory[::PAGE_SIZE], self.rounds)

    def contents(self) -> bytes:
        return self.memory.blocks[RAM_NAME].array.tobytes()

    def harvest(self, name: str = RAM_NAME) -> list[int]:
        """The pages of a block that were written since the last harvest."""
        self.memory.sync_dirty_log()
        (region,) = [region for region in self.memory.ram_regions if region.name == name]
        assert region.block is not None
        found = PageBitmap(region.block.pages)
        region.harvest_dirty(found)
        return [int(page) for page in found.indices()]

    def close(self) -> None:
        self.machine.close()


class Running(RunningPC):
    """A machine under KVM."""

    machine: KVMMachine

    def __init__(self, ram_size: int = 4 * MIB, **options: Any) -> None:
        super().__init__(KVMMachine, ram_size, **options)


class Emulated(RunningPC):
    """A machine in Unicorn."""

    machine: UnicornMachine

    def __init__(self, ram_size: int = 4 * MIB, **options: Any) -> None:
        super().__init__(UnicornMachine, ram_size, **options)


MakeRunning = Callable[..., Running]
MakeEmulated = Callable[..., Emulated]


def count_exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The guest addresses of the memory accesses that left the guest."""
    seen: list[int] = []
    mmio = ExitHandler.mmio

    def watch(handler: ExitHandler, vcpu: VCPU) -> None:
        seen.append(vcpu.exit.mmio.phys_addr)
        mmio(handler, vcpu)

    monkeypatch.setattr(ExitHandler, "mmio", watch)
    return seen


Access = tuple[str, int, int] | tuple[str, int, int, int]
"""``("read", offset, size)`` or ``("write", offset, size, value)``."""


class Recorder(MemoryRegionOps):
    """Reads as bytes that tell their offsets, 0x80 at 0, in memory order; writes down every access."""

    def __init__(
        self,
        valid: AccessSizes = MemoryRegionOps.valid,
        implemented: AccessSizes = MemoryRegionOps.implemented,
        byte_order: ByteOrder = "little",
    ) -> None:
        self.valid, self.implemented, self.byte_order = valid, implemented, byte_order
        self.accesses: list[Access] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(tell_offsets(offset, size), self.byte_order)

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))

    @property
    def written(self) -> list[int]:
        """The values written, in order."""
        return [access[3] for access in self.accesses if len(access) == 4]


def tell_offsets(offset: int, size: int) -> bytes:
    """What a `Recorder` reads as."""
    return bytes((0x80 + at) % 256 for at in range(offset, offset + size))

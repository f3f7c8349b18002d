"""KVM in tests: descriptors counted, serial output awaited, and a guest that writes what it is told to."""

import gc
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import numpy as np
from support.require import require
from support.waiting import BOUND

from dirtylog.linux.kvm import KVM, VCPU
from dirtylog.linux.kvm_abi import Capability, ExitReason, Segment
from dirtylog.linux.kvm_ring import MIN_RING_ENTRIES
from dirtylog.machine.kvm.slots import MAX_SLOT_PAGES, MemorySlots
from dirtylog.memory import AddressSpace, Memory, MemoryRegion
from dirtylog.trackers import DirtyRings, KVMLogMode, TrackerListener
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.units import MIB, PAGE_SIZE

_CODE_ADDRESS: Final = 64 * MIB
_LIST_ADDRESS: Final = _CODE_ADDRESS + PAGE_SIZE
_WRITE_THE_LIST: Final = bytes.fromhex(
    "ad"  # next: lodsd
    "fe00"  # incb (%eax)
    "e2fb"  # loop next
    "f4"  # hlt
)


def open_descriptors() -> dict[str, str]:
    """This process's open descriptors, and what they are, but for those of garbage."""
    gc.collect()  # the traceback of what ended a vCPU keeps its mapping, and that a descriptor
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def make_flat(segment: Segment, *, code: bool, long: bool = False) -> None:
    """A segment that covers everything."""
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x08 if code else 0x10
    segment.type = 0xB if code else 0x3
    segment.present, segment.dpl, segment.db, segment.s, segment.l, segment.g = 1, 0, int(not long), 1, int(long), 1


def enter_protected_mode(vcpu: VCPU) -> None:
    """Flat 32-bit segments, no paging."""
    sregs = vcpu.get_sregs()
    sregs.cr0 |= 1
    make_flat(sregs.cs, code=True)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        make_flat(segment, code=False)
    vcpu.set_sregs(sregs)


class SerialOutput:
    """What a guest sent on its serial port; pass its ``take`` as ``transmit``."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._changed = threading.Condition()

    def take(self, data: bytes) -> None:
        with self._changed:
            self._data += data
            self._changed.notify_all()

    @property
    def data(self) -> bytes:
        with self._changed:
            return bytes(self._data)

    def wait_for(self, size: int) -> bytes:
        """The output, as soon as there are ``size`` bytes of it."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._data) >= size, BOUND), f"only {bytes(self._data)!r}"
            return bytes(self._data)


class KVMWorld:
    """`ModelWorld` on real KVM: slots and logs are the kernel's, and a vCPU writes.

    The vCPUs stand at a six-byte program in protected mode, without interrupt controllers, so that HLT ends KVM_RUN.
    They take turns to write. Rings, where there are some, are as small as can be.
    """

    def __init__(
        self, kvm: KVM, mode: KVMLogMode, pages: int, *, max_slot_pages: int = MAX_SLOT_PAGES, cpus: int = 1
    ) -> None:
        if mode is KVMLogMode.RING:
            require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")
        self.mode = mode
        self.vm = kvm.create_vm()
        choose_mode(self.vm, mode)
        self.rings = DirtyRings(self.vm, nullcontext, MIN_RING_ENTRIES) if mode is KVMLogMode.RING else None
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", pages * PAGE_SIZE)
        self.root = self.memory.container("root")
        self.root.add(self.memory.ram("code", 4 * PAGE_SIZE), _CODE_ADDRESS)
        self.system: AddressSpace = self.memory.address_space("system", self.root)
        slots = MemorySlots(self.vm, self.rings or mode, max_pages=max_slot_pages)
        self.listener: TrackerListener = slots.listener(nullcontext)
        self.memory.register(self.listener, self.system)
        self.vcpus = deque(self._create_vcpu(index) for index in range(cpus))
        self.ring_full_exits = 0
        self.system.write(_CODE_ADDRESS, _WRITE_THE_LIST)

    def _create_vcpu(self, index: int) -> VCPU:
        vcpu = self.vm.create_vcpu(index)
        if self.rings is not None:
            self.rings.add(vcpu)
        enter_protected_mode(vcpu)
        return vcpu

    def write(self, addresses: Sequence[int]) -> None:
        """Add 1 to the byte at each address, one after the other."""
        if not addresses:
            return
        self.system.write(_LIST_ADDRESS, np.array(addresses, "<u4").tobytes())
        vcpu = self.vcpus[0]
        self.vcpus.rotate()
        regs = vcpu.get_regs()
        regs.rip, regs.rsi, regs.rcx, regs.rflags = _CODE_ADDRESS, _LIST_ADDRESS, len(addresses), 2
        vcpu.set_regs(regs)
        while (reason := vcpu.run()) == ExitReason.DIRTY_RING_FULL and self.rings is not None:
            self.ring_full_exits += 1
            self.rings.make_room(vcpu)
        assert reason == ExitReason.HLT

    def close(self) -> None:
        self.memory.unregister(self.listener)
        if self.rings is not None:
            self.rings.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()

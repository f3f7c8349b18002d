"""Accesses that leave the guest, on their way to regions' callbacks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dirtylog.linux.kvm import VCPU
from dirtylog.machine.bus import read_bus, write_bus
from dirtylog.memory import AddressSpace

CoalescedWrites = Iterator[tuple[bool, int, bytes]]


class ExitHandler:
    """Carries accesses to the address spaces, one at a time for the whole machine.

    Where nothing answers, or what is there refuses, reads give ones and writes are lost, as on a bus nobody drives.
    Writes that KVM held back come before anything that came after them.

    Args:
        system: what physical addresses mean.
        ports: what ports mean.
        coalesced: the writes that were held back, each taken out as it is asked for.
    """

    def __init__(self, system: AddressSpace, ports: AddressSpace, coalesced: Callable[[], CoalescedWrites]) -> None:
        self._system = system
        self._ports = ports
        self._coalesced = coalesced
        self._lock = threading.RLock()
        self._busy = False

    def port_io(self, vcpu: VCPU) -> None:
        """One or more accesses to the same port."""
        io = vcpu.exit.io
        data = vcpu.io_data()
        with self._turn():
            for start in range(0, len(data), io.size):
                element = data[start : start + io.size]
                if io.direction:
                    write_bus(self._ports, io.port, bytes(element))
                else:
                    element[:] = read_bus(self._ports, io.port, io.size)

    def mmio(self, vcpu: VCPU) -> None:
        """An access to an address without a slot, or a write to a read-only one."""
        mmio = vcpu.exit.mmio
        with self._turn():
            if mmio.is_write:
                write_bus(self._system, mmio.phys_addr, bytes(mmio.data[: mmio.len]))
            else:
                mmio.data[: mmio.len] = read_bus(self._system, mmio.phys_addr, mmio.len)

    def flush(self) -> None:
        """Deliver the writes that were held back; from inside a callback nothing, since they came before its turn."""
        with self._turn():
            pass

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                yield
                return
            self._busy = True
            try:
                for pio, address, data in self._coalesced():
                    write_bus(self._ports if pio else self._system, address, data)
                yield
            finally:
                self._busy = False

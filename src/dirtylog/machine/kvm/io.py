"""Eventfds and coalesced writes of an address space, done by KVM."""

import os
from typing import Final

from dirtylog.linux.ioctl import kernel_error
from dirtylog.linux.kvm import VM
from dirtylog.linux.kvm_abi import IOEventFD, IOEventFDFlag
from dirtylog.memory import MemoryListener, MemoryRegionSection


class IOListener(MemoryListener):
    """Has KVM signal eventfds, and hold coalesced writes back, in one address space: memory's, or the ports' (pio).

    KVM wants an eventfd's descriptor to let go of it too. So each is duplicated: its owner may have closed it by then.
    """

    priority = 10

    def __init__(self, vm: VM, *, pio: bool) -> None:
        self._vm = vm
        self._pio = pio
        self._flag: Final = IOEventFDFlag.PIO if pio else IOEventFDFlag(0)
        self._assigned: dict[tuple[int, int, bool, int, int], IOEventFD] = {}

    def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        """KVM_IOEVENTFD."""
        own = _duplicate(eventfd)
        try:
            assigned = self._eventfd(section, match_data, data, own)
            self._vm.assign_eventfd(assigned, assign=True)
        except BaseException:
            os.close(own)
            raise
        self._assigned[_key(section, match_data, data, eventfd)] = assigned

    def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        """KVM_IOEVENTFD with the flag to deassign; nothing for one that KVM refused to assign."""
        assigned = self._assigned.pop(_key(section, match_data, data, eventfd), None)
        if assigned is not None:
            try:
                self._vm.assign_eventfd(assigned, assign=False)
            finally:
                os.close(assigned.fd)

    def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        del section
        self._vm.coalesce(address, size, pio=self._pio, on=True)

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO, of just what was registered: KVM ignores a larger zone over several."""
        del section
        self._vm.coalesce(address, size, pio=self._pio, on=False)

    def _eventfd(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> IOEventFD:
        if match_data:
            flags, match = self._flag | IOEventFDFlag.DATAMATCH, _as_stored(section, data)
        else:
            flags, match = self._flag, 0
        return IOEventFD(match, section.offset_within_address_space, section.size, eventfd, flags)


def _duplicate(eventfd: int) -> int:
    try:
        return os.dup(eventfd)
    except OSError as error:
        raise kernel_error(f"dup of the eventfd {eventfd}", error) from error


def _key(section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> tuple[int, int, bool, int, int]:
    return section.offset_within_address_space, section.size, match_data, data, eventfd


def _as_stored(section: MemoryRegionSection, data: int) -> int:
    """A value that a device's callback would get, as the little-endian guest has it."""
    ops = section.region.ops
    if ops is None or ops.byte_order == "little":
        return data
    return int.from_bytes(data.to_bytes(section.size, "big"), "little")

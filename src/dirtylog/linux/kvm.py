"""Handles on KVM: the system, a virtual machine, a virtual CPU. Each owns its descriptor; closing twice is fine."""

import errno
import mmap
import os
import signal
import struct
from collections.abc import Iterator
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ClosedError, HostError, KernelError, UsageError
from dirtylog.linux import kvm_abi as abi
from dirtylog.linux.ioctl import Request, ioctl, ioctl_unsigned, kernel_error
from dirtylog.linux.kvm_abi import Capability, ExitReason
from dirtylog.linux.signals import signals_blocked
from dirtylog.units import PAGE_SIZE

Words = npt.NDArray[np.uint64]

KVM_DEVICE: Final = "/dev/kvm"
KICK_SIGNAL: Final = signal.SIGUSR1
"""Takes a vCPU out of KVM_RUN. It is blocked in vCPU threads and let through only inside KVM_RUN, so that it needs no
handler and nothing else in the process is affected by it."""

_MSR: Final = np.dtype([("index", "<u4"), ("reserved", "<u4"), ("data", "<u8")])
_MAX_CPUID_ENTRIES: Final = 256
_TSS_ADDRESS: Final = 0xFFFBD000
"""Three pages that Intel's KVM needs to emulate real mode, below the BIOS, where nothing else is."""


class _Handle:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ioctl(self, request: Request, argument: object = 0) -> int:
        if self.fd < 0:
            raise ClosedError(f"{request.name} on a closed {type(self).__name__}")
        return ioctl(self.fd, request, argument)

    def _get(self, blob: abi.Blob) -> bytes:
        buffer = bytearray(blob.size)
        self._ioctl(blob.get, buffer)
        return bytes(buffer)

    def check(self, capability: Capability) -> int:
        """What KVM_CHECK_EXTENSION answers: 0 if absent, else a positive value whose meaning is the capability's."""
        return self._ioctl(abi.CHECK_EXTENSION, int(capability))

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class KVM(_Handle):
    """The KVM subsystem: an open ``/dev/kvm``.

    Raises:
        HostError: there is no device, no permission on it, or it speaks another API version.
    """

    def __init__(self, path: str = KVM_DEVICE) -> None:
        super().__init__(_open_device(path))
        try:
            version = self._ioctl(abi.GET_API_VERSION)
        except KernelError as error:
            self.close()
            remedy = None if path == KVM_DEVICE else f"use {KVM_DEVICE}"
            raise HostError(f"{path} is not a KVM device", remedy=remedy) from error
        if version != abi.API_VERSION:
            self.close()
            raise HostError(f"{path} speaks KVM API version {version}, not {abi.API_VERSION}")

    def create_vm(self) -> "VM":
        """A new virtual machine without memory, interrupt controllers or vCPUs."""
        return VM(self._ioctl(abi.CREATE_VM), self._ioctl(abi.GET_VCPU_MMAP_SIZE))

    def supported_cpuid(self) -> bytes:
        """The entries of struct kvm_cpuid2 that KVM supports on this host."""
        size = abi.CPUID_HEADER_SIZE + _MAX_CPUID_ENTRIES * abi.CPUID_ENTRY_SIZE
        buffer = bytearray(size)
        struct.pack_into("<I", buffer, 0, _MAX_CPUID_ENTRIES)
        self._ioctl(abi.GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return bytes(buffer[abi.CPUID_HEADER_SIZE :][: count * abi.CPUID_ENTRY_SIZE])

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that KVM wants saved and loaded, from the kernel's own list."""
        probe = bytearray(4)
        try:
            self._ioctl(abi.GET_MSR_INDEX_LIST, probe)
        except KernelError as error:  # E2BIG is how the kernel says how long the list is
            if error.errno != errno.E2BIG:
                raise
        (count,) = struct.unpack("<I", probe)
        buffer = bytearray(4 + 4 * count)
        struct.pack_into("<I", buffer, 0, count)
        self._ioctl(abi.GET_MSR_INDEX_LIST, buffer)
        return struct.unpack_from(f"<{count}I", buffer, 4)


class VM(_Handle):
    """A virtual machine."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def enable(self, capability: Capability, *args: int) -> None:
        """Turn an optional capability on."""
        argument = abi.EnableCap(cap=int(capability))
        argument.args[: len(args)] = args
        self._ioctl(abi.ENABLE_CAP, argument)

    def set_memory_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        """Create, change or (size 0) delete a memory slot. All quantities in bytes."""
        self._ioctl(abi.SET_USER_MEMORY_REGION, abi.MemoryRegion(slot, flags, gpa, size, hva))

    def get_dirty_log(self, slot: int, words: Words) -> None:
        """Read a slot's dirty log into ``words``, which must hold a bit for each page, rounded up to 64.

        A slot without a log reads as clean: the kernel answers ENOENT where logging is off, which happens between a
        slot's creation and its first ``log_start``.
        """
        argument = abi.DirtyLog(slot=slot, dirty_bitmap=_address(words))
        try:
            self._ioctl(abi.GET_DIRTY_LOG, argument)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            words[:] = 0

    def clear_dirty_log(self, slot: int, first: int, count: int, words: Words) -> None:
        """Clean and re-protect the pages of [first, first + count) whose bit in ``words`` is 1.

        Bit 0 of ``words`` is page ``first``, a multiple of 64; ``count`` is a multiple of 64 too unless the range ends
        at the slot's last page. (Documentation/virt/kvm/api.rst, 4.117.)
        """
        argument = abi.ClearDirtyLog(slot=slot, num_pages=count, first_page=first, dirty_bitmap=_address(words))
        try:
            self._ioctl(abi.CLEAR_DIRTY_LOG, argument)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise

    def reset_dirty_rings(self) -> int:
        """Protect the pages of all entries marked as reset, and empty these; how many they were.

        Signals wait meanwhile. Recent kernels give up when one is pending, and leave pages of the last entries that
        they count unprotected.
        """
        with signals_blocked():
            return self._ioctl(abi.RESET_DIRTY_RINGS)

    def assign_eventfd(self, eventfd: abi.IOEventFD, *, assign: bool) -> None:
        """Have writes signal an eventfd instead of leaving the guest, or no longer."""
        flags = eventfd.flags | (0 if assign else abi.IOEventFDFlag.DEASSIGN)
        argument = abi.IOEventFD(eventfd.datamatch, eventfd.addr, eventfd.len, eventfd.fd, flags)
        self._ioctl(abi.IOEVENTFD, argument)

    def coalesce(self, address: int, size: int, *, pio: bool, on: bool) -> None:
        """Have writes to a range wait in a ring until a vCPU leaves the guest for another reason, or no longer."""
        zone = abi.CoalescedZone(address, size, pio)
        self._ioctl(abi.REGISTER_COALESCED if on else abi.UNREGISTER_COALESCED, zone)

    def create_irqchip(self) -> None:
        """Create the PICs, the I/O APIC and local APICs in the kernel, and the timer."""
        ioctl_unsigned(self.fd, abi.SET_TSS_ADDR, _TSS_ADDRESS)
        self._ioctl(abi.CREATE_IRQCHIP)
        self._ioctl(abi.CREATE_PIT2, abi.PITConfig())

    def create_vcpu(self, index: int) -> "VCPU":
        """A new vCPU; with an in-kernel irqchip all but index 0 wait for the guest to start them."""
        return VCPU(self._ioctl(abi.CREATE_VCPU, index), self._run_size, self.check(Capability.XSAVE2))

    def save_state(self) -> dict[str, bytes]:
        """The interrupt controllers, timer and clock, by name."""
        state = {name: self._get(blob) for name, blob in abi.VM_BLOBS.items()}
        for name, chip in abi.IRQCHIPS.items():
            buffer = bytearray(abi.IRQCHIP_SIZE)
            struct.pack_into("<I", buffer, 0, chip)
            self._ioctl(abi.GET_IRQCHIP, buffer)
            state[name] = bytes(buffer)
        return state

    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`.

        Raises:
            UsageError: a part is missing, unknown or of the wrong size.
        """
        sizes = {name: blob.size for name, blob in abi.VM_BLOBS.items()} | dict.fromkeys(abi.IRQCHIPS, abi.IRQCHIP_SIZE)
        _check_parts("VM", state, sizes)
        for name, chip in abi.IRQCHIPS.items():
            if struct.unpack_from("<I", state[name]) != (chip,):
                raise UsageError(f"the state of {name} is another chip's")
            self._ioctl(abi.SET_IRQCHIP, bytearray(state[name]))
        self._ioctl(abi.VM_BLOBS["pit"].set, bytearray(state["pit"]))
        # Flags that KVM_GET_CLOCK reports (stable TSC, realtime) are not all accepted back; the plain value is.
        clock = bytearray(state["clock"])
        struct.pack_into("<I", clock, 8, 0)
        self._ioctl(abi.VM_BLOBS["clock"].set, clock)


class VCPU(_Handle):
    """A virtual CPU and the run structure shared with the kernel."""

    def __init__(self, fd: int, run_size: int, xsave_size: int) -> None:
        super().__init__(fd)
        self._shared = memoryview(b"")
        self._exit: abi.Run | None = None
        try:
            self._shared = self.map(0, run_size)
        except KernelError:
            self.close()
            raise
        self._exit = abi.Run.from_buffer(self._shared)
        self._xsave_size = max(xsave_size, abi.LEGACY_XSAVE_SIZE)

    def map(self, page: int, size: int) -> memoryview:
        """What the kernel shares from a page of the vCPU on. It lives as long as the result, even past `close`."""
        if self.fd < 0:
            raise ClosedError("this vCPU was closed")
        try:
            return memoryview(mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED, offset=page * PAGE_SIZE))
        except OSError as error:
            raise kernel_error("mmap of a vCPU", error) from error

    @property
    def exit(self) -> abi.Run:
        """The head of struct kvm_run; valid after `run` returned."""
        if self._exit is None:
            raise ClosedError("this vCPU was closed")
        return self._exit

    def close(self) -> None:
        """Close the descriptor, and the mapping, which holds a duplicate of it; idempotent."""
        self._shared, self._exit = memoryview(b""), None
        super().close()

    def run(self) -> int:
        """Run the guest until it needs something; the exit reason, `ExitReason.INTR` if kicked, or for nothing.

        Whatever the last exit asked for is completed first, even when `request_exit` is in force: so the state is
        consistent after an INTR, and only then.
        """
        try:
            self._ioctl(abi.RUN)
        except InterruptedError:
            return ExitReason.INTR
        except KernelError as error:
            if error.errno != errno.EAGAIN:  # which is how a vCPU that waited to be started says that it was
                raise
            return ExitReason.INTR
        return int(self.exit.exit_reason)

    def request_exit(self, on: bool) -> None:
        """Make `run` return at once (a kick between the check and KVM_RUN is not lost), or no longer."""
        self.exit.immediate_exit = on

    def io_data(self) -> memoryview:
        """The bytes of the current port I/O exit, to read (guest writes) or to fill (guest reads)."""
        io = self.exit.io
        return self._shared[io.data_offset :][: io.size * io.count]

    def drain_coalesced(self, page: int) -> Iterator[tuple[bool, int, bytes]]:
        """The writes that wait in the machine's ring, oldest first, as (port I/O, address, data); taken out one by one.

        Args:
            page: where in the vCPU's mapping the ring is: what KVM_CHECK_EXTENSION answers for COALESCED_MMIO.
        """
        ring = self._shared[page * PAGE_SIZE :]
        while True:
            first, last = abi.COALESCED_HEAD.unpack_from(ring)
            if first == last or not max(first, last) < abi.COALESCED_ENTRIES:
                return
            offset = abi.COALESCED_HEAD.size + first * abi.COALESCED_ENTRY.size
            address, length, pio, data = abi.COALESCED_ENTRY.unpack_from(ring, offset)
            struct.pack_into("<I", ring, 0, (first + 1) % abi.COALESCED_ENTRIES)
            yield bool(pio), address, data[:length]

    def let_kick_through(self) -> None:
        """Let `KICK_SIGNAL` interrupt KVM_RUN although it is blocked in the calling thread, as it must be."""
        blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())} - {int(KICK_SIGNAL)}
        mask = sum(1 << (number - 1) for number in blocked)
        self._ioctl(abi.SET_SIGNAL_MASK, bytearray(struct.pack("<IQ", 8, mask)))

    def get_regs(self) -> abi.Regs:
        """The general registers."""
        return abi.Regs.from_buffer_copy(self._get(abi.VCPU_BLOBS["regs"]))

    def set_regs(self, regs: abi.Regs) -> None:
        """Set the general registers."""
        self._ioctl(abi.VCPU_BLOBS["regs"].set, regs)

    def get_sregs(self) -> abi.Sregs:
        """The segment, control and table registers."""
        return abi.Sregs.from_buffer_copy(self._get(abi.VCPU_BLOBS["sregs"]))

    def set_sregs(self, sregs: abi.Sregs) -> None:
        """Set the segment, control and table registers."""
        self._ioctl(abi.VCPU_BLOBS["sregs"].set, sregs)

    def set_cpuid(self, entries: bytes) -> None:
        """Set what CPUID answers: entries of struct kvm_cpuid2."""
        count, rest = divmod(len(entries), abi.CPUID_ENTRY_SIZE)
        if rest or count > _MAX_CPUID_ENTRIES:
            raise UsageError(f"{len(entries)} bytes are not a table of CPUID entries")
        self._ioctl(abi.SET_CPUID2, bytearray(struct.pack("<II", count, 0) + entries))

    def get_msrs(self, indices: tuple[int, ...]) -> bytes:
        """The MSRs among ``indices`` that this vCPU has, as struct kvm_msr_entry each.

        The kernel stops at the first that it cannot read and says how far it came; those the vCPU's CPUID rules out
        are left out.
        """
        entries = np.zeros(len(indices), _MSR)
        entries["index"] = indices
        done: list[npt.NDArray[np.void]] = []
        while len(entries):
            count, filled = self._msrs(abi.GET_MSRS, entries)
            done.append(filled[:count])
            entries = entries[count + 1 :]
        return b"".join(part.tobytes() for part in done)

    def set_msrs(self, entries: bytes) -> None:
        """Set MSRs from what `get_msrs` gave. One that cannot be set must already have the value.

        Raises:
            UsageError: not a table of MSRs.
            HostError: an MSR cannot be given its value here.
        """
        if len(entries) % abi.MSR_ENTRY_SIZE:
            raise UsageError(f"{len(entries)} bytes are not a table of MSRs")
        rest = np.frombuffer(entries, _MSR)
        while len(rest):
            count, _ = self._msrs(abi.SET_MSRS, rest)
            rest = rest[count:]
            if len(rest):
                refused = rest[:1]
                if self.get_msrs((int(refused["index"][0]),)) != refused.tobytes():
                    raise HostError(
                        f"this host cannot set MSR {int(refused['index'][0]):#x} to {int(refused['data'][0]):#x}",
                        remedy="migrate between hosts with the same CPU model and kernel",
                    )
                rest = rest[1:]

    def _msrs(self, request: Request, entries: npt.NDArray[np.void]) -> tuple[int, npt.NDArray[np.void]]:
        buffer = bytearray(struct.pack("<II", len(entries), 0) + entries.tobytes())
        count = self._ioctl(request, buffer)
        return count, np.frombuffer(buffer, _MSR, offset=abi.MSR_HEADER_SIZE)

    def save_state(self, msr_indices: tuple[int, ...]) -> dict[str, bytes]:
        """All registers, by name: those of `kvm_abi.VCPU_BLOBS`, the MSRs, and the TSC's frequency in kHz."""
        state = {name: self._get(blob) for name, blob in abi.VCPU_BLOBS.items()}
        if self._xsave_size > abi.LEGACY_XSAVE_SIZE:
            xsave = bytearray(self._xsave_size)
            self._ioctl(abi.GET_XSAVE2, xsave)
            state["xsave"] = bytes(xsave)
        state["msrs"] = self.get_msrs(msr_indices)
        state["tsc_khz"] = struct.pack("<I", self.tsc_khz)
        return state

    @property
    def tsc_khz(self) -> int:
        """How fast the guest's time stamp counter runs."""
        return self._ioctl(abi.GET_TSC_KHZ)

    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`.

        The order matters: the APIC base (sregs) before the local APIC, and that before the MSRs, since writing the TSC
        deadline is ignored unless the APIC's timer is in that mode; mp_state after the events.

        Raises:
            UsageError: a part is missing, unknown or of the wrong size.
            HostError: this host cannot give the vCPU that state.
        """
        sizes = {name: blob.size for name, blob in abi.VCPU_BLOBS.items()} | {"msrs": -1, "tsc_khz": 4}
        _check_parts("vCPU", state, sizes | {"xsave": self._xsave_size})
        (khz,) = struct.unpack("<I", state["tsc_khz"])
        if khz != self.tsc_khz:
            self._ioctl(abi.SET_TSC_KHZ, khz)
        for name in ("sregs", "regs", "fpu", "xsave", "xcrs", "lapic"):
            self._ioctl(abi.VCPU_BLOBS[name].set, bytearray(state[name]))
        self.set_msrs(state["msrs"])
        for name in ("vcpu_events", "mp_state", "debugregs"):
            self._ioctl(abi.VCPU_BLOBS[name].set, bytearray(state[name]))


def _open_device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError(
            f"there is no {path}",
            remedy="load the module (modprobe kvm_amd or kvm_intel), enable virtualisation in the firmware, "
            "or let this virtual machine nest others",
        ) from error
    except PermissionError as error:
        raise HostError(
            f"no permission to open {path}", remedy="join its group (usermod -aG kvm USER, then log in again)"
        ) from error
    except OSError as error:
        raise HostError(f"{path} cannot be opened: {error.strerror}") from error


def _address(words: Words) -> int:
    if words.dtype != np.uint64 or not words.flags.c_contiguous:
        raise UsageError("a dirty bitmap must be contiguous 64-bit words")
    address: int = words.__array_interface__["data"][0]  # words.ctypes runs much Python code for it
    return address


def _check_parts(what: str, state: dict[str, bytes], sizes: dict[str, int]) -> None:
    """Each part must be there with its size (-1: any), and no other."""
    if state.keys() != sizes.keys():
        odd = ", ".join(sorted(state.keys() ^ sizes.keys()))
        raise UsageError(f"the {what} state does not have the parts this version has: {odd}")
    for name, size in sizes.items():
        if size not in (-1, len(state[name])):
            raise UsageError(f"the {what} state's {name} has {len(state[name])} bytes instead of {size}")

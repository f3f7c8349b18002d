"""Guests under KVM that do nothing but write: what is told, or stamps."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Final

import numpy as np

from dirtylog.errors import DirtylogError, GuestError
from dirtylog.linux.kvm import KVM, VCPU
from dirtylog.linux.kvm_abi import ExitReason
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.machine.entry import BootMode
from dirtylog.machine.kvm.gate import RunGate
from dirtylog.machine.kvm.registers import start_at
from dirtylog.machine.kvm.vcpu import VCPUThread
from dirtylog.testing.board import Board
from dirtylog.testing.contract import Case
from dirtylog.testing.programs import (
    BOARD,
    CODE,
    LIST,
    LIST_END,
    MEMORY,
    STAMP,
    WRITE_LIST,
    assembled,
    stamp_registers,
)
from dirtylog.testing.writers import WRITERS, Writers
from dirtylog.trackers import DirtyRings, KVMLogMode, KVMLogTracker, KVMRingTracker, MemorySlot, Tracker
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.trackers.kvm_ring import DEFAULT_RING_ENTRIES
from dirtylog.units import PAGE_SIZE

_MEMORY_SLOT: Final = 0
_ROOM_SLOT: Final = 1
_BOARD_SLOT: Final = 2


class KVMGuest:
    """A VM with `WRITERS` vCPUs, without interrupt controllers, so that HLT ends KVM_RUN.

    Args:
        address: where the memory is in this process that the guest writes.
        pages: how many.
        log: how KVM logs that, if it is to.
        ring_entries: the size of each dirty ring.

    Attributes:
        tracker: the log, if there is one.

    Raises:
        HostError: this host has no KVM, or not this log.
    """

    def __init__(
        self, address: int, pages: int, log: KVMLogMode | None = None, *, ring_entries: int = DEFAULT_RING_ENTRIES
    ) -> None:
        self._gate = RunGate()
        self._threads: list[VCPUThread] = []
        self._rings: DirtyRings | None = None
        with ExitStack() as undo:
            self._vm = undo.enter_context(undo.enter_context(KVM()).create_vm())
            if log is not None:
                choose_mode(self._vm, log)
            if log is KVMLogMode.RING:
                self._rings = DirtyRings(self._vm, self._held, ring_entries)
                undo.callback(self._rings.close)
            slot = self._map(_MEMORY_SLOT, MEMORY, pages, address)
            self.tracker = self._make_tracker(slot, log)
            self._room = MemfdMapping("dirtylog-guest", LIST_END - CODE)
            undo.callback(self._room.close)
            self._map(_ROOM_SLOT, CODE, self._room.size // PAGE_SIZE, self._room.address)
            self._vcpus = [self._create_vcpu(undo, index) for index in range(WRITERS)]
            undo.callback(self._end)
            self._undo = undo.pop_all()

    def _make_tracker(self, slot: MemorySlot, log: KVMLogMode | None) -> Tracker | None:
        if self._rings is not None:
            return KVMRingTracker(self._rings, slot)
        return None if log is None else KVMLogTracker(self._vm, log, slot)

    def _map(self, slot: int, address: int, pages: int, hva: int) -> MemorySlot:
        return MemorySlot(self._vm, slot, gpa=address, pages=pages, hva=hva, readonly=False)

    def _create_vcpu(self, undo: ExitStack, index: int) -> VCPU:
        vcpu = undo.enter_context(self._vm.create_vcpu(index))
        if self._rings is not None:
            self._rings.add(vcpu)
        start_at(vcpu, CODE, BootMode.PROTECTED)
        return vcpu

    def close(self) -> None:
        """Delete the machine; idempotent."""
        self._undo.close()

    def _end(self) -> None:
        for thread in self._threads:
            thread.close()

    def write(self, pages: Iterable[int], offset: int = 0) -> None:
        """Add 1 to a byte of each page, one after the other, before `stamp`.

        Raises:
            GuestError: the guest does something else.
        """
        addresses = np.fromiter(pages, np.uint32) * np.uint32(PAGE_SIZE) + np.uint32(MEMORY + offset)
        most = (LIST_END - LIST) // addresses.itemsize
        self._load(WRITE_LIST)
        for start in range(0, addresses.size, most):
            part = addresses[start : start + most]
            self._room.array[LIST - CODE :][: part.nbytes] = part.view(np.uint8)
            self._enter(self._vcpus[0], {"esi": LIST, "ecx": part.size})
            while (reason := self._vcpus[0].run()) != ExitReason.HLT:
                self._serve(self._vcpus[0], reason)

    def stamp(self, board: Board, place: int, seed: int, *, closes: bool = False) -> "KVMWriters":
        """Have each vCPU begin to stamp pages; to be called once.

        Args:
            board: what they follow.
            place: the index of the first one's stamp among a page's 32-bit words; the other's follows.
            seed: chooses pages.
            closes: whether the machine goes with its writers.
        """
        self._map(_BOARD_SLOT, BOARD, 1, board.mapping.address)
        self._load(STAMP)
        for index, vcpu in enumerate(self._vcpus):
            self._enter(vcpu, stamp_registers(index, place + index, seed + index))
            self._threads.append(VCPUThread(vcpu, f"vcpu{index}", self._serve, _wait_to_be_asked, self._gate))
        return KVMWriters(self._threads, self.close if closes else self._end)

    def _held(self) -> AbstractContextManager[None]:
        def kick() -> None:
            for thread in self._threads:
                thread.kick()

        return self._gate.closed(kick)

    def _serve(self, vcpu: VCPU, reason: int) -> None:
        if reason == ExitReason.DIRTY_RING_FULL and self._rings is not None:
            self._rings.make_room(vcpu)
        elif reason != ExitReason.INTR:
            raise GuestError(f"KVM cannot go on (exit {reason}) at eip {vcpu.get_regs().rip:#x}")

    def _load(self, program: str) -> None:
        code = np.frombuffer(assembled(program), np.uint8)
        self._room.array[: code.size] = code

    def _enter(self, vcpu: VCPU, registers: dict[str, int]) -> None:
        regs = vcpu.get_regs()
        regs.rip = CODE
        for name, value in registers.items():
            setattr(regs, f"r{name[1:]}", value)
        vcpu.set_regs(regs)


class KVMWriters(Writers):
    """vCPUs that stamp pages.

    Args:
        threads: theirs.
        close: ends these.
    """

    count = WRITERS

    def __init__(self, threads: list[VCPUThread], close: Callable[[], None]) -> None:
        self._threads = threads
        self._close = close

    def resume(self) -> None:
        """Let them write."""
        for thread in self._threads:
            thread.run()

    def stand(self) -> None:
        """Return once they are out of the guest."""
        for thread in self._threads:
            thread.request_park()
        for thread in self._threads:
            thread.wait_parked()
        self.check()

    def check(self) -> None:
        """See that all are there."""
        for thread in self._threads:
            if thread.failure is not None:
                raise thread.failure

    def close(self) -> None:
        """End them; idempotent."""
        self._close()


class KVMCase(Case):
    """Memory of a guest under KVM, which logs it, and writes.

    Args:
        pages: how many.
        log: how KVM logs.
        ring_entries: the size of each dirty ring.

    Attributes:
        guest: who writes.

    Raises:
        HostError: this host has no KVM, or not this log.
    """

    def __init__(self, pages: int, log: KVMLogMode, *, ring_entries: int = DEFAULT_RING_ENTRIES) -> None:
        with ExitStack() as undo:
            mapping = MemfdMapping("dirtylog-case", pages * PAGE_SIZE)
            undo.callback(mapping.close)
            self.guest = KVMGuest(mapping.address, pages, log, ring_entries=ring_entries)
            undo.callback(self.guest.close)
            self._undo = undo.pop_all()
        super().__init__(self._tracker(), mapping.array, fd=mapping.fd)

    def _tracker(self) -> Tracker:
        if self.guest.tracker is None:
            raise GuestError("this guest is not logged")
        return self.guest.tracker

    def write(self, pages: Iterable[int], offset: int = 0) -> None:
        """Have the guest add 1 to a byte of each page."""
        self.guest.write(pages, offset)

    def close(self) -> None:
        """Delete the machine and its memory; idempotent."""
        self._undo.close()


def _wait_to_be_asked(_: DirtylogError) -> None:
    """What ended a vCPU, `KVMWriters.check` tells."""

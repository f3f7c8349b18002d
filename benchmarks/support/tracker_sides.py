"""The two that do the same in turn: dirtylog's trackers, and a program in C that makes the same system calls."""

import gc
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.support.compiler import compile_program
from dirtylog.errors import GuestError, PeerError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import ExitReason
from dirtylog.linux.mapping import BufferMapping, MemfdMapping
from dirtylog.machine.entry import BootMode
from dirtylog.machine.kvm.registers import start_at
from dirtylog.memory.bitmap import Numbers
from dirtylog.trackers import (
    DirtyRings,
    KVMLogMode,
    KVMLogTracker,
    KVMRingTracker,
    MemorySlot,
    TrackedRange,
    Tracker,
)
from dirtylog.trackers.comparison import Bytes
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.trackers.kvm_ring import DEFAULT_RING_ENTRIES
from dirtylog.units import GIB, MIB, PAGE_SIZE

PROGRAM_ADDRESS: Final = 3 * GIB
"""Where the guest's program is, and so how much memory it can write below."""
_LIST_ADDRESS: Final = PROGRAM_ADDRESS + PAGE_SIZE
_PAGES_PER_RUN: Final = 1 << 15
"""Far less than a ring has entries: where KVM emulates, a ring that is full overflows."""
_WRITE_THE_LIST: Final = bytes.fromhex(
    "ad"  # next: lodsd
    "fe00"  # incb (%eax)
    "e2fb"  # loop next
    "f4"  # hlt
)
_SOURCES: Final = Path(__file__).with_name("trackers")
_ANSWER_BYTES: Final = 64
_END_SECONDS: Final = 60


class Side(ABC):
    """Memory that is written and tracked. All times are in seconds."""

    @abstractmethod
    def choose(self, pages: Numbers) -> None:
        """Which pages are to be written."""

    @abstractmethod
    def write(self) -> float:
        """Add 1 to a byte of each chosen page."""

    @abstractmethod
    def arm(self) -> float:
        """Start tracking."""

    @abstractmethod
    def collect(self) -> tuple[float, int]:
        """Ask what was written; also how many pages that are."""

    @abstractmethod
    def clear(self, step: int) -> float:
        """Clear all of it, so many pages a call."""

    @abstractmethod
    def disarm(self) -> float:
        """Stop tracking."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory up; idempotent."""


class Ours(Side):
    """A tracker of dirtylog, with the bookkeeping of what it has collected."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracked = TrackedRange(tracker)

    def arm(self) -> float:
        """Start tracking."""
        return _timed(self._tracked.arm)

    def collect(self) -> tuple[float, int]:
        """Ask what was written; also how many pages that are."""
        seconds = _timed(self._tracked.collect)
        return seconds, self._tracked.collected.count()

    def clear(self, step: int) -> float:
        """Clear all of it, so many pages a call."""

        def clear_all() -> None:
            for first in range(0, self._tracked.pages, step):
                self._tracked.clear(first, step)

        return _timed(clear_all)

    def disarm(self) -> float:
        """Stop tracking."""
        return _timed(self._tracked.disarm)


class OwnMemory(Ours):
    """Memory of this process.

    Args:
        size: bytes, whole pages.
        make: the tracker of some bytes.
        shared: a memfd's, not anonymous.
    """

    def __init__(self, size: int, make: Callable[[Bytes], Tracker], *, shared: bool) -> None:
        self._mapping = MemfdMapping("benchmark", size) if shared else _anonymous(size)
        self._mapping.populate(0, size)
        self._first_bytes = self._mapping.array[::PAGE_SIZE]
        self._pages = np.empty(0, np.int64)
        super().__init__(make(self._mapping.array))

    def choose(self, pages: Numbers) -> None:
        """Which pages are to be written."""
        self._pages = pages

    def write(self) -> float:
        """In numpy."""

        def add() -> None:
            self._first_bytes[self._pages] += 1

        return _timed(add)

    def close(self) -> None:
        """Give the memory up; idempotent."""
        self._tracked.disarm()
        self._first_bytes = np.empty(0, np.uint8)
        self._mapping.close()


class GuestMemory(Ours):
    """Memory of a KVM guest whose one vCPU writes it.

    Args:
        size: bytes, whole pages, up to `PROGRAM_ADDRESS`.
        mode: how its log behaves.
    """

    def __init__(self, size: int, mode: KVMLogMode) -> None:
        with ExitStack() as stack:
            vm = stack.enter_context(stack.enter_context(KVM()).create_vm())
            choose_mode(vm, mode)
            self._rings = DirtyRings(vm, nullcontext) if mode is KVMLogMode.RING else None
            memory, self._program = MemfdMapping("benchmark", size), MemfdMapping("program", MIB)
            stack.callback(memory.close)
            stack.callback(self._program.close)
            for mapping in (memory, self._program):
                mapping.populate(0, mapping.size)
            self._program.array[: len(_WRITE_THE_LIST)] = np.frombuffer(_WRITE_THE_LIST, np.uint8)
            slot = MemorySlot(vm, 0, gpa=0, pages=size // PAGE_SIZE, hva=memory.address, readonly=False)
            program_pages = self._program.size // PAGE_SIZE
            MemorySlot(vm, 1, gpa=PROGRAM_ADDRESS, pages=program_pages, hva=self._program.address, readonly=False)
            self._vcpu = stack.enter_context(vm.create_vcpu(0))
            if self._rings is not None:
                self._rings.add(self._vcpu)
                stack.callback(self._rings.close)
            start_at(self._vcpu, PROGRAM_ADDRESS, BootMode.PROTECTED)
            self._pieces: list[Numbers] = []
            self._reaped = 0.0
            super().__init__(
                KVMLogTracker(vm, mode, slot) if self._rings is None else KVMRingTracker(self._rings, slot)
            )
            self._stack = stack.pop_all()

    def choose(self, pages: Numbers) -> None:
        """Which pages are to be written."""
        self._pieces = [pages[first : first + _PAGES_PER_RUN] for first in range(0, pages.size, _PAGES_PER_RUN)]

    def write(self) -> float:
        """In the guest; only what goes by in there counts."""
        seconds = 0.0
        for number, piece in enumerate(self._pieces):
            if number and self._rings is not None:
                self._reaped += _timed(self._rings.reap)
            addresses = (piece * PAGE_SIZE).astype("<u4").view(np.uint8)
            self._program.array[PAGE_SIZE : PAGE_SIZE + addresses.size] = addresses
            regs = self._vcpu.get_regs()
            regs.rip, regs.rsi, regs.rcx = PROGRAM_ADDRESS, _LIST_ADDRESS, piece.size
            self._vcpu.set_regs(regs)
            seconds += _timed(self._vcpu.run)
            if self._vcpu.exit.exit_reason != ExitReason.HLT:
                raise GuestError(f"the guest did not halt, but left with reason {self._vcpu.exit.exit_reason}")
        return seconds

    def collect(self) -> tuple[float, int]:
        """Rings are collected partly while they are filled, which counts here."""
        early, self._reaped = self._reaped, 0.0
        seconds, pages = super().collect()
        return early + seconds, pages

    def close(self) -> None:
        """Give the guest up; idempotent."""
        self._tracked.disarm()
        self._stack.close()


class Raw(Side):
    """The program in C, with memory of its own.

    Args:
        program: what `compile_raw` has made.
        name: of a tracker that it knows.
        size: bytes, whole pages.

    Raises:
        PeerError: the program does not do its work.
    """

    def __init__(self, program: Path, name: str, size: int) -> None:
        command = [str(program), name, str(size), str(DEFAULT_RING_ENTRIES)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._name = name

    def choose(self, pages: Numbers) -> None:
        """Which pages are to be written."""
        self._ask(f"pages {pages.size}", pages.astype("<u4").tobytes())

    def write(self) -> float:
        """Add 1 to a byte of each chosen page."""
        return self._ask("write")[0]

    def arm(self) -> float:
        """Start tracking."""
        return self._ask("arm")[0]

    def collect(self) -> tuple[float, int]:
        """Ask what was written; also how many pages that are."""
        return self._ask("collect")

    def clear(self, step: int) -> float:
        """Clear all of it, so many pages a call."""
        return self._ask(f"clear {step}")[0]

    def disarm(self) -> float:
        """Stop tracking."""
        return self._ask("disarm")[0]

    def close(self) -> None:
        """End the program; idempotent."""
        self._process.kill()
        self._process.communicate(timeout=_END_SECONDS)

    def _ask(self, command: str, content: bytes = b"") -> tuple[float, int]:
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            raise PeerError("the program in C has no pipes")
        try:
            to.write(command.encode() + b"\n" + content)
            to.flush()
            nanoseconds, pages = map(int, back.readline(_ANSWER_BYTES).split())
        except (BrokenPipeError, ValueError) as error:
            self._process.kill()
            _, said = self._process.communicate(timeout=_END_SECONDS)
            reason = said.decode(errors="replace").strip() or "it did not say why"
            raise PeerError(f"the program in C failed at {command!r} of {self._name}: {reason}") from error
        return nanoseconds / 1e9, pages


def compile_raw(folder: Path) -> Path:
    """Compile the program in C into a folder.

    Raises:
        HostError: that is not possible here.
    """
    main = _SOURCES / "trackers.c"
    return compile_program(folder, [main, *sorted(set(_SOURCES.glob("*.c")) - {main})])


def _anonymous(size: int) -> BufferMapping:
    return BufferMapping(memoryview(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)))


def _timed(call: Callable[[], object]) -> float:
    """Seconds for one call; without the garbage collector, as it would strike at random."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    finally:
        if was_enabled:
            gc.enable()

"""A machine without KVM: a thread that does what the dirtier does, and a modelled dirty log."""

import struct
import threading
from typing import Final

import numpy as np
from support.model_tracker import ModelTracker

from dirtylog.errors import UsageError
from dirtylog.guests.dirtier import COUNTER_ADDRESS, STARTED, STARTED_ADDRESS
from dirtylog.machine import Machine
from dirtylog.machine.machine import MachineState
from dirtylog.memory import Memory, MemoryRegionSection, Words
from dirtylog.trackers import KVMLogMode, Tracker, tracker_listener
from dirtylog.units import PAGE_SIZE

RAM_PAGES: Final = 80
ROM_PAGES: Final = 5
FIRST: Final = 16 * PAGE_SIZE
"""The range that is written, as `dirtier.build` takes it. Above it is a part that holds bytes nobody writes."""
LAST: Final = 48 * PAGE_SIZE
_STILL: Final = slice(50 * PAGE_SIZE, 66 * PAGE_SIZE)
"""What is above these stays a hole."""

_BURST: Final = 8
_PAUSE_SECONDS: Final = 0.001
_STATE: Final = struct.Struct("<IQ")


class _SharedTracker(ModelTracker):
    """A `ModelTracker` that the guest's thread and the migration's may use."""

    def __init__(self, mode: KVMLogMode, pages: int, lock: threading.Lock) -> None:
        super().__init__(mode, pages)
        self._lock = lock

    def arm(self) -> None:
        with self._lock:
            super().arm()

    def collect(self, words: Words) -> None:
        with self._lock:
            super().collect(words)

    def clear(self, first: int, count: int, words: Words) -> None:
        with self._lock:
            super().clear(first, count, words)

    def disarm(self) -> None:
        with self._lock:
            super().disarm()


class FakeMachine(Machine):
    """Adds 1 to byte 0 of each page of [FIRST, LAST), in order, for ever, and counts the rounds as the dirtier does.

    Args:
        ram_pages: pages of its first block.
        mode: how its log behaves.
        writes: whether it writes at all when it runs.

    Attributes:
        can_limit: whether it takes limits for who writes, which do nothing.
        limits: those it was given, and their periods.
        written: how many pages its vCPUs wrote, where it can limit them.
    """

    kind = "fake"

    def __init__(
        self, ram_pages: int = RAM_PAGES, *, mode: KVMLogMode = KVMLogMode.MANUAL, writes: bool = True
    ) -> None:
        super().__init__(Memory())
        self._mode = mode
        self._writes = writes
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._position = FIRST
        self._rounds = 0
        self._pause = _PAUSE_SECONDS
        self.can_limit = False
        self.limits: list[tuple[int, float]] = []
        self.written = [0]
        self._trackers: dict[str, _SharedTracker] = {}
        root = self.memory.container("system")
        root.add(self.memory.ram("ram", ram_pages * PAGE_SIZE), 0)
        root.add(self.memory.ram("rom", ROM_PAGES * PAGE_SIZE), 1 << 32)
        self.system = self.memory.address_space("system", root)
        self._listener = tracker_listener(self._attach, self._detach, clears_on_collect=mode.clears_on_collect)
        self.memory.register(self._listener, self.system)

    def boot(self) -> None:
        """Fill memory as a guest's start would."""
        ram, rom = self.memory.blocks["ram"].array, self.memory.blocks["rom"].array
        ram[_STILL] = np.resize(np.arange(251, dtype=np.uint8), ram[_STILL].shape)
        rom[: PAGE_SIZE // 2] = 0xC3
        ram[STARTED_ADDRESS : STARTED_ADDRESS + len(STARTED)] = list(STARTED)

    def _attach(self, section: MemoryRegionSection) -> Tracker:
        tracker = _SharedTracker(self._mode, section.size // PAGE_SIZE, self._lock)
        self._trackers[section.region.name] = tracker
        return tracker

    def _detach(self, tracker: Tracker) -> None:
        assert tracker in self._trackers.values()

    def _run(self) -> None:
        self._halt.clear()
        self._thread = threading.Thread(target=self._main, name="fake-guest", daemon=True)
        self._thread.start()

    def _throttle(self, share: float) -> None:
        self._pause = _PAUSE_SECONDS / (1 - share)

    @property
    def has_dirty_rings(self) -> bool:
        return self.can_limit

    def dirty_pages(self) -> tuple[int, ...]:
        self.check_dirty_limit()
        return tuple(self.written)

    def limit_dirty_rate(self, quota: int, cpu: int | None = None, *, period: float = 1.0) -> None:
        self.check_dirty_limit()
        self.limits.append((quota, period))

    def _stop(self) -> None:
        self._halt.set()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        while not self._halt.wait(self._pause):
            if self._writes:
                with self._lock:
                    for _ in range(_BURST):
                        self._step()

    def _step(self) -> None:
        self._add_one(self._position)
        self._position += PAGE_SIZE
        if self._position == LAST:
            self._position = FIRST
            self._rounds += 1
            self._trackers["ram"].write(COUNTER_ADDRESS // PAGE_SIZE)
            struct.pack_into("<Q", self.memory.blocks["ram"].memory, COUNTER_ADDRESS, self._rounds)

    def _add_one(self, address: int) -> None:
        self._trackers["ram"].write(address // PAGE_SIZE)
        self.memory.blocks["ram"].array[address : address + 1] += 1

    def save_state(self) -> MachineState:
        return {"cpu0": {"place": _STATE.pack(self._position, self._rounds)}}

    def load_state(self, state: MachineState) -> None:
        if state.keys() != {"cpu0"} or state["cpu0"].keys() != {"place"} or len(state["cpu0"]["place"]) != _STATE.size:
            raise UsageError("not the state of a fake machine")
        self._position, self._rounds = _STATE.unpack(state["cpu0"]["place"])

    def close(self) -> None:
        with self._state_lock:  # a migration that gives the guest back may be about to run it
            self._halt.set()
            if self._thread is not None:
                self._thread.join()
        self.memory.unregister(self._listener)

"""Writers, clients of the dirty log and changes of the memory, all at once, each in a thread of its own."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from support.model_tracker import ModelWorld
from support.waiting import BOUND, Task

from dirtylog.memory import ClearChunks, Client, MemoryRegion, PageBitmap, TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE

PAGES = 130
ROUNDS = 25
WRITES = 150
"""Of each writer in each round: few, since a later write to the same page hides that one was lost."""
MOVES = 10


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Crowd:
    """RAM seen at 0 and, through a window that moves, elsewhere; logged for migration and display, and clean."""

    def __init__(self, mode: KVMLogMode) -> None:
        self.world = ModelWorld(mode, PAGES)
        self.ram: MemoryRegion = self.world.ram
        self.window = self.world.memory.alias("window", self.ram, 30 * PAGE_SIZE, 70 * PAGE_SIZE)
        self.world.root.add(self.ram, 0)
        self.world.root.add(self.window, MIB)
        self.world.memory.start_logging(TrackingReason.MIGRATION)
        self.ram.start_logging_display()
        self.world.memory.sync_dirty_log()
        for client in Client:
            self.ram.test_and_clear_dirty(0, self.ram.size, client)
        self.start = threading.Barrier(1)
        self.writers_left = 0
        self.written = threading.Lock()

    @property
    def contents(self) -> npt.NDArray[np.uint8]:
        assert self.ram.block is not None
        return self.ram.block.array[::PAGE_SIZE]

    def guest(self, seed: int) -> None:
        """Write pages, through either range."""
        choice = random.Random(seed)  # noqa: S311 - the same in every run
        for _ in range(WRITES):
            page = choice.randrange(PAGES)
            windowed = choice.random() < 0.5 and 30 <= page < 100
            self.world.try_write(MIB + (page - 30) * PAGE_SIZE if windowed else page * PAGE_SIZE)
        self._writer_ends()

    def host(self, seed: int) -> None:
        """Write the last bytes of pages, which is nobody else's; a guest's write would be overwritten."""
        for number in range(WRITES):
            value = bytes(((number + seed) % 255 + 1,))
            self.world.system.write((number % PAGES) * PAGE_SIZE + PAGE_SIZE - 1, value)
        self._writer_ends()

    def _writer_ends(self) -> None:
        with self.written:
            self.writers_left -= 1

    def migrate(self, destination: npt.NDArray[np.uint8]) -> None:
        """Sync, harvest, clear, read; once more after the last write."""
        pending, chunks = PageBitmap(PAGES), ClearChunks(PAGES, 1)
        last = False
        while not last:
            last = not self.writers_left
            self.world.memory.sync_dirty_log()
            self.ram.harvest_dirty(pending, chunks)
            for first, count in pending.runs().tolist():
                for due, length in chunks.take(first, count):
                    self.ram.clear_dirty_bitmap(due * PAGE_SIZE, length * PAGE_SIZE)
                pending.clear(first, count)
                self._copy(destination, first, count)

    def refresh(self, screen: npt.NDArray[np.uint8]) -> None:
        """Take snapshots of halves; once more after the last write."""
        last = False
        while not last:
            last = not self.writers_left
            for first, count in [(0, PAGES // 2), (PAGES // 2, PAGES - PAGES // 2)]:
                snapshot = self.ram.snapshot_and_clear_dirty(first * PAGE_SIZE, count * PAGE_SIZE, Client.DISPLAY)
                for page in range(first, first + count):
                    if snapshot.is_dirty(page * PAGE_SIZE, 1):
                        self._copy(screen, page, 1)

    def _copy(self, copy: npt.NDArray[np.uint8], first: int, count: int) -> None:
        assert self.ram.block is not None
        start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        copy[start:end] = self.ram.block.array[start:end]

    def move(self) -> None:
        """Move and hide the window while it is written and logged."""
        for number in range(MOVES):
            with self.world.memory.transaction():
                self.window.move((1 + number % 3) * MIB)
                self.window.set_enabled(number % 4 != 3)
        self.window.set_enabled(True)

    def run(self, *tasks: Callable[[], None]) -> None:
        """Three writers and others, from a common start to the end of all."""
        self.writers_left = 3
        self.start = threading.Barrier(len(tasks))
        for task in [Task(partial(self._run, task)) for task in tasks]:
            task.join()

    def _run(self, task: Callable[[], None]) -> None:
        self.start.wait(BOUND)
        task()


@pytest.mark.parametrize("mode", KVMLogMode)
@pytest.mark.parametrize("moves", [False, True], ids=["still", "moving"])
def test_all_copies_are_right_after_all_ran_at_once(mode: KVMLogMode, moves: bool) -> None:  # D1 D2 D3 D4 D6 D12
    crowd = Crowd(mode)
    assert crowd.ram.block is not None
    destination, screen = np.zeros_like(crowd.ram.block.array), np.zeros_like(crowd.ram.block.array)

    for number in range(ROUNDS):
        crowd.run(
            partial(crowd.guest, 2 * number),
            partial(crowd.guest, 2 * number + 1),
            partial(crowd.host, number),
            partial(crowd.migrate, destination),
            partial(crowd.refresh, screen),
            *([crowd.move] if moves else []),
        )

        assert np.flatnonzero(destination != crowd.ram.block.array).tolist() == []
        assert np.flatnonzero(screen != crowd.ram.block.array).tolist() == []
    assert crowd.contents.all()
    if moves:
        assert crowd.world.holds > 0
    crowd.world.close()

"""The caller's own process as a machine: its buffers are the memory, and its threads are what writes."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.machine.machine import Machine, MachineState, RunState
from dirtylog.memory import Memory
from dirtylog.trackers.own_memory import TRACKERS, own_memory_listener
from dirtylog.units import PAGE_SIZE, align_up

_PART: Final = "process"
_NAME: Final = "state"


class Process(Machine):
    """Named buffers that the caller's threads write, moved as a guest's memory is.

    What is not in the buffers, such as how many steps a simulation has made, goes along as bytes. On the other side
    there is a process with the same buffers, which never ran: `resume` is called there once it has everything.

    Args:
        buffers: name → bytes of memory to allocate, rounded up to whole pages; or memory of the caller's, writable,
            contiguous and of whole pages. Only what is allocated here can be handed over without copying it
            (`Parameters.share_memory`).
        resume: lets the writers go, or starts them. Called in the thread that resumes or receives the machine.
        pause: stops them: when it returns, nobody writes the buffers any more. Called while they run, and only then;
            also to collect what they wrote with a tracker that cannot do that while they write (soft-dirty).
        save: gives the state that is not in the buffers, of writers that stand still.
        load: takes it over, before the first `resume`. What it raises fails the migration. It must leave the buffers
            alone: if they are shared, they are the source's until `resume`.
        tracker: a name of `dirtylog.trackers.own_memory.TRACKERS`. Write-watch notes what this process writes, and not
            what others do to memory that they share with it: see `dirtylog.linux.write_watch`.

    Raises:
        UsageError: there are no buffers, or some are not of whole pages, or there is no such tracker.
        HostError: the host cannot map that much.
    """

    kind = "process"

    def __init__(
        self,
        buffers: Mapping[str, int | memoryview],
        *,
        resume: Callable[[], None],
        pause: Callable[[], None],
        save: Callable[[], bytes] = bytes,
        load: Callable[[bytes], None] | None = None,
        tracker: str = "write-watch",
    ) -> None:
        if tracker not in TRACKERS:
            raise UsageError(f"there is no tracker {tracker!r}", remedy=f"use {', '.join(TRACKERS)}")
        if not buffers:
            raise UsageError("a process without buffers has nothing to move")
        super().__init__(Memory())
        self._writers_lock = threading.RLock()
        self._writing = False
        self._resume_writers, self._pause_writers = resume, pause
        self._save, self._load = save, load
        try:
            self._map(buffers)
            self._listener = own_memory_listener(tracker, self._held)
            self.memory.register(self._listener, self._space)
        except BaseException:
            self.memory.close()
            raise

    def _map(self, buffers: Mapping[str, int | memoryview]) -> None:
        root = self.memory.container("buffers")
        address = 0
        for name, buffer in buffers.items():
            size = align_up(buffer, PAGE_SIZE) if isinstance(buffer, int) else buffer.nbytes
            memory = None if isinstance(buffer, int) else buffer
            root.add(self.memory.ram(name, size, buffer=memory), address)
            address += size
        self._space = self.memory.address_space("buffers", root)

    def array(self, name: str, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """A buffer as an array, from its first byte on.

        Raises:
            UsageError: there is no such buffer, or it is smaller.
        """
        block = self.memory.blocks.get(name)
        if block is None:
            raise UsageError(f"there is no buffer {name!r}", remedy=f"use {', '.join(self.memory.blocks)}")
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        if not 0 < size <= block.size:
            raise UsageError(f"an array of shape {shape} and type {kind} does not fit {name!r} of {block.size} bytes")
        return block.array[:size].view(kind).reshape(shape)

    def save_state(self) -> MachineState:
        """See `Machine`."""
        self._check_still()
        return {_PART: {_NAME: self._save()}}

    def load_state(self, state: MachineState) -> None:
        """See `Machine`."""
        if state.keys() != {_PART} or state[_PART].keys() != {_NAME}:
            raise UsageError("this is not the state of a process")
        if self._load is not None:
            self._load(state[_PART][_NAME])

    def close(self) -> None:
        """Stop the writers, and watch no more. Arrays stay valid for who has them. Idempotent."""
        with self._state_lock:
            if self._closed:
                return
            if self._state is RunState.RUNNING:
                self._go(RunState.SHUTDOWN)
            self._closed = True
        self.memory.unregister(self._listener)
        self.memory.close()

    def _run(self) -> None:
        with self._writers_lock:
            self._resume_writers()
            self._writing = True

    def _stop(self) -> None:
        with self._writers_lock:
            self._pause_writers()
            self._writing = False

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Writers that stand still, and write on afterwards if they did before."""
        with self._writers_lock:
            if not self._writing:
                yield
                return
            self._stop()
            try:
                yield
            finally:
                self._run()

    def check_throttle(self) -> None:
        """See `Machine`."""
        raise UsageError("a process cannot be slowed down", remedy="give its migration more downtime or bandwidth")

    def _throttle(self, share: float) -> None:
        if share:
            self.check_throttle()

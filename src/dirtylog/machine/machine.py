"""The contract of machines: a memory, something that writes it and can be stopped, and state that can be moved."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum

from dirtylog.errors import ClosedError, DirtylogError, UsageError
from dirtylog.machine.throttle import DEFAULT_PERIOD, MOST_THROTTLE, DirtyLimit
from dirtylog.memory import Memory

MachineState = dict[str, dict[str, bytes]]
"""Everything but memory: part of the machine (``cpu0``, ``serial0``) → name → bytes."""


class RunState(Enum):
    """What a machine is doing, in QEMU's words."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"


ENDED = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
"""States that a machine does not leave."""

HELD = frozenset({RunState.INMIGRATE, RunState.FINISH_MIGRATE})
"""States in which a migration holds the machine; nobody else can run or stop it."""

StateObserver = Callable[[RunState, RunState], None]
"""Told the old and the new state, in the thread that changed it."""


class Machine(ABC):
    """Runs and stops as a whole. Its methods may be called from any thread but its own vCPUs'.

    Attributes:
        memory: what it writes; the machine's own, and closed with it.
        observers: told of each change of state.
        failure: why it ended, once its state is one of `ENDED`.
    """

    kind: str
    """Names the type and layout; a machine's state can be loaded by those of the same kind only."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.observers: list[StateObserver] = []
        self.failure: DirtylogError | None = None
        self._state = RunState.PRELAUNCH
        memory.set_running(False)
        self._state_lock = threading.RLock()
        self._throttle_lock = threading.Lock()
        self._throttled = 0.0
        self._closed = False

    @property
    def state(self) -> RunState:
        """What it is doing."""
        return self._state

    @property
    def throttled(self) -> float:
        """The share of their time that is taken from those who write."""
        return self._throttled

    def throttle(self, share: float) -> None:
        """Have those who write stand still for a share of their time, in turns of milliseconds; 0 to end that.

        It takes effect at once, and lasts until it is changed, whether the machine is paused meanwhile or not.

        Raises:
            UsageError: not a share from 0 to `MOST_THROTTLE`, or the machine was closed.
        """
        if not 0 <= share <= MOST_THROTTLE:
            raise UsageError(f"a throttle of {share:g}", remedy=f"it may be 0 to {MOST_THROTTLE}")
        with self._throttle_lock:
            if share == self._throttled:
                return
            if self._closed and share:
                raise ClosedError("the machine was closed")
            self._throttle(share)
            self._throttled = share

    def check_throttle(self) -> None:  # noqa: B027 - most machines can
        """Refuse to be throttled.

        Raises:
            UsageError: those who write cannot be slowed down.
        """

    def check_postcopy(self, *, of_kernel: bool) -> None:
        """Refuse to run before all memory is here.

        Args:
            of_kernel: whether faults on absent memory that the kernel takes are served, see `linux.missing`.

        Raises:
            UsageError: those who write would wait for each other.
            HostError: this host does not let them wait.
        """
        del of_kernel
        raise UsageError(
            f"a machine of kind {self.kind!r} cannot run before all of its memory is there",
            remedy="migrate it without postcopy",
        )

    @property
    def writer_threads(self) -> Sequence[int]:
        """The kernel's number of each vCPU's thread, where each has one."""
        return ()

    @property
    def dirty_limits(self) -> tuple[DirtyLimit, ...]:
        """The vCPUs that may not write as fast as they can, and what that costs them."""
        return ()

    @property
    def has_dirty_rings(self) -> bool:
        """Whether it knows which vCPU writes."""
        return False

    def dirty_pages(self) -> tuple[int, ...]:
        """For each vCPU, how many pages it wrote that were logged. Two of these make a rate.

        Raises:
            UsageError: the machine does not know which vCPU writes.
        """
        raise self._without_rings()

    def check_dirty_limit(self) -> None:
        """Refuse a limit for who writes.

        Raises:
            UsageError: the machine does not know which vCPU writes.
        """
        if not self.has_dirty_rings:
            raise self._without_rings()

    def _without_rings(self) -> UsageError:
        return UsageError(
            f"a machine of kind {self.kind!r} does not know which vCPU writes",
            remedy="run the guest under KVM with the dirty log 'ring'",
        )

    def limit_dirty_rate(self, quota: int, cpu: int | None = None, *, period: float = DEFAULT_PERIOD) -> None:
        """Slow those vCPUs down that write more than a quota, and no others, until it is changed.

        Args:
            quota: MiB a second; 0 for no limit any more.
            cpu: which vCPU; each one by itself if None.
            period: seconds between two adjustments of how much they are slowed down.

        Raises:
            UsageError: see `check_dirty_limit`, or there is no such vCPU.
        """
        del quota, cpu, period
        raise self._without_rings()

    def resume(self) -> None:
        """Run; nothing to do if it does.

        Raises:
            UsageError: it has ended, or a migration holds it.
        """
        with self._state_lock:
            self._check_free()
            if self._state in ENDED:
                raise UsageError(
                    f"the machine has ended ({self._state.value}) and cannot run", remedy="start a new one"
                )
            self._go(RunState.RUNNING)

    def pause(self) -> None:
        """Stop. When this returns, nothing writes memory any more. Nothing to do if it stands still.

        Raises:
            UsageError: a migration holds it.
        """
        with self._state_lock:
            self._check_free()
            if self._state in ENDED:
                self._stop()  # what ended it may have been one writer of several
            elif self._state is RunState.RUNNING:
                self._go(RunState.PAUSED)

    def hold(self, state: RunState) -> RunState:
        """For a migration: stop, if it runs, and stay in a state of `HELD` until `release`.

        Returns:
            The state it was in.

        Raises:
            DirtylogError: the guest ended by itself.
        """
        with self._state_lock:
            before = self._state
            self._go(state)
            return before

    def release(self, state: RunState, failure: DirtylogError | None = None) -> None:
        """The reverse of `hold`: to a state outside `HELD`. Nothing to do if it is not held.

        Args:
            state: what it is from now on.
            failure: why, if that is one of `ENDED`.
        """
        with self._state_lock:
            if self._state in HELD:
                self.failure = failure
                self._go(state)

    def _check_free(self) -> None:
        if self._closed:
            raise ClosedError("the machine was closed")
        if self._state in HELD:
            raise UsageError(
                f"the machine is in the hands of a migration ({self._state.value})",
                remedy="wait for the migration to end, or cancel it",
            )

    def _go(self, state: RunState) -> None:
        """Enter a state with the writers running or standing still as it says."""
        if self._state is RunState.RUNNING and state is not RunState.RUNNING:
            self._stop()
        if self._state in ENDED:  # perhaps while it was being stopped
            raise self.failure or UsageError(f"the machine has ended ({self._state.value})")
        starts = state is RunState.RUNNING and self._state is not state
        try:
            self._enter(state)
        finally:  # a listener's error takes nothing back (T11): the state says running, so let it be true
            if starts:
                self._run()

    def _end(self, state: RunState, failure: DirtylogError) -> None:
        """For implementations: the guest ended by itself."""
        with self._state_lock:
            if self._state not in ENDED:
                self.failure = failure
                self._enter(state)

    def _check_still(self) -> None:
        """For implementations: refuse what needs a machine that stands still."""
        if self._state is RunState.RUNNING:
            raise UsageError("the machine runs, and its state changes while it is read", remedy="pause it first")

    def _enter(self, state: RunState) -> None:
        old, self._state = self._state, state
        try:
            self.memory.set_running(state is RunState.RUNNING)
        finally:
            if old is not state:
                for observer in tuple(self.observers):
                    observer(old, state)

    @abstractmethod
    def _run(self) -> None:
        """Let the writers go."""

    @abstractmethod
    def _stop(self) -> None:
        """Stop the writers; they stand still when this returns."""

    @abstractmethod
    def _throttle(self, share: float) -> None:
        """See `throttle`; the share is a new one."""

    @abstractmethod
    def save_state(self) -> MachineState:
        """Everything but memory, of a machine that stands still."""

    @abstractmethod
    def load_state(self, state: MachineState) -> None:
        """The reverse of `save_state`, on a machine that never ran.

        Raises:
            UsageError: the state is not one of this kind of machine.
            HostError: this host cannot take it.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop, and give everything up; idempotent."""


def failure_from(error: Exception) -> DirtylogError:
    """What ends the guest after an exception in what serves it: itself, or, for a defect, one that says so."""
    if isinstance(error, DirtylogError):
        return error
    failure = DirtylogError(f"a defect in dirtylog stopped a vCPU: {error!r}")
    failure.__cause__ = error
    return failure

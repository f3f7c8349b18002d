"""A witness of rule M1."""

import threading

from dirtylog.machine import Machine, RunState


class Custody:
    """Follows machines, and counts how many of them run the guest."""

    def __init__(self, *machines: Machine) -> None:
        self._lock = threading.Lock()
        self._running = sum(machine.state is RunState.RUNNING for machine in machines)
        self.most = self._running
        self.states: dict[Machine, list[RunState]] = {machine: [] for machine in machines}
        for machine in machines:
            self._follow(machine)

    def _follow(self, machine: Machine) -> None:
        def changed(old: RunState, new: RunState) -> None:
            with self._lock:
                self.states[machine].append(new)
                self._running += (new is RunState.RUNNING) - (old is RunState.RUNNING)
                self.most = max(self.most, self._running)

        machine.observers.append(changed)

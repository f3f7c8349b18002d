"""A machine whose guest may run before all of its memory is there, for tests that touch memory themselves."""

from collections.abc import Callable

from support.fake_machine import FakeMachine

from dirtylog.guests.dirtier import COUNTER_ADDRESS
from dirtylog.machine.machine import MachineState


class PatientMachine(FakeMachine):
    """Does not write unless it is told to.

    Attributes:
        while_loading: called when it is given its state.
    """

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__(writes=writes)
        self.while_loading: Callable[[], object] = lambda: None

    def check_postcopy(self, *, of_kernel: bool) -> None:
        del of_kernel

    def load_state(self, state: MachineState) -> None:
        self.while_loading()
        super().load_state(state)

    def _step(self) -> None:
        for address, size in ((self._position, 1), (COUNTER_ADDRESS, 8)):
            if (fetch := self.memory.blocks["ram"].fetch) is not None:
                fetch(address, size)
        super()._step()

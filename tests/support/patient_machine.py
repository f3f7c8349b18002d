"""A machine whose guest may run before all of its memory is there, for tests that touch memory themselves."""

from collections.abc import Callable

from support.fake_machine import FakeMachine

from dirtylog.machine.machine import MachineState


class PatientMachine(FakeMachine):
    """Does not write.

    Attributes:
        while_loading: called when it is given its state.
    """

    def __init__(self) -> None:
        super().__init__(writes=False)
        self.while_loading: Callable[[], object] = lambda: None

    def check_postcopy(self, *, of_kernel: bool) -> None:
        del of_kernel

    def load_state(self, state: MachineState) -> None:
        self.while_loading()
        super().load_state(state)

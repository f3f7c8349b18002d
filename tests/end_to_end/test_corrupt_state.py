import random
from collections.abc import Callable

import pytest
from support.guests import KVM_RAM, machine
from support.streams import PREAMBLE_PIECE, piece, play_to_destination, reason, stream

from dirtylog.errors import DirtylogError, DisconnectedError, UsageError
from dirtylog.machine import KVMMachine, RunState
from dirtylog.machine.machine import MachineState
from dirtylog.migration.messages import BlockInfo, Hello, State
from dirtylog.units import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def state() -> MachineState:
    """What a source would send of a machine that never ran."""
    with machine("kvm", boot=True) as source:
        return source.save_state()


def _play(state: MachineState) -> tuple[BaseException | None, str | None]:
    """A migration that ends after the state: the error of the destination, and the reason that it told the source."""
    hello = Hello(KVMMachine.kind, (BlockInfo("pc.ram", KVM_RAM, PAGE_SIZE),), False, 1, bytes(16), False, False)
    with machine("kvm", boot=False) as guest:
        error, answer = play_to_destination(guest, stream([PREAMBLE_PIECE, piece(hello), piece(State(True, state))]))
        assert guest.state is RunState.INMIGRATE
        return error, reason(answer)


def test_whole_state_is_taken(state: MachineState) -> None:
    error, told = _play(state)
    assert isinstance(error, DisconnectedError)  # no handover came
    assert told is None


_WRONG: dict[str, Callable[[MachineState], object]] = {
    "no parts": lambda state: state.clear(),
    "a part missing": lambda state: state.pop("cpu0"),
    "a part too many": lambda state: state.update(cpu1=state["cpu0"]),
    "another device": lambda state: state.update(toaster=state.pop("serial0")),
    "registers missing": lambda state: state["cpu0"].pop("regs"),
    "unknown registers": lambda state: state["cpu0"].update(more=b""),
    "registers cut off": lambda state: state["cpu0"].update(regs=b"\0"),
    "half an MSR": lambda state: state["cpu0"].update(msrs=b"\0" * 15),
    "interrupt controller cut off": lambda state: state["kvm"].update(ioapic=b""),
    "another interrupt controller": lambda state: state["kvm"].update(ioapic=b"\xff" * len(state["kvm"]["ioapic"])),
    "serial port without registers": lambda state: state["serial0"].clear(),
    "serial port with a wide register": lambda state: state["serial0"].update(scratch=b"\0\0"),
}


@pytest.mark.parametrize("name", _WRONG)
def test_state_of_another_shape_is_refused_and_the_source_told_why(state: MachineState, name: str) -> None:  # M5
    _WRONG[name](state)
    error, told = _play(state)
    assert isinstance(error, UsageError)
    assert told == str(error)


def test_any_other_contents_are_taken_or_refused(state: MachineState) -> None:  # M5
    """What the kernel makes of values that no machine has is up to it; nothing but a named error may come of that."""
    chance = random.Random(2)  # noqa: S311 - repeatable, not secret
    for _ in range(15):
        changed = {part: dict(blobs) for part, blobs in state.items()}
        for blobs in changed.values():
            for name in chance.sample(sorted(blobs), k=min(2, len(blobs))):
                blobs[name] = chance.randbytes(len(blobs[name]))
        error, _ = _play(changed)
        assert isinstance(error, DirtylogError)

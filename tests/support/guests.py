"""Machines that run the dirtier, real and fake, looked at in the same way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
from support.fake_machine import FIRST, LAST, FakeMachine
from support.patient_machine import PatientMachine
from support.waiting import wait_until

from dirtylog import machine as machines
from dirtylog.guests.dirtier import COUNTER_ADDRESS, STARTED, STARTED_ADDRESS, build, check_pages
from dirtylog.machine import KVMMachine, PCMachine, RunState, boot_sector
from dirtylog.units import MIB, PAGE_SIZE

Guest = FakeMachine | PCMachine

KVM_RAM: Final = 8 * MIB
_KVM_RANGE: Final = (1 * MIB, 3 * MIB)


_PC: Final[dict[str, Callable[[int], PCMachine]]] = {
    "kvm": KVMMachine,
    "unicorn": lambda size: machines.UnicornMachine(size),
}
_FAKE: Final[dict[str, Callable[[], FakeMachine]]] = {
    "fake": FakeMachine,
    "patient": lambda: PatientMachine(writes=True),
}


@contextmanager
def machine(kind: str, *, boot: bool) -> Iterator[Guest]:
    """A machine of a kind, with the dirtier loaded unless a guest is to arrive there.

    It is ``fake``, ``patient`` (fake, and may run before its memory is there), ``kvm`` or ``unicorn``.
    """
    made: Guest
    if kind in _PC:
        made = _PC[kind](KVM_RAM)
        if boot:
            boot_sector(made, build(*_KVM_RANGE))
    else:
        made = _FAKE[kind]()
        if boot:
            made.boot()
    try:
        yield made
    finally:
        made.close()
        made.memory.close()


def rounds(guest: Guest) -> int:
    """How many rounds it has completed."""
    return int.from_bytes(guest.system.read(COUNTER_ADDRESS, 8), "little")


def wait_for_rounds(guest: Guest, more: int = 1) -> None:
    """Return once the guest has completed some more rounds; so it runs."""
    wanted = rounds(guest) + more
    wait_until(lambda: rounds(guest) >= wanted, "the guest completed another round")


def check_memory(guest: Guest) -> None:
    """The page rule holds in a guest that stands still."""
    assert guest.state is not RunState.RUNNING
    assert guest.system.read(STARTED_ADDRESS, len(STARTED)) == STARTED
    block = next(iter(guest.memory.blocks.values()))
    assert check_pages(block.array[_written(guest)], rounds(guest)) is None


def _written(guest: Guest) -> slice:
    """The bytes that it adds to, in its first block."""
    first, last = (FIRST, LAST) if isinstance(guest, FakeMachine) else _KVM_RANGE
    return slice(first, last, PAGE_SIZE)


def contents(guest: Guest) -> dict[str, npt.NDArray[np.uint8]]:
    """A copy of all memory of a guest that stands still."""
    return {name: block.array.copy() for name, block in guest.memory.blocks.items()}


def rest_of_memory(guest: Guest) -> dict[str, npt.NDArray[np.uint8]]:
    """The same, with zeros for what it writes."""
    copies = contents(guest)
    ram = next(iter(copies.values()))
    ram[_written(guest)] = 0
    ram[COUNTER_ADDRESS : COUNTER_ADDRESS + 8] = 0
    return copies


def check_runs_on(guest: Guest) -> None:
    """The guest runs, and has lost nothing."""
    assert guest.state is RunState.RUNNING
    wait_for_rounds(guest)
    guest.pause()
    check_memory(guest)
    guest.resume()


def same_memory(one: Guest, other: Guest) -> bool:
    """Whether two machines that stand still hold the same bytes."""
    blocks = other.memory.blocks
    return one.memory.blocks.keys() == blocks.keys() and all(
        bool((block.array == blocks[name].array).all()) for name, block in one.memory.blocks.items()
    )

"""Machines that run the dirtier, real and fake, looked at in the same way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from support.fake_machine import FIRST, LAST, FakeMachine
from support.waiting import wait_until

from dirtylog.guests.dirtier import COUNTER_ADDRESS, STARTED, STARTED_ADDRESS, build, check_pages
from dirtylog.machine import KVMMachine, RunState, UnicornMachine, boot_sector
from dirtylog.units import MIB, PAGE_SIZE

Guest = FakeMachine | KVMMachine | UnicornMachine

KVM_RAM: Final = 8 * MIB
_KVM_RANGE: Final = (1 * MIB, 3 * MIB)


@contextmanager
def machine(kind: str, *, boot: bool) -> Iterator[Guest]:
    """A machine of a kind, ``fake``, ``kvm`` or ``unicorn``, with the dirtier loaded unless a guest is to arrive."""
    made: Guest
    if kind in ("kvm", "unicorn"):
        made = KVMMachine(KVM_RAM) if kind == "kvm" else UnicornMachine(KVM_RAM)
        if boot:
            boot_sector(made, build(*_KVM_RANGE))
    else:
        made = FakeMachine()
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
    first, last = (FIRST, LAST) if isinstance(guest, FakeMachine) else _KVM_RANGE
    block = next(iter(guest.memory.blocks.values()))
    assert check_pages(block.array[first:last:PAGE_SIZE], rounds(guest)) is None


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

"""Guests of both kinds, as their own counters tell what is taken from them."""

import threading
import time
from collections.abc import Iterator

import pytest
from support.running import Emulated, Running, RunningPC
from support.waiting import BOUND

from dirtylog.errors import ClosedError


@pytest.fixture(params=["kvm", "unicorn"])
def guest(request: pytest.FixtureRequest) -> Iterator[RunningPC]:
    guest: RunningPC
    if request.param == "kvm":
        request.getfixturevalue("kvm")
        guest = Running()
    else:
        guest = Emulated()
    guest.boot_dirtier()
    guest.machine.resume()
    guest.wait_for_rounds()
    yield guest
    guest.close()


def rate(guest: RunningPC) -> float:
    """Rounds a second, over several slices and rests of the shares here."""
    before, began = guest.rounds, time.monotonic()
    threading.Event().wait(0.3)
    return (guest.rounds - before) / (time.monotonic() - began)


def test_guest_slows_down_by_about_the_share_and_is_as_fast_again_afterwards(guest: RunningPC) -> None:
    free, slowed = [], []
    for _ in range(3):  # in turns, since others use the host too
        guest.machine.throttle(0.0)
        free.append(rate(guest))
        guest.machine.throttle(0.9)
        slowed.append(rate(guest))
    guest.wait_for_rounds(1)
    assert min(slowed) < max(free) / 3
    guest.machine.throttle(0.0)
    assert max(rate(guest) for _ in range(10)) > max(free) / 3


def test_throttled_guest_is_paused_without_waiting_for_its_rest(guest: RunningPC) -> None:
    guest.machine.throttle(0.99)
    began = time.monotonic()
    for _ in range(20):
        guest.machine.pause()
        guest.machine.resume()
        guest.wait_for_rounds(1)
    assert time.monotonic() - began < BOUND
    before = time.monotonic()
    guest.machine.pause()
    rounds = guest.rounds
    guest.machine.throttle(0.0)
    assert guest.rounds == rounds  # it stands still, throttled or not
    assert time.monotonic() - before < BOUND / 2


def test_throttle_goes_with_the_machine(guest: RunningPC) -> None:
    guest.machine.throttle(0.99)
    guest.close()
    assert guest.machine.throttled == 0
    assert [thread.name for thread in threading.enumerate() if thread.name in ("throttle", "vcpu0")] == []
    guest.machine.throttle(0.0)
    with pytest.raises(ClosedError):
        guest.machine.throttle(0.5)

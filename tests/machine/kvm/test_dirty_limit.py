"""Limits for who writes: the arithmetic with numbers worked out by hand, and guests that are limited."""

import threading

import pytest
from support.require import require
from support.running import MakeRunning, Running, listing
from support.waiting import wait_until

from dirtylog.errors import ClosedError, UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.linux.kvm_ring import MIN_RING_ENTRIES
from dirtylog.machine import UnicornMachine
from dirtylog.machine.kvm.dirty_limit import next_penalty_us, ring_full_us
from dirtylog.memory import TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB

START_ALL_OTHERS = listing("""
    c7050003e0fe00450c00  movl $0xc4500, 0xfee00300
    c7050003e0fe06460c00  movl $0xc4606, 0xfee00300
""")
WRITE_AT_60000 = listing("""
    b80060          1: mov $0x6000, %ax
    8ed8            mov %ax, %ds
    6766ff0500000000  2: incl 0
    ebf6            jmp 2b
""")
"""What other vCPUs run, in real mode from 0x6000."""
READ_AND_COUNT_RARELY = listing("""
    b900020000    1: mov $0x200, %ecx
    a100000600    2: mov 0x60000, %eax
    e2f9          loop 2b
    ff0500500000  incl 0x5000
    ebec          jmp 1b
""")
WRITTEN = 0x60000

FULL = 256_000
"""Microseconds."""


@pytest.mark.parametrize(
    ("entries", "rate", "full"),
    [(65536, 1024, 250_000), (65536, 1000, 256_000), (1024, 1, 4_000_000), (4096, 3, 5_333_333), (65536, 0, 0)],
)
def test_ring_is_full_when_its_pages_were_written(entries: int, rate: int, full: int) -> None:
    assert ring_full_us(entries, rate) == full


@pytest.mark.parametrize(
    ("quota", "rate", "penalty", "expected"),
    [
        # Not more than 25 off: as it is, even at a rate of 0.
        (50, 60, 777, 777),
        (50, 75, 777, 777),
        (50, 25, 777, 777),
        (20, 0, 777, 777),
        # Nothing written by who may write more than that.
        (26, 0, 777, 0),
        (1000, 0, 10 * FULL, 0),
        # Not more than half of the larger off: a tenth of a ring's time.
        (50, 76, 0, FULL // 10),
        (100, 150, 777, 777 + FULL // 10),
        (100, 200, 0, FULL // 10),  # just half
        (100, 203, 0, FULL // 10),  # 50.7 percent, in whole ones
        (200, 100, FULL, FULL - FULL // 10),
        # More: what makes up for it at once.
        (100, 205, 0, FULL * 51 // 49),
        (100, 1000, 0, 9 * FULL),
        (250, 1000, FULL, 4 * FULL),
        (1000, 250, 4 * FULL, FULL),
        (1, 1000, 0, 99 * FULL),
        # Never less than nothing, or more than 99 rings' time.
        (1000, 250, 2 * FULL, 0),
        (200, 150, 1000, 0),
        (1, 1000, FULL, 99 * FULL),
        (100, 150, 99 * FULL, 99 * FULL),
    ],
)
def test_penalty_follows_the_rate(quota: int, rate: int, penalty: int, expected: int) -> None:
    assert next_penalty_us(quota, rate, penalty, FULL) == expected


@pytest.fixture
def has_rings(kvm: KVM) -> None:
    require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")


@pytest.fixture
def guest(run: MakeRunning, has_rings: None) -> Running:
    """A vCPU that reads, and two that write the same word."""
    guest = run(8 * MIB, cpus=3, log_mode=KVMLogMode.RING, ring_size=MIN_RING_ENTRIES)
    guest.system.write(0x6000, WRITE_AT_60000)
    guest.start(START_ALL_OTHERS + READ_AND_COUNT_RARELY)
    guest.wait_until_counted(WRITTEN)
    return guest


@pytest.fixture
def overwriting(guest: Running) -> Running:
    """The same where each store counts, as it does where KVM emulates the guest.

    Where the processor runs it, a page counts once until it is protected again, and writers of one word fill no ring.
    """
    guest.memory.start_logging(TrackingReason.DIRTY_RATE)
    for _ in range(3):
        guest.wait_until_counted(WRITTEN)
        guest.wait_until_counted()
    written = sum(guest.machine.dirty_pages())
    guest.memory.stop_logging(TrackingReason.DIRTY_RATE)
    require("emulated-stores", written > MIN_RING_ENTRIES // 2, "this host's KVM notes a page once, not each store")
    return guest


def adjuster() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "dirty-limit"]


def test_only_those_who_write_more_than_their_quota_are_slowed_down(overwriting: Running) -> None:
    guest = overwriting
    guest.machine.limit_dirty_rate(1, period=0.05)
    wait_until(lambda: all(limit.penalty > 0.01 for limit in guest.machine.dirty_limits[1:]), "both writers must wait")
    reader = guest.machine.dirty_limits[0]
    assert (reader.cpu, reader.quota, reader.penalty) == (0, 1, 0.0)
    for _ in range(3):
        guest.wait_until_counted()
    # They write about a ring a penalty, where they could write hundreds.
    wait_until(lambda: all(limit.rate < 100 for limit in guest.machine.dirty_limits), "they write less")


def test_limit_of_one_vcpu_leaves_the_others_alone(overwriting: Running) -> None:
    guest = overwriting
    guest.machine.limit_dirty_rate(1, 2, period=0.05)
    wait_until(lambda: [limit.penalty > 0.01 for limit in guest.machine.dirty_limits] == [True], "it must wait")
    (limit,) = guest.machine.dirty_limits
    assert limit.cpu == 2


def test_end_of_the_limit_is_the_end_of_a_penalty(overwriting: Running) -> None:
    guest = overwriting
    guest.machine.limit_dirty_rate(1, period=0.01)
    wait_until(lambda: any(limit.penalty > 0.2 for limit in guest.machine.dirty_limits), "they must wait for long")
    guest.machine.limit_dirty_rate(0)
    assert guest.machine.dirty_limits == ()
    assert adjuster() == []
    assert not guest.memory.is_wanted(TrackingReason.DIRTY_LIMIT)
    guest.wait_until_counted(WRITTEN)


def test_limits_end_when_the_last_one_does(guest: Running) -> None:
    for cpu in (1, 2):
        guest.machine.limit_dirty_rate(100, cpu)
    guest.machine.limit_dirty_rate(0, 1)
    assert [limit.cpu for limit in guest.machine.dirty_limits] == [2]
    assert adjuster() == ["dirty-limit"]
    assert guest.memory.is_wanted(TrackingReason.DIRTY_LIMIT)
    guest.machine.limit_dirty_rate(0, 2)
    guest.machine.limit_dirty_rate(0, 2)
    assert adjuster() == []
    assert not guest.memory.is_wanted(TrackingReason.DIRTY_LIMIT)


def test_limited_machine_pauses_and_closes_at_once(overwriting: Running) -> None:
    guest = overwriting
    guest.machine.limit_dirty_rate(1, period=0.01)
    wait_until(lambda: any(limit.penalty > 0.2 for limit in guest.machine.dirty_limits), "they must wait for long")
    guest.machine.pause()
    guest.machine.resume()
    guest.close()
    assert guest.machine.dirty_limits == ()
    assert adjuster() == []
    guest.machine.limit_dirty_rate(0)
    with pytest.raises(ClosedError):
        guest.machine.limit_dirty_rate(1)


@pytest.mark.parametrize(("quota", "cpu"), [(-1, None), (-1, 0), (10, 3), (10, -1), (0, 3)])
def test_limit_that_cannot_be_is_refused(guest: Running, quota: int, cpu: int | None) -> None:
    with pytest.raises(UsageError) as caught:
        guest.machine.limit_dirty_rate(quota, cpu)
    assert caught.value.remedy is not None
    assert guest.machine.dirty_limits == ()
    assert adjuster() == []


def test_machine_that_cannot_tell_writers_apart_limits_none(run: MakeRunning) -> None:
    machine = run(log_mode=KVMLogMode.LEGACY).machine
    for call in (machine.check_dirty_limit, lambda: machine.limit_dirty_rate(1)):
        with pytest.raises(UsageError, match="'legacy' does not tell vCPUs apart") as caught:
            call()
        assert caught.value.remedy is not None
    assert machine.dirty_limits == ()


def test_emulated_machine_limits_nobody() -> None:
    machine = UnicornMachine(MIB)
    for call in (machine.check_dirty_limit, lambda: machine.limit_dirty_rate(1)):
        with pytest.raises(UsageError, match="does not know which vCPU writes") as caught:
            call()
        assert caught.value.remedy is not None
    assert machine.dirty_limits == ()
    machine.close()

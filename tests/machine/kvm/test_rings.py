"""Machines that tell by dirty rings which pages were written."""

import threading
from typing import Any

import numpy as np
import pytest
from support.kvm import open_descriptors
from support.require import require
from support.running import MakeRunning, Running, listing
from support.waiting import BOUND, wait_until

from dirtylog.errors import ClosedError, DirtylogError, HostError, UsageError
from dirtylog.linux.kvm import KVM, VM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.linux.kvm_ring import MIN_RING_ENTRIES
from dirtylog.machine import KVMMachine, RunState
from dirtylog.memory import TrackingReason
from dirtylog.trackers import DirtyRings, KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE

RING = KVMLogMode.RING

COUNT_IN_PAGES = listing("""
    bf00001000    1: mov $0x100000, %edi
    ff07          2: incl (%edi)
    81c700100000  add $0x1000, %edi
    81ff00008000  cmp $0x800000, %edi
    75f0          jne 2b
    ff0500500000  incl 0x5000
    ebe3          jmp 1b
""")
"""1792 pages, more than a small ring holds."""
START_ALL_OTHERS = listing("""
    c7050003e0fe00450c00  movl $0xc4500, 0xfee00300
    c7050003e0fe06460c00  movl $0xc4606, 0xfee00300
""")
COUNT_AT_60000 = listing("""
    b80060          1: mov $0x6000, %ax
    8ed8            mov %ax, %ds
    6766ff0500000000  2: incl 0
    ebf6            jmp 2b
""")
"""What other vCPUs run, in real mode from 0x6000."""


@pytest.fixture(autouse=True)
def has_rings(kvm: KVM) -> None:
    require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")


@pytest.mark.parametrize("size", [MIN_RING_ENTRIES, 4 * MIN_RING_ENTRIES, None])
def test_copies_are_right_whatever_the_rings_hold(run: MakeRunning, size: int | None) -> None:  # D1 D2 D3
    guest = run(8 * MIB, log_mode=RING, ring_size=size)
    (ram,) = guest.memory.ram_regions
    assert ram.block is not None
    memory, copy = ram.block.array.reshape(-1, PAGE_SIZE), np.zeros((8 * MIB // PAGE_SIZE, PAGE_SIZE), np.uint8)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.start(COUNT_IN_PAGES)
    for _ in range(10):
        guest.wait_until_counted()
        pages = guest.harvest()
        copy[pages] = memory[pages]
        guest.machine.pause()
        pages = guest.harvest()
        copy[pages] = memory[pages]
        assert (copy == memory).all()
        guest.machine.resume()
    assert guest.machine.failure is None


def test_guest_that_nobody_looks_after_is_reaped(run: MakeRunning, monkeypatch: pytest.MonkeyPatch) -> None:
    reaped: list[DirtyRings] = []
    reap = DirtyRings.reap

    def note(rings: DirtyRings) -> None:
        reap(rings)
        reaped.append(rings)

    monkeypatch.setattr(DirtyRings, "reap", note)
    guest = run(8 * MIB, log_mode=RING)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.start(COUNT_IN_PAGES)
    before = len(reaped)
    wait_until(lambda: len(reaped) > before + 3, "the rings were reaped")
    assert len(set(guest.harvest()) & set(range(0x100, 0x800))) > 0


def test_dirty_pages_are_told_for_each_vcpu(run: MakeRunning) -> None:  # which may be more than it writes
    guest = run(8 * MIB, cpus=3, log_mode=RING)
    assert guest.machine.dirty_pages() == (0, 0, 0)
    guest.system.write(0x6000, COUNT_AT_60000)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.start(START_ALL_OTHERS + bytes.fromhex("ebfe"))
    wait_until(lambda: all(guest.machine.dirty_pages()[1:]), "both others wrote")
    first, *others = guest.machine.dirty_pages()
    wait_until(lambda: sum(guest.machine.dirty_pages()[1:]) > sum(others) + 3, "they wrote on")
    guest.machine.pause()

    pages = guest.machine.dirty_pages()
    assert pages[0] == first
    assert guest.machine.dirty_pages() == pages


def test_reaper_that_fails_ends_the_machine(run: MakeRunning, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = run(8 * MIB, log_mode=RING)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    monkeypatch.setattr(VM, "reset_dirty_rings", lambda vm: 0)
    guest.start(COUNT_IN_PAGES)
    assert guest.ended.wait(BOUND)
    assert guest.machine.state is RunState.INTERNAL_ERROR
    assert isinstance(guest.machine.failure, HostError)
    assert "does not protect again" in str(guest.machine.failure)
    with pytest.raises(HostError, match="does not protect again"):
        guest.memory.sync_dirty_log()


def test_state_moves_between_machines_with_rings_and_without(run: MakeRunning) -> None:
    source, target = run(log_mode=RING), run(log_mode=KVMLogMode.LEGACY)
    target.machine.load_state(source.machine.save_state())
    source.machine.load_state(target.machine.save_state())


@pytest.mark.parametrize("cpus", [1, 2])
def test_close_is_idempotent_and_gives_everything_back(kvm: KVM, cpus: int) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    guest = Running(8 * MIB, cpus=cpus, log_mode=RING)
    guest.memory.start_logging(TrackingReason.MIGRATION)
    guest.start(COUNT_IN_PAGES)
    guest.wait_until_counted()

    guest.close()
    guest.close()

    assert threading.active_count() == threads
    assert open_descriptors() == descriptors
    with pytest.raises(ClosedError):
        guest.machine.dirty_pages()


def test_vcpus_cannot_be_told_apart_without_rings(run: MakeRunning) -> None:
    with pytest.raises(UsageError, match="'legacy' does not tell vCPUs apart") as caught:
        run(log_mode=KVMLogMode.LEGACY).machine.dirty_pages()
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"log_mode": RING, "ring_size": 0}, UsageError, "a dirty ring of 0 entries"),
        ({"log_mode": RING, "ring_size": 1000}, UsageError, "a dirty ring of 1000 entries"),
        ({"log_mode": RING, "ring_size": 1 << 30}, UsageError, "a dirty ring of 1073741824 entries"),
        ({"log_mode": KVMLogMode.LEGACY, "ring_size": 4096}, UsageError, "a ring size without dirty rings"),
        ({"ring_size": 4096}, UsageError, "a ring size without dirty rings"),
    ],
)
def test_rings_that_cannot_be_are_refused_without_a_leak(
    kvm: KVM, options: dict[str, Any], error: type[DirtylogError], message: str
) -> None:
    before, threads = open_descriptors(), threading.active_count()
    with pytest.raises(error, match=message) as caught:
        KVMMachine(MIB, **options)
    assert caught.value.remedy is not None
    assert open_descriptors() == before
    assert threading.active_count() == threads


def test_kernel_without_rings_is_named_without_a_leak(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    check = VM.check

    def no_rings(vm: VM, capability: Capability) -> int:
        return 0 if "RING" in capability.name else check(vm, capability)

    monkeypatch.setattr(VM, "check", no_rings)
    before = open_descriptors()
    with pytest.raises(HostError, match="has no dirty rings"):
        KVMMachine(MIB, log_mode=RING)
    assert open_descriptors() == before

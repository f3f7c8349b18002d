import platform
import signal
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kvm import KVMWorld
from support.rings import LIMIT, KernelRing, RingVM

from dirtylog.errors import ClosedError, HostError, KernelError, UsageError
from dirtylog.linux.ioctl import Request
from dirtylog.linux.kvm import KVM, VM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.linux.kvm_ring import DIRTY_GFN, MIN_RING_ENTRIES, DirtyRing, enable_dirty_rings, map_dirty_ring
from dirtylog.memory import TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import PAGE_SIZE

RING, ACQUIRE_RELEASE = Capability.DIRTY_LOG_RING, Capability.DIRTY_LOG_RING_ACQ_REL


@pytest.mark.parametrize(
    ("offered", "enabled"), [((RING, ACQUIRE_RELEASE), RING), ((RING,), RING), ((ACQUIRE_RELEASE,), ACQUIRE_RELEASE)]
)
@pytest.mark.parametrize("entries", [1024, 4096, LIMIT])
def test_rings_are_turned_on_by_their_size_in_bytes(
    offered: tuple[Capability, ...], enabled: Capability, entries: int
) -> None:
    vm = RingVM(*offered)
    enable_dirty_rings(vm, entries)
    assert vm.enabled == [(enabled, (16 * entries,))]


@pytest.mark.parametrize("entries", [-1024, 0, 1, 512, 1000, 1025, 3072, 2 * LIMIT])
def test_size_that_no_ring_can_have_is_refused(entries: int) -> None:
    vm = RingVM()
    with pytest.raises(UsageError, match=f"a dirty ring of {entries} entries") as caught:
        enable_dirty_rings(vm, entries)
    assert caught.value.remedy == "give a power of two from 1024 to 65536, such as 4096"
    assert vm.enabled == []


def test_kernel_without_rings_is_named() -> None:
    with pytest.raises(HostError, match="has no dirty rings") as caught:
        enable_dirty_rings(RingVM(Capability.IRQCHIP), 4096)
    assert caught.value.remedy == "use Linux 5.11 or newer, or a dirty log"


def test_processor_that_reorders_accesses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = RingVM(ACQUIRE_RELEASE)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="cannot be read in the order that aarch64 needs"):
        enable_dirty_rings(vm, 4096)
    assert vm.enabled == []


def pages(ring: DirtyRing) -> list[int]:
    return [int(page) for page in ring.peek()["offset"]]


def move(ring: DirtyRing, kernel: KernelRing) -> list[int]:
    """Take what is there, and have the kernel empty it."""
    found = pages(ring)
    marked = ring.release()
    assert kernel.reset_some() == marked
    return found


def test_empty_ring_has_nothing() -> None:
    ring = DirtyRing(KernelRing().entries)
    assert ring.is_empty
    assert not ring.overflowed
    assert pages(ring) == []
    assert ring.release() == 0


def test_entries_are_seen_until_they_are_released() -> None:
    kernel = KernelRing()
    ring = DirtyRing(kernel.entries)
    kernel.push(0x10003, 7, 8, 7)

    for _ in range(2):
        assert not ring.is_empty
        assert ring.peek().tolist() == [(1, 0x10003, 7), (1, 0x10003, 8), (1, 0x10003, 7)]
    assert kernel.reset_some() == 0

    assert ring.release() == 3
    assert ring.is_empty
    assert kernel.reset_some() == 3


def test_what_was_seen_does_not_change_with_the_ring() -> None:
    kernel = KernelRing()
    ring = DirtyRing(kernel.entries)
    kernel.push(0, 7)
    seen = ring.peek()
    ring.release()
    assert seen.tolist() == [(1, 0, 7)]


def test_what_nobody_has_seen_is_not_released() -> None:  # D1
    kernel = KernelRing()
    ring = DirtyRing(kernel.entries)
    kernel.push(0, 1, 2)
    assert ring.release() == 0
    assert pages(ring) == [1, 2]
    kernel.push(0, 3)
    assert ring.release() == kernel.reset_some() == 2
    assert ring.release() == 0
    assert move(ring, kernel) == [3]


@pytest.mark.parametrize("start", [0, 1, 500, MIN_RING_ENTRIES - 1])
@pytest.mark.parametrize("count", [1, 600, MIN_RING_ENTRIES - 1])
def test_entries_are_in_order_wherever_the_ring_wraps(start: int, count: int) -> None:
    kernel = KernelRing()
    ring = DirtyRing(kernel.entries)
    kernel.push(0, *range(start))
    move(ring, kernel)
    kernel.push(0, *range(count))

    assert move(ring, kernel) == list(range(count))
    assert ring.is_empty
    assert not ring.astray


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("more", [0, 1, 7, 11])
def test_ring_that_overflowed_finds_back(start: int, more: int) -> None:
    kernel = KernelRing(16)
    ring = DirtyRing(kernel.entries)
    kernel.push(0, *range(start))
    move(ring, kernel)

    kernel.push(0, *range(100, 116 + more))
    assert ring.overflowed
    assert set(move(ring, kernel)) == set(range(100 + more, 116 + more))
    assert ring.astray
    assert not ring.is_empty
    assert move(ring, kernel) == []

    kernel.push(0, 200)
    assert move(ring, kernel) == [200]
    kernel.push(0, 201)
    assert move(ring, kernel) == [201]
    assert kernel.reset == kernel.dirty


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=30))
def test_ring_is_a_queue_that_tells_when_it_lost_something(steps: list[tuple[int, bool]]) -> None:
    kernel, number = KernelRing(16), 0
    ring = DirtyRing(kernel.entries)
    expected: list[int] = []
    stuck = False
    for burst, takes in steps:
        if not kernel.full:
            written = range(number, number + burst)
            number += burst
            kernel.push(0, *written)
            expected += written
            stuck = False
        elif ring.astray and ring.peek().size == 0:
            if stuck:
                ring.pass_over(8)
                assert kernel.reset_some() == 8
            stuck = True
        if takes:
            overflowed = ring.overflowed
            found = move(ring, kernel)
            assert overflowed or found == expected
            assert not overflowed or ring.astray
            expected = []
    assert ring.overflowed or pages(ring) == expected


def test_rings_cannot_be_turned_on_once_there_is_a_vcpu(kvm: KVM) -> None:
    with kvm.create_vm() as vm, vm.create_vcpu(0), pytest.raises(KernelError, match="KVM_ENABLE_CAP"):
        enable_dirty_rings(vm, MIN_RING_ENTRIES)


def test_ring_of_a_closed_vcpu_is_refused(kvm: KVM) -> None:
    with kvm.create_vm() as vm:
        enable_dirty_rings(vm, MIN_RING_ENTRIES)
        vcpu = vm.create_vcpu(0)
        vcpu.close()
        with pytest.raises(ClosedError):
            map_dirty_ring(vcpu, MIN_RING_ENTRIES)


def test_ring_of_a_new_vcpu_is_empty(kvm: KVM) -> None:
    with kvm.create_vm() as vm:
        enable_dirty_rings(vm, MIN_RING_ENTRIES)
        with vm.create_vcpu(0) as vcpu:
            ring = map_dirty_ring(vcpu, MIN_RING_ENTRIES)
            assert ring.size == MIN_RING_ENTRIES
            assert np.count_nonzero(ring["flags"]) == 0


def test_kernel_tells_what_a_vcpu_wrote(kvm: KVM) -> None:
    with closing(KVMWorld(kvm, KVMLogMode.RING, 100)) as world:
        world.root.add(world.ram, 0)
        world.memory.start_logging(TrackingReason.MIGRATION)
        ring = DirtyRing(map_dirty_ring(world.vcpus[0], MIN_RING_ENTRIES))

        world.write([5 * PAGE_SIZE, 99 * PAGE_SIZE])

        found = ring.peek()
        # Of pages that it only reads KVM notes those that it maps writable at once.
        assert found["offset"][found["slot"] == found["slot"][-1]].tolist() == [5, 99]
        assert ring.release() == found.size
        assert world.vm.reset_dirty_rings() == found.size
        assert ring.peek().size == 0
        assert world.vm.reset_dirty_rings() == 0


def test_signals_wait_while_pages_are_protected() -> None:
    class Looking(VM):
        def __init__(self) -> None:
            super().__init__(-1, 0)

        def _ioctl(self, request: Request, argument: object = 0) -> int:
            assert request.name == "KVM_RESET_DIRTY_RINGS"
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            assert {signal.SIGINT, signal.SIGALRM, signal.SIGTSTP, signal.SIGUSR1} <= blocked
            return 42

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert Looking().reset_dirty_rings() == 42
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_entries_are_as_long_as_the_kernels() -> None:
    assert DIRTY_GFN.itemsize == 16

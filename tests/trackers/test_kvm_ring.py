from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kvm import KVMWorld
from support.oracles import to_bits, to_words
from support.rings import KernelRing, RingVCPU, RingVM

from dirtylog.errors import HostError, KernelError, UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import MemorySlotFlag
from dirtylog.linux.kvm_ring import MIN_RING_ENTRIES
from dirtylog.memory import Client, TrackingReason
from dirtylog.trackers import DirtyRings, KVMLogMode, KVMRingTracker, MemorySlot
from dirtylog.units import MIB, PAGE_SIZE

PAGES = 100
ALL = set(range(PAGES))
LOG = MemorySlotFlag.LOG_DIRTY_PAGES


class Bench:
    """Rings that are filled by hand, slot 3, which is watched, and slot 4, which is not yet."""

    def __init__(self, cpus: int = 1, pages: int = PAGES) -> None:
        self.holds = 0
        self.held = False
        self.vm = RingVM()
        self.rings = DirtyRings(self.vm, self._hold, MIN_RING_ENTRIES)
        self.slot, self.other = (
            MemorySlot(self.vm, number, gpa=0, pages=pages, hva=0, readonly=False) for number in (3, 4)
        )
        self.rings.watch(self.slot)
        for _ in range(cpus):
            self.vm.rings.append(KernelRing())
            self.rings.add(RingVCPU(self.vm.rings[-1]))

    @contextmanager
    def _hold(self) -> Iterator[None]:
        assert not self.held
        self.held = True
        self.holds += 1
        try:
            yield
        finally:
            self.held = False

    def push(self, slot: int, *pages: int, cpu: int = 0) -> None:
        self.vm.rings[cpu].push(slot, *pages)

    def collect(self, slot: MemorySlot | None = None) -> set[int]:
        slot = slot or self.slot
        words = to_words(range(slot.pages), slot.pages)  # which are to be overwritten
        self.rings.collect(slot, words)
        return to_bits(words)


def test_entries_are_their_slots_pages_once() -> None:
    bench = Bench(cpus=2)
    bench.rings.watch(bench.other)
    bench.push(3, 5, 99, 5)
    bench.push(3, 5, 64, cpu=1)
    bench.push(4, 0, cpu=1)

    assert bench.collect() == {5, 64, 99}
    assert bench.collect(bench.other) == {0}
    assert bench.collect() == bench.collect(bench.other) == set()


def test_what_was_reaped_is_collected_later() -> None:  # D1
    bench = Bench()
    for page in range(3):
        bench.push(3, page)
        bench.rings.reap()
    bench.push(3, 3)
    assert bench.collect() == {0, 1, 2, 3}


def test_pages_are_protected_before_they_are_shown_and_while_nobody_writes() -> None:  # D3
    bench = Bench()
    bench.push(3, 5)
    words = to_words((), PAGES)
    seen: list[tuple[bool, set[int]]] = []
    bench.vm.before_reset = lambda: seen.append((bench.held, to_bits(words)))

    bench.rings.collect(bench.slot, words)

    assert (seen, to_bits(words)) == ([(True, set())], {5})


def test_nobody_is_troubled_for_nothing() -> None:
    bench = Bench()
    bench.rings.reap()
    assert bench.collect() == set()
    assert (bench.vm.resets, bench.holds) == (0, 0)


@pytest.mark.parametrize("page", [PAGES, 127, (1 << 64) - 1])
def test_entry_past_the_slots_end_is_ignored_and_makes_room(page: int) -> None:  # D9
    bench = Bench()
    bench.push(3, page, 7)
    assert bench.collect() == {7}
    assert bench.vm.rings[0].reset == 2


@pytest.mark.parametrize("slot", [2, 4, 3 | 1 << 16])
def test_entry_of_an_unknown_slot_is_ignored_and_makes_room(slot: int) -> None:
    bench = Bench()
    bench.push(slot, 5)
    assert bench.collect() == set()
    assert bench.vm.rings[0].reset == 1


def test_slot_that_is_not_watched_is_clean() -> None:  # W3
    bench = Bench()
    bench.push(4, 5)
    assert bench.collect(bench.other) == set()
    bench.rings.forget(bench.slot)
    bench.rings.forget(bench.slot)
    bench.push(3, 5)
    assert bench.collect() == set()


def test_what_was_written_before_a_slot_is_watched_does_not_count() -> None:
    bench = Bench()
    bench.push(3, 1)
    bench.rings.reap()
    bench.push(3, 2)

    bench.rings.watch(bench.slot)

    bench.push(3, 4)
    assert bench.collect() == {4}


def test_entries_are_counted_for_each_vcpu() -> None:
    bench = Bench(cpus=3)
    assert bench.rings.dirty_pages == (0, 0, 0)
    bench.push(3, 1, 2, 1, cpu=0)
    bench.push(4, 1, cpu=2)
    bench.rings.reap()
    bench.push(3, 1, cpu=2)
    bench.collect()
    assert bench.rings.dirty_pages == (3, 0, 2)


@given(
    st.integers(1, 200),
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([3, 3, 3, 4, 7]), st.integers(0, 250), st.integers(1, 300)),
        max_size=40,
    ),
)
def test_pages_are_those_that_a_loop_finds(pages: int, bursts: list[tuple[int, int, int, int]]) -> None:  # D1 D9
    bench = Bench(2, pages)
    expected: set[int] = set()
    for cpu, slot, first, count in bursts:
        burst = range(first, first + count)
        bench.push(slot, *burst, cpu=cpu)
        for page in burst:
            if slot == 3 and page < pages:
                expected.add(page)
        if first % 2:
            bench.rings.reap()
        elif first % 3:
            assert bench.collect() == expected
            expected.clear()
        if bench.vm.rings[cpu].dirty - bench.vm.rings[cpu].reset > MIN_RING_ENTRIES - 300:
            bench.rings.reap()
    assert bench.collect() == expected
    assert bench.rings.overflows == 0


@given(
    st.integers(0, MIN_RING_ENTRIES),
    st.lists(
        st.tuples(
            st.sampled_from([3, 3, 4, 7]),
            st.one_of(st.integers(900, 1100), st.integers(0, 50_000), st.sampled_from([49_999, (1 << 64) - 1])),
        ),
        max_size=300,
    ),
)
def test_entries_of_several_slots_close_and_far_are_told_apart_where_the_ring_wraps(
    start: int, entries: list[tuple[int, int]]
) -> None:  # D1 D9
    bench = Bench(pages=49_999)
    bench.rings.watch(bench.other)
    for first in range(0, start, 500):
        bench.push(7, *[0] * min(500, start - first))
        bench.rings.reap()
    for slot, page in entries:
        bench.push(slot, page)
    for watched in (bench.slot, bench.other):
        expected = {page for number, page in entries if number == watched.number and page < watched.pages}
        assert bench.collect(watched) == expected
    assert bench.vm.rings[0].reset == start + len(entries)


@pytest.mark.parametrize("more", [0, 1, 500])
def test_overflow_has_all_pages_protected_and_reported(more: int) -> None:  # D1
    bench = Bench(cpus=2)
    bench.rings.watch(bench.other)
    bench.vm.flags.clear()
    bench.push(3, *[7] * (MIN_RING_ENTRIES + more))
    bench.push(4, 8, cpu=1)

    assert bench.collect() == ALL

    assert bench.vm.flags == [(3, 0), (3, LOG), (4, 0), (4, LOG)]
    assert bench.rings.overflows == 1
    assert bench.collect(bench.other) == ALL
    for page in (1, 2):
        bench.push(3, page)
        assert bench.collect() == {page}
    assert bench.vm.rings[0].dirty == bench.vm.rings[0].reset


@pytest.mark.parametrize("more", [970, MIN_RING_ENTRIES, 5000])
def test_ring_that_overflowed_so_far_that_it_counts_as_full_is_freed(more: int) -> None:  # D1
    bench = Bench()
    (ring,) = bench.vm.rings
    cpu = RingVCPU(ring)
    bench.rings = DirtyRings(bench.vm, bench._hold, MIN_RING_ENTRIES)
    bench.rings.watch(bench.slot)
    bench.rings.add(cpu)
    bench.push(3, *[7] * (MIN_RING_ENTRIES + more))
    exits = 0
    while ring.full:
        bench.rings.make_room(cpu)
        exits += 1
    assert exits <= 3 + 2 * more // MIN_RING_ENTRIES
    assert bench.collect() == ALL

    bench.push(3, 5)
    assert bench.collect() == {5}
    assert ring.dirty == ring.reset


def test_ring_that_is_empty_again_when_its_vcpu_says_that_it_is_full_is_left_alone() -> None:
    bench = Bench()
    (ring,) = bench.vm.rings
    cpu = RingVCPU(ring)
    bench.rings = DirtyRings(bench.vm, bench._hold, MIN_RING_ENTRIES)
    bench.rings.add(cpu)
    for _ in range(3):
        bench.push(3, *range(MIN_RING_ENTRIES + 10))
        bench.rings.reap()  # by another thread
        bench.rings.make_room(cpu)
        assert ring.dirty - ring.reset == 10
        assert not ring.full
        bench.push(3, 1)
        bench.rings.reap()
        bench.rings.make_room(cpu)
        assert ring.dirty == ring.reset


def test_start_over_that_the_kernel_refuses_is_made_up_for() -> None:  # D1
    bench = Bench()
    bench.push(3, *[7] * MIN_RING_ENTRIES)
    bench.vm.refuses = True
    for _ in range(2):
        with pytest.raises(KernelError):
            bench.collect()
    bench.vm.refuses = False
    bench.vm.flags.clear()
    assert bench.collect() == ALL
    assert bench.vm.flags == [(3, 0), (3, LOG)]
    assert bench.collect() == set()


def test_reset_that_was_cut_short_has_all_pages_protected_and_reported() -> None:  # D1
    bench = Bench(cpus=2)
    bench.push(3, 5, 6)
    bench.push(3, 7, cpu=1)
    bench.vm.cuts = [0, 1, 0]
    bench.vm.flags.clear()

    assert bench.collect() == ALL

    assert bench.vm.resets == 4
    assert bench.vm.flags == [(3, 0), (3, LOG)]
    bench.push(3, 8)
    assert bench.collect() == {8}


def test_reset_that_had_to_be_asked_for_twice_but_left_nothing_out_changes_nothing() -> None:
    bench = Bench()
    bench.push(3, 5)
    bench.vm.cuts = [0, 0]
    assert bench.collect() == {5}
    assert bench.collect() == set()


@pytest.mark.parametrize("answer", [0, 3])
def test_reset_that_does_not_answer_what_was_taken_is_an_error_for_good(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    bench = Bench()
    bench.push(3, 5, 6)
    monkeypatch.setattr(RingVM, "reset_dirty_rings", lambda vm: answer)
    for _ in range(2):
        with pytest.raises(HostError, match="does not protect again what was taken") as caught:
            bench.collect()
        assert caught.value.remedy is not None
        monkeypatch.setattr(RingVM, "reset_dirty_rings", lambda vm: 0)


def test_failed_reset_shows_nothing_and_is_made_up_for() -> None:  # D1
    bench = Bench()
    bench.push(3, 5)

    def fail() -> None:
        raise KernelError("KVM_RESET_DIRTY_RINGS", 12, "no memory")

    bench.vm.before_reset = fail
    with pytest.raises(KernelError):
        bench.rings.reap()
    bench.vm.before_reset = lambda: None

    bench.push(3, 6)
    assert bench.collect() == {5, 6}
    assert bench.vm.rings[0].reset == 2


def test_closed_rings_still_give_what_was_taken() -> None:
    bench = Bench()
    bench.push(3, 5)
    bench.rings.reap()
    bench.rings.close()
    bench.rings.close()
    bench.rings.reap()
    assert bench.collect() == {5}
    assert bench.rings.dirty_pages == (1,)


def test_size_is_checked() -> None:
    with pytest.raises(UsageError, match="a dirty ring of 1000 entries"):
        DirtyRings(RingVM(), Bench()._hold, 1000)


def tracker_on(bench: Bench) -> KVMRingTracker:
    bench.rings.forget(bench.slot)
    bench.vm.flags.clear()
    return KVMRingTracker(bench.rings, bench.slot)


def collect(tracker: KVMRingTracker) -> set[int]:
    words = to_words((), PAGES)
    tracker.collect(words)
    return to_bits(words)


def test_tracker_logs_from_arm_to_disarm() -> None:
    bench = Bench()
    tracker = tracker_on(bench)
    assert tracker.pages == PAGES
    bench.push(3, 1)
    tracker.arm()
    bench.push(3, 2)
    assert collect(tracker) == {2}
    tracker.clear(0, PAGES, to_words([2], PAGES))
    bench.push(3, 3)
    tracker.disarm()
    assert collect(tracker) == set()
    tracker.arm()
    assert collect(tracker) == set()
    assert bench.vm.flags == [(3, LOG), (3, 0), (3, LOG)]


def test_tracker_that_cannot_be_armed_or_disarmed_keeps_nothing() -> None:
    bench = Bench()
    tracker = tracker_on(bench)
    for armed, call in ((False, tracker.arm), (True, tracker.disarm)):
        if armed:
            tracker.arm()
        bench.vm.refuses = True
        with pytest.raises(KernelError):
            call()
        bench.vm.refuses = False
        bench.push(3, 1)
        assert collect(tracker) == set()


def logged_world(kvm: KVM, pages: int, cpus: int = 1) -> KVMWorld:
    world = KVMWorld(kvm, KVMLogMode.RING, pages, cpus=cpus)
    world.root.add(world.ram, MIB)
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.ram.test_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
    return world


def harvest(world: KVMWorld) -> set[int]:
    world.memory.sync_dirty_log()
    assert world.ram.block is not None
    return to_bits(world.ram.block.dirty.fetch_and_clear(0, world.ram.block.pages, Client.MIGRATION))


def write(world: KVMWorld, pages: list[int]) -> None:
    for start in range(0, len(pages), 3000):
        world.write([MIB + page * PAGE_SIZE for page in pages[start : start + 3000]])


@pytest.mark.parametrize("cpus", [1, 3])
def test_ring_much_smaller_than_what_is_written_loses_nothing(kvm: KVM, cpus: int) -> None:  # D1
    with closing(logged_world(kvm, 5000, cpus)) as world:
        assert world.rings is not None
        for turn in range(4):
            written, overflows = list(range(turn, 5000, turn + 1)), world.rings.overflows
            for cpu in range(cpus):
                write(world, written[cpu::cpus])
            found = harvest(world)
            assert found == (set(range(5000)) if world.rings.overflows > overflows else set(written))
        assert world.ring_full_exits > 0
        assert len(world.rings.dirty_pages) == cpus
        assert all(count > MIN_RING_ENTRIES // 2 for count in world.rings.dirty_pages)
        assert harvest(world) == set()
        write(world, [4, 7])
        assert harvest(world) == {4, 7}


def test_rings_wrap_many_times(kvm: KVM) -> None:  # D1
    with closing(logged_world(kvm, 1000)) as world:
        assert world.rings is not None
        for turn in range(20):
            written = list(range(turn * 7, turn * 7 + 700))
            write(world, written)
            assert harvest(world) == set(written)
        assert world.rings.overflows == 0


def test_room_is_made_in_one_ring_alone_and_the_others_pages_are_collected_later() -> None:  # D1
    bench = Bench(cpus=2)
    first, second = bench.vm.rings
    bench.push(3, 5, 6)
    bench.push(3, 7, cpu=1)
    bench.rings.make_room(bench.rings._cpus[0].vcpu, alone=True)
    assert (first.reset, second.reset) == (2, 0)
    assert bench.rings.written == (2, 1)
    assert bench.rings.dirty_pages == (2, 0)
    assert bench.collect() == {5, 6, 7}
    assert bench.rings.written == bench.rings.dirty_pages == (2, 1)

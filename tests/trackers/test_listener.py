from collections.abc import Callable
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.kvm import KVMWorld
from support.model_tracker import ModelTracker, ModelWorld
from support.worlds import World

from dirtylog.linux.kvm import KVM
from dirtylog.memory import ClearChunks, Client, Memory, MemoryRegion, MemoryRegionSection, PageBitmap, TrackingReason
from dirtylog.memory.listener import offers
from dirtylog.trackers import KVMLogMode, SplitTrackerListener, TrackerListener, tracker_listener
from dirtylog.units import MIB, PAGE_SIZE, WORD_BITS

PAGES = 200
WINDOWS = [(0, 130, 0), (130, 70, 8 * MIB), (61, 80, 16 * MIB)]
"""Parts of the RAM that come and go, as first page, pages and address. They touch and overlap amid words."""

WRITTEN = [0, 61, 64, 100, 129, 130, 140, 199]
"""The only pages that are written: few, so that what their users do meets."""
EDGES = [0, 60, 64, 65, 128, 130, 199, 200]

windows = st.integers(0, len(WINDOWS) - 1)
page_lists = st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=4)
ranges = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)).filter(lambda pair: pair[0] < pair[1])
"""First page, and the page after the last."""


class DirtyLogUsers(RuleBasedStateMachine):
    """A guest, a display and a migration use one dirty log in any order; each keeps a copy that has to catch up.

    A copy that differs after its user did all that the rules ask for is a lost write.
    """

    world: World
    ram: MemoryRegion
    aliases: list[MemoryRegion]

    def make_world(self) -> World:
        raise NotImplementedError

    @initialize()
    def set_up(self) -> None:
        self.world = self.make_world()
        self.ram = self.world.ram
        self.aliases = [
            self.world.memory.alias(f"window{n}", self.ram, first * PAGE_SIZE, count * PAGE_SIZE)
            for n, (first, count, _) in enumerate(WINDOWS)
        ]
        for alias, (_, _, address) in zip(self.aliases, WINDOWS, strict=True):
            self.world.root.add(alias, address)
        self.screen: npt.NDArray[np.uint8] | None = None
        self.destination: npt.NDArray[np.uint8] | None = None
        self.pending = PageBitmap(PAGES)
        self.chunks = ClearChunks(PAGES, 1)
        for client in Client:  # what is born dirty hides what is lost
            self.ram.test_and_clear_dirty(0, self.ram.size, client)

    @property
    def contents(self) -> npt.NDArray[np.uint8]:
        """The first byte of each page, which is all that anybody writes."""
        assert self.ram.block is not None
        return self.ram.block.array[::PAGE_SIZE].copy()

    @rule(wanted=page_lists)
    def guest_writes(self, wanted: list[int]) -> None:
        for page in wanted:
            self.world.write(self._addresses(page)[:1])

    @rule(wanted=page_lists)
    def guest_writes_through_every_window(self, wanted: list[int]) -> None:
        for page in wanted:
            self.world.write(self._addresses(page))

    @rule(page=st.sampled_from(WRITTEN))
    def host_writes(self, page: int) -> None:  # D12
        for address in self._addresses(page):
            self.world.system.write(address, bytes(((int(self.contents[page]) + 1) % 256,)))

    def _addresses(self, page: int) -> list[int]:
        """Where a page can be written."""
        return [
            address + (page - first) * PAGE_SIZE
            for alias, (first, count, address) in zip(self.aliases, WINDOWS, strict=True)
            if alias.container is not None and first <= page < first + count
        ]

    @rule(window=windows, for_good=st.booleans())
    def window_goes_or_comes(self, window: int, for_good: bool) -> None:  # D6
        alias = self.aliases[window]
        if alias.container is not None:
            self.world.root.remove(alias)
            if for_good:
                return
        self.world.root.add(alias, WINDOWS[window][2])

    @rule()
    def listener_is_replaced(self) -> None:  # D6
        self.world.memory.unregister(self.world.listener)
        self.world.memory.register(self.world.listener, self.world.system)

    @rule()
    def sync(self) -> None:
        self.world.memory.sync_dirty_log()

    @rule()
    def display_starts_or_stops(self) -> None:
        if self.screen is None:
            self.ram.start_logging_display()
            self.screen = self.contents
        else:
            self.ram.stop_logging_display()
            self.screen = None

    @precondition(lambda self: self.screen is not None)
    @rule(wanted=ranges, sync=st.booleans())
    def display_refreshes(self, wanted: tuple[int, int], sync: bool) -> None:
        assert self.screen is not None
        first, end = wanted
        offset, size = first * PAGE_SIZE, (end - first) * PAGE_SIZE
        if sync:
            snapshot = self.ram.snapshot_and_clear_dirty(offset, size, Client.DISPLAY)
            stale = [page for page in range(first, end) if snapshot.is_dirty(page * PAGE_SIZE, 1)]
        else:
            stale = list(range(first, end))
            if not self.ram.test_and_clear_dirty(offset, size, Client.DISPLAY):
                stale = []
        self.screen[stale] = self.contents[stale]

    @rule(first_pass=st.booleans())
    def migration_starts_or_stops(self, first_pass: bool) -> None:
        if self.destination is None:
            self.world.memory.start_logging(TrackingReason.MIGRATION)
            self.destination = np.zeros(PAGES, np.uint8)
            self.pending.set()
            self.chunks = ClearChunks(PAGES, 1)
            if first_pass:
                self._send(0, PAGES, [], [], fails=False)
        else:
            self.world.memory.stop_logging(TrackingReason.MIGRATION)
            self.destination = None

    @precondition(lambda self: self.destination is not None)
    @rule(chunked=st.booleans(), sync=st.booleans())
    def migration_harvests(self, chunked: bool, sync: bool) -> None:
        if sync:
            self.world.memory.sync_dirty_log()
        self.ram.harvest_dirty(self.pending, self.chunks if chunked else None)

    @precondition(lambda self: self.destination is not None)
    @rule(wanted=ranges, before=page_lists, after=page_lists, fails=st.booleans())
    def migration_sends(self, wanted: tuple[int, int], before: list[int], after: list[int], fails: bool) -> None:
        # D3 D7: clear, then read, then send, while the guest goes on writing.
        self._send(wanted[0], wanted[1] - wanted[0], before, after, fails=fails)

    @precondition(lambda self: self.destination is not None)
    @rule()
    def migration_catches_up(self) -> None:  # D1
        assert self.destination is not None
        self.world.memory.sync_dirty_log()
        self.ram.harvest_dirty(self.pending, self.chunks)
        self._send(0, PAGES, [], [], fails=False)
        assert self.destination.tolist() == self.contents.tolist()

    @precondition(lambda self: self.screen is not None)
    @rule()
    def display_catches_up(self) -> None:  # D1
        assert self.screen is not None
        self.display_refreshes((0, PAGES), True)
        assert self.screen.tolist() == self.contents.tolist()

    def _send(self, first: int, count: int, before: list[int], after: list[int], *, fails: bool) -> None:
        assert self.destination is not None
        for due, length in self.chunks.take(first, count):
            self.ram.clear_dirty_bitmap(due * PAGE_SIZE, length * PAGE_SIZE)
        sent = self.pending.indices(first, count)
        taken = self.pending.fetch_and_clear(first, count)
        self.guest_writes(before)
        read = self.contents[sent]
        self.guest_writes(after)
        if fails:
            self.pending.merge(taken, first, count)
        else:
            self.destination[sent] = read

    @invariant()
    def every_stale_page_is_known(self) -> None:  # D1
        if not isinstance(self.world, ModelWorld):
            return
        for page in WRITTEN:
            value = self.contents[page]
            noticed = self.world.notices(page)
            if self.screen is not None and self.screen[page] != value:
                assert noticed or self.ram.is_dirty(page * PAGE_SIZE, 1, Client.DISPLAY)
            if self.destination is not None and self.destination[page] != value:
                dirty = self.ram.is_dirty(page * PAGE_SIZE, 1, Client.MIGRATION)
                assert noticed or dirty or self.pending.test(page)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if self.destination is not None:
                self.migration_catches_up()
            if self.screen is not None:
                self.display_catches_up()
        finally:
            self.world.close()


class OnTheModel(DirtyLogUsers):
    mode: KVMLogMode

    def make_world(self) -> World:
        return ModelWorld(self.mode, PAGES)


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_whoever_clears_when(mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    machine = type("Users", (OnTheModel,), {"mode": mode})
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=30, stateful_step_count=50, derandomize=True)
    )


Step = Callable[[DirtyLogUsers, Random], None]


def some_pages(random: Random) -> list[int]:
    return random.choices(WRITTEN, k=random.randint(1, 4))


def some_range(random: Random) -> tuple[int, int]:
    first, end = sorted(random.sample(EDGES, 2))
    return first, end


def coin(random: Random) -> bool:
    return random.random() < 0.5


ALWAYS: list[tuple[float, Step]] = [
    (4, lambda users, random: users.guest_writes(some_pages(random))),
    (2, lambda users, random: users.guest_writes_through_every_window(some_pages(random))),
    (1, lambda users, random: users.host_writes(random.choice(WRITTEN))),
    (0.3, lambda users, random: users.window_goes_or_comes(random.randrange(len(WINDOWS)), coin(random))),
    (0.1, lambda users, random: users.listener_is_replaced()),
    (1, lambda users, random: users.sync()),
    (0.5, lambda users, random: users.display_starts_or_stops()),
    (0.5, lambda users, random: users.migration_starts_or_stops(coin(random))),
]
WITH_A_DISPLAY: list[tuple[float, Step]] = [
    (2, lambda users, random: users.display_refreshes(some_range(random), coin(random))),
    (0.2, lambda users, random: users.display_catches_up()),
]
WITH_A_MIGRATION: list[tuple[float, Step]] = [
    (2, lambda users, random: users.migration_harvests(coin(random), coin(random))),
    (2, lambda users, random: users.migration_sends(
        some_range(random), some_pages(random), some_pages(random), coin(random))),
    (0.2, lambda users, random: users.migration_catches_up()),
]  # fmt: skip


def walk(users: DirtyLogUsers, seed: int, steps: int) -> None:
    """Let the users do ``steps`` things at random; many more than Hypothesis would in the same time."""
    random = Random(seed)  # noqa: S311 - not for secrets
    users.set_up()
    try:
        for _ in range(steps):
            possible = ALWAYS.copy()
            possible += WITH_A_DISPLAY if users.screen is not None else []
            possible += WITH_A_MIGRATION if users.destination is not None else []
            weights, actions = zip(*possible, strict=True)
            random.choices(actions, weights)[0](users, random)
            users.every_stale_page_is_known()
    finally:
        users.teardown()


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_on_long_walks(mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    for seed in range(50):
        users = OnTheModel()
        users.mode = mode
        walk(users, seed, 250)


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_on_kvm(kvm: KVM, mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    class OnKVM(DirtyLogUsers):
        def make_world(self) -> World:
            return KVMWorld(kvm, mode, PAGES)

    for seed in range(10):
        walk(OnKVM(), seed, 200)


def test_listener_offers_a_clear_only_where_collecting_does_not_clear() -> None:  # D5
    def attach(section: MemoryRegionSection) -> None:
        return None

    def detach(tracker: object) -> None:
        raise AssertionError

    legacy = tracker_listener(attach, detach, clears_on_collect=True)
    split = tracker_listener(attach, detach, clears_on_collect=False)

    assert (type(legacy), type(split)) == (TrackerListener, SplitTrackerListener)
    assert (offers(legacy, "log_clear"), offers(split, "log_clear")) == (False, True)
    assert offers(legacy, "log_sync")
    assert not offers(split, "log_sync_global")


def test_section_without_a_tracker_is_passed_over() -> None:
    memory = Memory()
    ram, root = memory.ram("ram", PAGE_SIZE), memory.container("root")
    root.add(ram, 0)
    listener = tracker_listener(lambda section: None, lambda tracker: None, clears_on_collect=False)
    memory.register(listener, memory.address_space("space", root))

    memory.start_logging(TrackingReason.MIGRATION)
    memory.sync_dirty_log()
    ram.test_and_clear_dirty(0, PAGE_SIZE, Client.MIGRATION)
    memory.stop_logging(TrackingReason.MIGRATION)
    root.remove(ram)
    memory.unregister(listener)
    memory.close()


@pytest.fixture
def world() -> ModelWorld:
    world = ModelWorld(KVMLogMode.MANUAL, PAGES)
    world.root.add(world.ram, 0)
    return world


def tracker_at(world: ModelWorld, address: int) -> ModelTracker:
    return world.trackers[address][1]


def test_tracker_is_armed_for_the_first_client_and_disarmed_after_the_last(world: ModelWorld) -> None:
    def is_armed() -> bool:
        return tracker_at(world, 0).armed

    assert not is_armed()
    world.ram.start_logging_display()
    assert is_armed()
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.ram.stop_logging_display()
    assert is_armed()
    world.memory.stop_logging(TrackingReason.MIGRATION)
    assert not is_armed()
    world.close()


def test_clears_and_syncs_after_the_last_client_left_reach_no_tracker(world: ModelWorld) -> None:
    world.ram.start_logging_display()
    world.write([0])
    world.memory.sync_dirty_log()
    world.ram.stop_logging_display()

    section = world.system.section(world.system.view.ranges[0])
    world.listener.log_sync(section)
    assert isinstance(world.listener, SplitTrackerListener)
    world.listener.log_clear(section)
    world.close()


def test_pages_collected_before_logging_stopped_are_not_cleared_after_it_started_again(world: ModelWorld) -> None:
    # D2: the model fails the test if they are.
    world.ram.start_logging_display()
    world.write([0, 70 * PAGE_SIZE])
    world.memory.sync_dirty_log()
    world.ram.stop_logging_display()
    world.ram.start_logging_display()

    world.ram.test_and_clear_dirty(0, world.ram.size, Client.DISPLAY)

    world.close()


def test_section_that_moves_gets_another_tracker(world: ModelWorld) -> None:  # D6 T3
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.ram.test_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
    before = tracker_at(world, 0)
    world.write([3 * PAGE_SIZE])
    with world.memory.transaction():
        world.root.remove(world.ram)
        world.root.add(world.ram, 64 * PAGE_SIZE)

    assert list(world.trackers) == [64 * PAGE_SIZE]
    assert tracker_at(world, 64 * PAGE_SIZE) is not before
    assert not before.armed
    world.write([64 * PAGE_SIZE])
    mine = PageBitmap(PAGES)
    world.memory.sync_dirty_log()
    world.ram.harvest_dirty(mine)
    assert mine.indices().tolist() == [0, 3]
    world.close()


def test_tracker_is_never_handed_a_bit_past_its_end(world: ModelWorld) -> None:  # D9
    # The model's collect sets all bits past the end, and its clear fails where one comes back.
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.write([(PAGES - 1) * PAGE_SIZE])
    world.memory.sync_dirty_log()
    for first in range(WORD_BITS * 3 - 2, PAGES):
        world.ram.clear_dirty_bitmap(first * PAGE_SIZE, (PAGES - first) * PAGE_SIZE)
    world.close()

import pytest
from support.model_tracker import ModelTracker, ModelWorld

from dirtylog.errors import KernelError
from dirtylog.memory import (
    Client,
    Memory,
    MemoryRegionSection,
    PageBitmap,
    TrackingReason,
    Words,
)
from dirtylog.memory.listener import offers
from dirtylog.trackers import ClearingTrackerListener, KVMLogMode, SplitTrackerListener, tracker_listener
from dirtylog.units import MIB, PAGE_SIZE, WORD_BITS

PAGES = 200


def test_listener_offers_a_clear_only_where_collecting_does_not_clear() -> None:  # D5
    def attach(section: MemoryRegionSection) -> None:
        return None

    def detach(tracker: object) -> None:
        raise AssertionError

    legacy = tracker_listener(attach, detach, clears_on_collect=True)
    split = tracker_listener(attach, detach, clears_on_collect=False)

    assert (type(legacy), type(split)) == (ClearingTrackerListener, SplitTrackerListener)
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


@pytest.mark.parametrize("mode", KVMLogMode)
@pytest.mark.parametrize("change", ["remove", "move", "swap", "unregister", "remove address space"])
def test_last_write_before_a_logged_range_goes_is_not_lost(mode: KVMLogMode, change: str) -> None:  # D6
    world = ModelWorld(mode, PAGES)
    world.root.add(world.ram, 0)
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.memory.sync_dirty_log()
    world.ram.test_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
    world.before_hold = lambda: world.write([3 * PAGE_SIZE])

    if change == "remove":
        world.root.remove(world.ram)
    elif change == "move":
        world.ram.move(PAGE_SIZE)
    elif change == "swap":
        world.root.add(world.memory.reservation("kept", PAGE_SIZE), 100 * PAGE_SIZE, priority=1)
    elif change == "unregister":
        world.memory.unregister(world.listener)
    else:
        world.memory.remove_address_space(world.system)

    assert world.holds == 1
    assert world.ram.is_dirty(3 * PAGE_SIZE, PAGE_SIZE, Client.MIGRATION)
    world.before_hold = lambda: None
    world.close()


def test_writers_are_not_held_for_what_is_neither_replaced_nor_logged(world: ModelWorld) -> None:
    world.root.add(world.memory.ram("more", PAGE_SIZE), MIB)
    world.ram.start_logging_display()
    world.root.remove(world.root.children[0])
    assert world.holds == 0

    world.ram.set_readonly(True)
    assert world.holds == 1
    world.close()


def test_writers_are_held_for_a_range_that_is_replaced(world: ModelWorld) -> None:
    world.ram.set_readonly(True)
    assert world.holds == 1
    world.ram.move(PAGES * PAGE_SIZE)
    assert world.holds == 1
    world.close()


class Broken(ModelTracker):
    """Fails where it is told to."""

    failing = ""

    def arm(self) -> None:
        super().arm()
        self._fail("arm")

    def collect(self, words: Words) -> None:
        self._fail("collect")
        super().collect(words)

    def _fail(self, call: str) -> None:
        if self.failing == call:
            raise KernelError(call, 12, "no memory")


def test_range_whose_last_collect_fails_goes_and_all_others_are_handled() -> None:  # T11
    trackers: list[Broken] = []

    def attach(section: MemoryRegionSection) -> Broken:
        trackers.append(Broken(KVMLogMode.MANUAL, section.size // PAGE_SIZE))
        return trackers[-1]

    memory = Memory()
    detached: list[object] = []
    root = memory.container("root")
    ram = [memory.ram(name, PAGE_SIZE) for name in "abc"]
    for number, region in enumerate(ram[:2]):
        root.add(region, number * PAGE_SIZE)
    listener = tracker_listener(attach, detached.append, clears_on_collect=False)
    memory.register(listener, memory.address_space("space", root))
    memory.start_logging(TrackingReason.MIGRATION)
    trackers[0].failing = "collect"

    def replace() -> None:
        with memory.transaction():
            root.remove(ram[0])
            root.remove(ram[1])
            root.add(ram[2], 0)

    with pytest.raises(KernelError, match="collect failed"):
        replace()

    assert detached == trackers[:2]
    assert [tracker.armed for tracker in trackers] == [False, False, True]
    memory.unregister(listener)
    assert detached == trackers
    memory.close()


def test_logging_that_cannot_start_leaves_no_tracker_armed(monkeypatch: pytest.MonkeyPatch) -> None:  # T13
    world = ModelWorld(KVMLogMode.MANUAL, PAGES)
    world.root.add(world.ram, 0)
    world.root.add(world.memory.alias("window", world.ram, 0, PAGE_SIZE), PAGES * PAGE_SIZE)
    last = tracker_at(world, PAGES * PAGE_SIZE)

    def fail() -> None:
        raise KernelError("arm", 12, "no memory")

    monkeypatch.setattr(last, "arm", fail)
    with pytest.raises(KernelError, match="arm failed: no memory"):
        world.memory.start_logging(TrackingReason.MIGRATION)

    assert not any(tracker.armed for _, tracker in world.trackers.values())
    assert not world.memory.tracking
    world.close()


def test_section_in_parts_of_pages_is_tracked_where_pages_are_whole(world: ModelWorld) -> None:
    world.root.remove(world.ram)
    world.root.add(world.memory.alias("window", world.ram, 0, 3 * PAGE_SIZE + 100), 0)
    world.root.add(world.memory.alias("crumb", world.ram, 0, 100), 8 * PAGE_SIZE)

    assert {start: tracker.pages for start, (_, tracker) in world.trackers.items()} == {0: 3}
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.ram.test_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
    world.write([2 * PAGE_SIZE])
    world.system.write(3 * PAGE_SIZE + 99, b"x")  # D12
    world.memory.sync_dirty_log()
    mine = PageBitmap(PAGES)
    world.ram.harvest_dirty(mine)
    assert mine.indices().tolist() == [2, 3]
    world.close()

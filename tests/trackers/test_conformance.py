"""What every tracker must do behind its listener; `dirtylog.testing` has what it must do by itself."""

from collections.abc import Callable, Iterator

import pytest
from support.oracles import to_bits
from support.worlds import SETTINGS, Setting, World

from dirtylog.memory import ClearChunks, Client, PageBitmap, TrackingReason
from dirtylog.testing import Differences
from dirtylog.units import MIB, PAGE_SIZE, WORD_BITS

SPLIT = [setting for setting in SETTINGS if not setting.differences.clears_on_collect]
SIZES = [1, 63, 64, 65, 100, 1000]

MakeWorld = Callable[[int], World]


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting.name)
def setting(request: pytest.FixtureRequest) -> Setting:
    made: Setting = request.param
    return made


@pytest.fixture
def differences(setting: Setting) -> Differences:
    return setting.differences


@pytest.fixture
def make_world(setting: Setting) -> Iterator[MakeWorld]:
    """Makes worlds whose RAM is mapped at 1 MiB and logged for migration, and of which nothing is written yet."""
    worlds: list[World] = []

    def make(pages: int) -> World:
        world = setting.make(pages)
        worlds.append(world)
        world.root.add(world.ram, MIB)
        world.memory.start_logging(TrackingReason.MIGRATION)
        collect(world)
        clear(world, 0, pages)
        return world

    yield make
    for world in worlds:
        world.close()


def write(world: World, *pages: int) -> None:
    world.write([MIB + page * PAGE_SIZE for page in pages])


def collect(world: World) -> set[int]:
    """Sync, and take what migration has; the tracker's log is not cleared, as `harvest_dirty` would."""
    world.memory.sync_dirty_log(world.ram)
    assert world.ram.block is not None
    pages = world.ram.block.pages
    return to_bits(world.ram.block.dirty.fetch_and_clear(0, pages, Client.MIGRATION))


def clear(world: World, first: int, count: int) -> None:
    world.ram.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)


@pytest.mark.parametrize("pages", SIZES)
def test_sync_reports_the_written_pages_and_no_others(make_world: MakeWorld, pages: int) -> None:
    # D1 D9
    world = make_world(pages)
    assert collect(world) == set()

    written = {0, pages // 2, pages - 1}
    write(world, *written, *written)

    assert collect(world) == written


def test_page_is_reported_until_it_is_cleared(make_world: MakeWorld, differences: Differences) -> None:  # D5
    world = make_world(100)
    write(world, 7)
    assert collect(world) == {7}

    assert collect(world) == (set() if differences.clears_on_collect else {7})


@pytest.mark.parametrize("pages", SIZES)
def test_write_after_the_clear_is_reported_anew(make_world: MakeWorld, pages: int) -> None:  # D1
    world = make_world(pages)
    write(world, pages - 1)
    collect(world)
    clear(world, 0, pages)
    assert collect(world) == set()

    write(world, pages - 1)

    assert collect(world) == {pages - 1}


def test_write_that_was_not_collected_survives_a_clear(make_world: MakeWorld) -> None:  # D2
    world = make_world(100)
    write(world, 5)
    collect(world)
    write(world, 6, 99)

    clear(world, 0, 100)

    assert collect(world) == {6, 99}


def test_second_clear_passes_on_nothing(make_world: MakeWorld) -> None:  # D2
    world = make_world(100)
    write(world, 5, 70)
    collect(world)
    clear(world, 0, 100)
    write(world, 5, 70)

    clear(world, 0, 100)
    clear(world, 64, 36)

    assert collect(world) == {5, 70}


@pytest.mark.parametrize("setting", SPLIT, ids=lambda setting: setting.name)
@pytest.mark.parametrize(
    ("pages", "first", "count"),
    [(1000, 70, 10), (1000, 960, 40), (1000, 0, 65), (1000, 900, 100), (100, 0, 100), (100, 70, 30), (200, 63, 66)],
)
def test_clear_of_a_range_leaves_the_neighbours_in_its_words(
    make_world: MakeWorld, pages: int, first: int, count: int
) -> None:  # D9 W2
    world = make_world(pages)
    write(world, *range(pages))
    assert collect(world) == set(range(pages))

    clear(world, first, count)

    assert collect(world) == set(range(pages)) - set(range(first, first + count))


def test_what_was_written_before_an_unmap_is_reported_after_it(make_world: MakeWorld) -> None:  # D6
    world = make_world(100)
    write(world, 5, 99)

    world.root.remove(world.ram)

    assert collect(world) == {5, 99}


def test_what_was_written_before_the_listener_goes_is_in_the_bitmap(make_world: MakeWorld) -> None:
    # D6
    world = make_world(100)
    write(world, 5, 99)

    world.memory.unregister(world.listener)

    assert collect(world) == {5, 99}
    world.memory.register(world.listener, world.system)
    write(world, 6)
    assert 6 in collect(world)


def test_section_mapped_while_logged_is_tracked_at_once(make_world: MakeWorld) -> None:  # T4
    world = make_world(100)
    world.root.remove(world.ram)
    world.root.add(world.ram, MIB)

    write(world, 42)

    assert 42 in collect(world)


def test_logging_that_stopped_and_started_reports_what_is_written_from_then_on(
    make_world: MakeWorld, differences: Differences
) -> None:  # W3
    world = make_world(100)
    world.memory.stop_logging(TrackingReason.MIGRATION)
    write(world, 1)
    assert collect(world) == set()

    world.memory.start_logging(TrackingReason.MIGRATION)
    write(world, 2)

    assert collect(world) == (set(range(100)) if differences.starts_all_set else {2})


def test_client_that_starts_later_hears_of_pages_collected_for_another_and_not_cleared(
    make_world: MakeWorld,
) -> None:  # D1 D4
    world = make_world(100)
    assert world.ram.block is not None
    world.ram.block.dirty.fetch_and_clear(0, 100, Client.DISPLAY)
    write(world, 5)
    collect(world)
    world.ram.start_logging_display()
    write(world, 5)

    clear(world, 0, 100)  # by migration: the kernel forgets page 5, the display must not
    world.memory.sync_dirty_log()

    assert world.ram.is_dirty(5 * PAGE_SIZE, PAGE_SIZE, Client.DISPLAY)


def test_clear_for_one_client_keeps_the_others_pages(make_world: MakeWorld) -> None:  # D4
    world = make_world(100)
    world.ram.start_logging_display()
    world.ram.test_and_clear_dirty(0, 100 * PAGE_SIZE, Client.DISPLAY)
    write(world, 5)
    assert world.ram.snapshot_and_clear_dirty(0, 100 * PAGE_SIZE, Client.DISPLAY).is_dirty(5 * PAGE_SIZE, 1)

    mine = PageBitmap(100)
    world.ram.harvest_dirty(mine)

    assert mine.test(5)


def test_write_between_a_harvest_and_its_late_clear_is_in_the_page_as_read(make_world: MakeWorld) -> None:  # D3
    world = make_world(200)
    mine, chunks = PageBitmap(200), ClearChunks(200, WORD_BITS * PAGE_SIZE)
    write(world, 130)
    world.memory.sync_dirty_log()
    world.ram.harvest_dirty(mine, chunks)
    write(world, 130, 131)

    for first, count in chunks.take(130, 1):
        assert (first, count) == (128, 64)
        clear(world, first, count)

    assert world.ram.block is not None
    assert world.ram.block.array[130 * PAGE_SIZE] == 2
    write(world, 130)
    # Without a split the second write is reported as well, for nothing.
    assert collect(world) == {130, 131}


def test_ram_seen_twice_is_tracked_wherever_it_is_written(
    make_world: MakeWorld, differences: Differences
) -> None:  # T7
    world = make_world(200)
    world.root.add(world.memory.alias("window", world.ram, 70 * PAGE_SIZE, 100 * PAGE_SIZE), 8 * MIB)
    collect(world)
    clear(world, 0, 200)

    world.write([8 * MIB, MIB + 71 * PAGE_SIZE])
    assert collect(world) == {70, 71}
    clear(world, 70, 1)
    world.write([MIB + 70 * PAGE_SIZE])
    clear(world, 70, 1)

    assert collect(world) == ({70} if differences.clears_on_collect else {70, 71})

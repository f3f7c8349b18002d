from collections.abc import Callable, Iterator

import pytest
from support.listeners import Recorder, Seen, Told
from support.model_tracker import ModelWorld
from support.oracles import to_bits, to_words

from dirtylog.errors import UsageError
from dirtylog.memory import ClearChunks, Client, Memory, MemoryRegion, MemoryRegionOps, PageBitmap, TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import PAGE_SIZE

PAGES = 200
AT = 1 << 20


class Board:
    """200 pages of RAM at 1 MiB, logged for migration and display, clean; and what a listener is told from then on."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", PAGES * PAGE_SIZE)
        self.root: MemoryRegion = self.memory.container("root")
        self.root.add(self.ram, AT)
        self.space = self.memory.address_space("space", self.root)
        self.told: list[Told] = []
        self.memory.register(Recorder(self.told), self.space)
        self.memory.start_logging(TrackingReason.MIGRATION)
        self.ram.start_logging_display()
        for client in Client:
            self.ram.test_and_clear_dirty(0, self.ram.size, client)
        self.told.clear()

    def dirty(self, client: Client) -> set[int]:
        return {page for page in range(PAGES) if self.ram.is_dirty(page * PAGE_SIZE, PAGE_SIZE, client)}

    def cleared(self) -> list[Seen | None]:
        return [told.section for told in self.told if told.callback == "log_clear"]


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def piece(first: int, count: int, at: int = AT) -> Seen:
    return Seen("ram", first * PAGE_SIZE, at + first * PAGE_SIZE, count * PAGE_SIZE)


CLEAR_POINTS: list[tuple[str, Callable[[MemoryRegion, int, int], object]]] = [
    ("test_and_clear", lambda ram, offset, size: ram.test_and_clear_dirty(offset, size, Client.DISPLAY)),
    ("snapshot_and_clear", lambda ram, offset, size: ram.snapshot_and_clear_dirty(offset, size, Client.DISPLAY)),
]
clear_points = pytest.mark.parametrize("clear", [point for _, point in CLEAR_POINTS], ids=[n for n, _ in CLEAR_POINTS])
BYTES = [
    (0, PAGES * PAGE_SIZE, 0, PAGES),
    (70 * PAGE_SIZE, 10 * PAGE_SIZE, 70, 10),
    (70 * PAGE_SIZE + 1, 10 * PAGE_SIZE, 70, 11),
    (70 * PAGE_SIZE + 4095, 2, 70, 2),
    (199 * PAGE_SIZE, 1, 199, 1),
]


@clear_points
@pytest.mark.parametrize("dirty", [True, False], ids=["dirty", "clean"])
@pytest.mark.parametrize(("offset", "size", "first", "count"), BYTES)
def test_clear_of_a_range_reaches_log_clear_with_the_pages_it_touches(
    board: Board, clear: Callable[[MemoryRegion, int, int], object], offset: int, size: int, first: int, count: int,
    dirty: bool,
) -> None:  # D8 D10  # fmt: skip
    if dirty:
        board.ram.set_dirty(0, board.ram.size)
        board.told.clear()

    clear(board.ram, offset, size)

    assert board.cleared() == [piece(first, count)]
    left = set(range(PAGES)) - set(range(first, first + count)) if dirty else set()
    assert board.dirty(Client.DISPLAY) == left
    assert board.dirty(Client.MIGRATION) == (set(range(PAGES)) if dirty else set())  # D4


@clear_points
@pytest.mark.parametrize("offset", [0, 5, 4096, PAGES * PAGE_SIZE])
def test_clear_of_no_bytes_clears_nothing(
    board: Board, clear: Callable[[MemoryRegion, int, int], object], offset: int
) -> None:
    board.ram.set_dirty(0, board.ram.size)

    clear(board.ram, offset, 0)

    assert board.cleared() == []
    assert len(board.dirty(Client.DISPLAY)) == PAGES


def test_test_and_clear_tells_whether_a_page_was_dirty_and_does_not_sync(board: Board) -> None:
    board.ram.set_dirty(7 * PAGE_SIZE + 9, 1)

    assert not board.ram.test_and_clear_dirty(8 * PAGE_SIZE, PAGE_SIZE, Client.DISPLAY)
    assert board.ram.test_and_clear_dirty(6 * PAGE_SIZE, 2 * PAGE_SIZE, Client.DISPLAY)
    assert not board.ram.test_and_clear_dirty(6 * PAGE_SIZE, 2 * PAGE_SIZE, Client.DISPLAY)
    assert {told.callback for told in board.told} == {"log_clear"}


def test_snapshot_syncs_first_and_lets_pages_be_read_last(board: Board) -> None:  # D3
    board.ram.set_dirty(7 * PAGE_SIZE, 1)

    snapshot = board.ram.snapshot_and_clear_dirty(5 * PAGE_SIZE + 1, 3 * PAGE_SIZE, Client.DISPLAY)

    assert [told.callback for told in board.told] == ["log_sync", "log_clear", "log_global_after_sync"]
    assert [snapshot.is_dirty(page * PAGE_SIZE, PAGE_SIZE) for page in range(5, 9)] == [False, False, True, False]
    with pytest.raises(UsageError, match="not in the snapshot"):
        snapshot.is_dirty(9 * PAGE_SIZE, 1)


def test_harvest_moves_migrations_pages_and_clears_the_whole_block(board: Board) -> None:  # D8
    board.ram.set_dirty(70 * PAGE_SIZE, 3 * PAGE_SIZE)
    mine = PageBitmap(PAGES, to_words([71, 150], PAGES))

    assert board.ram.harvest_dirty(mine) == 2

    assert to_bits(mine.words) == {70, 71, 72, 150}
    assert board.dirty(Client.MIGRATION) == set()
    assert board.dirty(Client.DISPLAY) == {70, 71, 72}  # D4
    assert board.cleared() == [piece(0, PAGES)]


def test_harvest_for_another_client_costs_migration_nothing(board: Board) -> None:  # D4, D8
    board.ram.memory.start_logging(TrackingReason.DIRTY_RATE)
    board.ram.set_dirty(70 * PAGE_SIZE, 3 * PAGE_SIZE)
    board.ram.harvest_dirty(PageBitmap(PAGES), client=Client.MIGRATION)
    board.ram.set_dirty(71 * PAGE_SIZE, 3 * PAGE_SIZE)
    seen = PageBitmap(PAGES)

    board.ram.harvest_dirty(seen, client=Client.WATCH)

    assert to_bits(seen.words) == {70, 71, 72, 73}
    assert board.dirty(Client.WATCH) == set()
    assert board.dirty(Client.MIGRATION) == {71, 72, 73}


def test_harvest_of_nothing_still_clears(board: Board) -> None:  # D8
    assert board.ram.harvest_dirty(PageBitmap(PAGES)) == 0
    assert board.cleared() == [piece(0, PAGES)]


@pytest.mark.parametrize("dirty", [True, False], ids=["dirty", "clean"])
def test_harvest_with_chunks_postpones_the_clear_of_all_of_them(board: Board, dirty: bool) -> None:  # D8
    chunks = ClearChunks(PAGES, 1)
    if dirty:
        board.ram.set_dirty(0, PAGE_SIZE)

    board.ram.harvest_dirty(PageBitmap(PAGES), chunks)

    assert board.cleared() == []
    assert chunks.take(0, PAGES) == [(0, PAGES)]


def test_harvest_refuses_a_bitmap_of_another_length(board: Board) -> None:
    with pytest.raises(UsageError):
        board.ram.harvest_dirty(PageBitmap(PAGES - 64))


def test_harvest_takes_pages_from_no_other_client(board: Board) -> None:  # D7
    board.ram.set_dirty(70 * PAGE_SIZE, 60 * PAGE_SIZE)
    before = board.ram.is_dirty(0, board.ram.size, Client.DISPLAY)

    board.ram.harvest_dirty(PageBitmap(PAGES))

    assert board.ram.is_dirty(0, board.ram.size, Client.DISPLAY) == before
    assert not board.ram.is_dirty(0, board.ram.size, Client.MIGRATION)


@pytest.mark.parametrize(
    ("offset", "size", "told"),
    [
        (0, PAGES * PAGE_SIZE, [(0, 50, 0), (100, 100, 64 << 20), (20, 130, 128 << 20)]),
        (40 * PAGE_SIZE, 70 * PAGE_SIZE, [(40, 10, 0), (100, 10, 64 << 20), (40, 70, 128 << 20)]),
        (60 * PAGE_SIZE, PAGE_SIZE, [(60, 1, 128 << 20)]),
        (199 * PAGE_SIZE, PAGE_SIZE, [(199, 1, 64 << 20)]),
    ],
)
def test_each_visible_piece_gets_its_own_clear_and_hidden_parts_none(
    board: Board, offset: int, size: int, told: list[tuple[int, int, int]]
) -> None:  # T7
    board.root.remove(board.ram)
    for first, count, at in [(0, 50, 0), (100, 100, 64 << 20), (20, 130, 128 << 20)]:
        board.root.add(board.memory.alias("piece", board.ram, first * PAGE_SIZE, count * PAGE_SIZE), at)
    starts = {0: 0, 64 << 20: 100, 128 << 20: 20}
    board.told.clear()

    board.ram.clear_dirty_bitmap(offset, size)

    assert board.cleared() == [piece(first, count, at - starts[at] * PAGE_SIZE) for first, count, at in told]


def test_unmapped_region_reaches_no_log_clear(board: Board) -> None:  # T7
    board.root.remove(board.ram)
    board.told.clear()

    board.ram.test_and_clear_dirty(0, board.ram.size, Client.MIGRATION)

    assert board.told == []


def test_region_that_nobody_logs_reaches_no_log_clear(board: Board) -> None:
    board.memory.stop_logging(TrackingReason.MIGRATION)
    board.ram.stop_logging_display()
    board.told.clear()

    board.ram.clear_dirty_bitmap(0, board.ram.size)

    assert board.told == []


def test_merged_words_reach_all_who_log(board: Board) -> None:  # D4
    board.ram.merge_dirty(to_words([0, 9], 10), 120, 10)

    assert board.dirty(Client.DISPLAY) == board.dirty(Client.MIGRATION) == {120, 129}
    assert board.dirty(Client.CODE) == set()


def test_host_write_marks_every_page_it_touches(board: Board) -> None:  # D10
    board.ram.set_dirty(3 * PAGE_SIZE - 1, 2)

    assert board.dirty(Client.DISPLAY) == board.dirty(Client.MIGRATION) == {2, 3}


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, PAGES * PAGE_SIZE + 1), (PAGES * PAGE_SIZE, 1), (0, -1)])
def test_bytes_outside_the_region_are_refused(board: Board, offset: int, size: int) -> None:
    for call in (
        lambda: board.ram.set_dirty(offset, size),
        lambda: board.ram.is_dirty(offset, size, Client.DISPLAY),
        lambda: board.ram.test_and_clear_dirty(offset, size, Client.DISPLAY),
        lambda: board.ram.snapshot_and_clear_dirty(offset, size, Client.DISPLAY),
    ):
        with pytest.raises(UsageError, match="is not in <MemoryRegion 'ram'"):
            call()


def test_container_has_no_dirty_pages_to_ask_for(board: Board) -> None:
    with pytest.raises(UsageError, match="is not RAM"):
        board.root.is_dirty(0, 1, Client.DISPLAY)
    with pytest.raises(UsageError, match="is not RAM"):
        board.root.harvest_dirty(PageBitmap(1))


def test_logging_of_a_region_is_what_the_display_and_migration_want(board: Board) -> None:
    assert board.ram.logging == Client.DISPLAY | Client.MIGRATION
    assert board.root.logging == Client(0)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    assert board.ram.logging == Client.DISPLAY


def test_display_logging_is_counted(board: Board) -> None:
    board.ram.start_logging_display()
    board.ram.stop_logging_display()
    assert board.ram.logging & Client.DISPLAY
    assert board.told == []

    board.ram.stop_logging_display()
    assert not board.ram.logging & Client.DISPLAY
    with pytest.raises(UsageError, match="does not log"):
        board.ram.stop_logging_display()


def test_children_are_listed_in_the_order_in_which_they_hide(board: Board) -> None:  # T9
    regions = [board.memory.container(name, PAGE_SIZE) for name in "abcd"]
    parent = board.memory.container("parent")
    for region, priority in zip(regions, [0, 1, 0, -1], strict=True):
        parent.add(region, 0, priority=priority)

    assert "".join(child.name for child in parent.children) == "bcad"


def test_removed_region_can_be_mapped_elsewhere(board: Board) -> None:
    other = board.memory.container("other")
    board.root.remove(board.ram)
    containers = [board.ram.container]
    other.add(board.ram, 5)
    containers.append(board.ram.container)

    assert containers == [None, other]
    with pytest.raises(UsageError, match="is not mapped in"):
        board.root.remove(board.ram)


def test_regions_that_cannot_be_mapped_there_are_refused(board: Board) -> None:  # V7 V8
    memory, inner = board.memory, board.memory.container("inner")
    foreign = Memory()
    refused = [
        (board.root, foreign.container("foreign"), 0, "another memory"),
        (inner, board.ram, 0, "mapped in .* already"),
        (memory.alias("alias", board.ram, 0, 1), inner, 0, "is an alias"),
        (inner, inner, 0, "would contain itself"),
        (board.root, memory.alias("mirror", board.root, 0, 1), 0, "would contain itself"),
        (board.root, inner, -1, "cannot be mapped"),
        (board.root, inner, 1 << 64, "cannot be mapped"),
    ]
    for parent, child, address, message in refused:
        with pytest.raises(UsageError, match=message):
            parent.add(child, address)
    assert board.told == []
    assert inner.container is None
    assert board.root.children == (board.ram,)


@pytest.mark.parametrize("priority", [-(1 << 31) - 1, 1 << 31])
def test_priority_of_more_than_32_bits_is_refused(board: Board, priority: int) -> None:
    with pytest.raises(UsageError, match=r"the priority .*; priorities are signed 32-bit numbers"):
        board.root.add(board.memory.container("inner"), 0, priority=priority)
    with pytest.raises(UsageError, match="the priority"):
        board.ram.move(AT, priority=priority)
    assert board.ram.priority == 0


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_move_to_an_impossible_address_is_refused(board: Board, address: int) -> None:
    with pytest.raises(UsageError, match="cannot be mapped at"):
        board.ram.move(address)
    assert board.ram.address == AT
    assert board.told == []


def test_what_a_kind_of_region_cannot_do_is_refused(board: Board) -> None:
    memory = board.memory
    spare = memory.container("spare")
    alias = memory.alias("alias", board.ram, 0, PAGE_SIZE)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: board.ram.set_size(PAGE_SIZE), "has the size of its block; show a part of it through an alias"),
        (lambda: board.ram.set_target_offset(0), "is not an alias"),
        (lambda: board.ram.set_trapped(True), "is not a ROM device"),
        (lambda: memory.mmio("mmio", 8, MemoryRegionOps()).set_trapped(True), "is not a ROM device"),
        (lambda: spare.move(0), "is not mapped anywhere; add it to a container"),
        (lambda: spare.start_logging_display(), "is not RAM"),
        (lambda: alias.start_logging_display(), "is not RAM"),
        (lambda: alias.set_dirty(0, 1), "is not RAM"),
    ]
    for change, message in refused:
        with pytest.raises(UsageError, match=message):
            change()
    assert board.told == []


def test_region_that_stays_as_it_is_tells_nothing(board: Board) -> None:  # T1
    spare = board.memory.container("spare", PAGE_SIZE)
    alias = board.memory.alias("alias", board.ram, 0, PAGE_SIZE)
    board.ram.move(AT)
    board.ram.set_enabled(True)
    board.ram.set_readonly(False)
    spare.set_size(PAGE_SIZE)
    alias.set_target_offset(0)
    board.memory.set_code_client(False)
    assert board.told == []


def test_moved_region_comes_before_its_equals(board: Board) -> None:  # T9
    later = board.memory.reservation("later", PAGE_SIZE)
    board.root.add(later, AT)
    assert board.space.view.ranges[0].region is later

    board.ram.move(AT + PAGE_SIZE)
    board.ram.move(AT)

    assert [flat.region for flat in board.space.view.ranges] == [board.ram]


@pytest.mark.parametrize("how", ["remove", "move", "hide", "protect", "cover", "shrink"])
def test_dirt_of_a_logged_region_that_changes_is_collected_first(how: str) -> None:  # D6
    world = ModelWorld(KVMLogMode.MANUAL, 100)
    window = world.memory.alias("window", world.ram, 0, world.ram.size)
    world.root.add(window, AT)
    world.memory.start_logging(TrackingReason.MIGRATION)
    world.ram.test_and_clear_dirty(0, world.ram.size, Client.MIGRATION)
    world.write([AT + 5 * PAGE_SIZE, AT + 99 * PAGE_SIZE])

    {
        "remove": lambda: world.root.remove(window),
        "move": lambda: window.move(2 * AT),
        "hide": lambda: window.set_enabled(False),
        "protect": lambda: window.set_readonly(True),
        "cover": lambda: world.root.add(world.memory.reservation("cover", PAGE_SIZE), AT + 5 * PAGE_SIZE, priority=1),
        "shrink": lambda: window.set_size(50 * PAGE_SIZE),
    }[how]()

    dirty = [page for page in range(100) if world.ram.is_dirty(page * PAGE_SIZE, 1, Client.MIGRATION)]
    assert dirty == [5, 99]
    world.close()


def test_kinds_say_what_they_are(board: Board) -> None:
    memory, ops = board.memory, MemoryRegionOps()
    regions = [
        board.ram, memory.rom("rom", b"x"), memory.rom_device("flash", b"x", ops), memory.mmio("mmio", 8, ops),
        memory.reservation("kept", 8), memory.container("box"), memory.alias("window", board.ram, 0, 8),
    ]  # fmt: skip
    assert [region.kind for region in regions] == [
        "ram", "rom", "rom-device", "mmio", "reservation", "container", "alias"
    ]  # fmt: skip
    assert [region.terminates for region in regions] == [True] * 5 + [False] * 2
    assert regions[1].block is not None
    assert regions[1].block.array[:2].tolist() == [ord("x"), 0]
    assert regions[1].size == PAGE_SIZE


def test_loop_through_aliases_is_refused(board: Board) -> None:  # V7
    outer, inner = board.memory.container("outer"), board.memory.container("inner")
    outer.add(board.memory.alias("down", inner, 0, 1 << 30), 0)

    with pytest.raises(UsageError, match="would contain itself"):
        inner.add(board.memory.alias("up", outer, 0, 1 << 30), 0)
    with pytest.raises(UsageError, match="would contain itself"):
        inner.add(outer, 0)

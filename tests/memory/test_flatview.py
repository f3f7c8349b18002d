import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.listeners import NONE
from support.oracles import Answer, Node, as_asked, ask_everywhere
from support.trees import UNIT, make, narrow_places, places, priorities

from dirtylog.errors import UsageError
from dirtylog.memory import Client, FlatRange, FlatView, Memory, MemoryRegion, MemoryRegionOps
from dirtylog.memory.flatview import diff, render
from dirtylog.units import PAGE_SIZE

PIECES = list[tuple[int, int, str, int]]
ROOT_UNITS = 32


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def pieces(root: MemoryRegion) -> PIECES:
    """What a tree shows: start, size, region, offset, in pages."""
    page = PAGE_SIZE
    return [
        (flat.start // page, flat.size // page, flat.region.name, flat.offset // page) for flat in render(root).ranges
    ]


def ram(memory: Memory, name: str, pages: int) -> MemoryRegion:
    return memory.ram(name, pages * PAGE_SIZE)


def add(parent: MemoryRegion, child: MemoryRegion, page: int, priority: int = 0) -> None:
    parent.add(child, page * PAGE_SIZE, priority=priority)


def flat(
    region: MemoryRegion, offset: int, start: int, size: int, *,
    readonly: bool = False, direct: bool = True, logging: Client = NONE,
) -> FlatRange:  # fmt: skip
    return FlatRange(region, offset, start, size, readonly, direct, logging)


def test_root_that_is_ram_shows_itself(memory: Memory) -> None:
    assert pieces(ram(memory, "ram", 4)) == [(0, 4, "ram", 0)]


def test_empty_container_shows_nothing(memory: Memory) -> None:
    assert pieces(memory.container("root")) == []


@pytest.mark.parametrize(
    ("start", "shown"),
    [
        (3, [(2, 1, "low", 0), (3, 2, "high", 0), (5, 3, "low", 3)]),
        (1, [(1, 2, "high", 0), (3, 5, "low", 1)]),
        (7, [(2, 5, "low", 0), (7, 2, "high", 0)]),
        (2, [(2, 2, "high", 0), (4, 4, "low", 2)]),
        (6, [(2, 4, "low", 0), (6, 2, "high", 0)]),
    ],
    ids=["inside", "lower edge", "upper edge", "same start", "same end"],
)
def test_higher_priority_hides_the_lower_where_they_overlap(memory: Memory, start: int, shown: PIECES) -> None:  # T9
    root = memory.container("root")
    add(root, ram(memory, "high", 2), start, priority=1)
    add(root, ram(memory, "low", 6), 2)

    assert pieces(root) == shown


def test_among_equal_priorities_the_last_added_wins(memory: Memory) -> None:  # T9
    root = memory.container("root")
    first, second = ram(memory, "first", 4), ram(memory, "second", 4)
    add(root, first, 0, priority=-1)
    add(root, second, 2, priority=-1)
    assert pieces(root) == [(0, 2, "first", 0), (2, 4, "second", 0)]

    root.remove(first)
    add(root, first, 0, priority=-1)
    assert pieces(root) == [(0, 4, "first", 0), (4, 2, "second", 2)]


def test_container_leaves_its_gaps_open(memory: Memory) -> None:  # T9
    # The example of QEMU's docs/devel/memory.rst, without the MMIO: A holds B and C, B holds D and E.
    root, middle = memory.container("A", 8 * PAGE_SIZE), memory.container("B", 4 * PAGE_SIZE)
    add(root, ram(memory, "C", 6), 0, priority=1)
    add(root, middle, 2, priority=2)
    add(middle, ram(memory, "D", 1), 0)
    add(middle, ram(memory, "E", 1), 2)

    assert pieces(root) == [(0, 2, "C", 0), (2, 1, "D", 0), (3, 1, "C", 3), (4, 1, "E", 0), (5, 1, "C", 5)]


def test_ram_that_holds_others_answers_for_the_gaps_itself(memory: Memory) -> None:
    outer = ram(memory, "outer", 4)
    add(outer, ram(memory, "inner", 1), 1)
    root = memory.container("root")
    add(root, ram(memory, "below", 8), 0, priority=-5)
    add(root, outer, 2)

    assert pieces(root) == [
        (0, 2, "below", 0), (2, 1, "outer", 0), (3, 1, "inner", 0), (4, 2, "outer", 2), (6, 2, "below", 6)
    ]  # fmt: skip


def test_children_are_cut_at_their_containers_end(memory: Memory) -> None:
    root, small = memory.container("root"), memory.container("small", 2 * PAGE_SIZE)
    add(small, ram(memory, "ram", 4), 1)
    add(root, small, 5)

    assert pieces(root) == [(6, 1, "ram", 0)]


def test_region_that_reaches_past_the_last_address_is_cut(memory: Memory) -> None:
    root = memory.container("root")
    root.add(ram(memory, "ram", 4), (1 << 64) - PAGE_SIZE)

    assert pieces(root) == [((1 << 52) - 1, 1, "ram", 0)]


def test_alias_shows_a_part_of_its_target_wherever_that_is_mapped(memory: Memory) -> None:
    root, target = memory.container("root"), ram(memory, "ram", 8)
    add(root, target, 100)
    add(root, memory.alias("window", target, 3 * PAGE_SIZE, 2 * PAGE_SIZE), 1)

    assert pieces(root) == [(1, 2, "ram", 3), (100, 8, "ram", 0)]


def test_alias_may_show_more_than_the_target_has(memory: Memory) -> None:
    root = memory.container("root")
    target = ram(memory, "ram", 4)
    add(root, memory.alias("past", target, 3 * PAGE_SIZE, 1 << 64), 0)
    add(root, memory.alias("beyond", target, 4 * PAGE_SIZE, PAGE_SIZE), 10)

    assert pieces(root) == [(0, 1, "ram", 3)]


def test_alias_of_an_alias_of_a_container_shows_what_is_in_it(memory: Memory) -> None:
    root, inner = memory.container("root"), memory.container("inner")
    add(inner, ram(memory, "ram", 4), 2)
    middle = memory.alias("middle", inner, PAGE_SIZE, 1 << 20)
    add(root, memory.alias("outer", middle, 2 * PAGE_SIZE, 2 * PAGE_SIZE), 7)

    assert pieces(root) == [(7, 2, "ram", 1)]


def test_alias_with_a_negative_base_shows_the_right_bytes(memory: Memory) -> None:
    root, target = memory.container("root"), ram(memory, "ram", 16)
    add(root, target, 1 << 20)
    add(root, memory.alias("window", target, 15 * PAGE_SIZE, PAGE_SIZE), 0)

    assert pieces(root)[0] == (0, 1, "ram", 15)


def test_adjacent_windows_on_consecutive_bytes_are_one_range(memory: Memory) -> None:
    root, target = memory.container("root"), ram(memory, "ram", 8)
    add(root, memory.alias("left", target, 0, 3 * PAGE_SIZE), 0)
    add(root, memory.alias("right", target, 3 * PAGE_SIZE, 5 * PAGE_SIZE), 3)
    assert pieces(root) == [(0, 8, "ram", 0)]

    add(root, memory.alias("again", target, 0, PAGE_SIZE), 8)
    assert pieces(root) == [(0, 8, "ram", 0), (8, 1, "ram", 0)]


def test_neighbours_that_differ_stay_apart(memory: Memory) -> None:  # V5
    one, two = ram(memory, "one", 4), ram(memory, "two", 4)
    page = PAGE_SIZE

    def joined(second: FlatRange) -> bool:
        return len(FlatView([flat(one, 0, 0, page), second]).ranges) == 1

    assert joined(flat(one, page, page, page))
    assert not joined(flat(two, page, page, page))
    assert not joined(flat(one, 2 * page, page, page))
    assert not joined(flat(one, page, 2 * page, page))
    assert not joined(flat(one, page, page, page, logging=Client.DISPLAY))
    assert not joined(flat(one, page, page, page, readonly=True))
    assert not joined(flat(one, page, page, page, direct=False))


def test_lookup_finds_the_range_of_an_address_and_nothing_in_gaps(memory: Memory) -> None:
    root = memory.container("root")
    add(root, ram(memory, "low", 1), 1)
    add(root, ram(memory, "high", 1), 3)
    view = render(root)

    found = [view.lookup(page * PAGE_SIZE) for page in range(5)]
    assert [flat and flat.region.name for flat in found] == [None, "low", None, "high", None]
    last = view.lookup(4 * PAGE_SIZE - 1)
    assert last is not None
    assert last.region.name == "high"


def test_diff_sorts_ranges_into_removed_added_and_kept(memory: Memory) -> None:  # T3
    one, two = ram(memory, "one", 8), ram(memory, "two", 8)
    page = PAGE_SIZE
    stays = flat(one, 0, 0, page)
    grows, grown = flat(one, 2 * page, 2 * page, page), flat(one, 2 * page, 2 * page, 2 * page)
    moves, moved = flat(two, 0, 8 * page, page), flat(two, 0, 9 * page, page)
    swapped, other = flat(two, 0, 5 * page, page), flat(two, page, 5 * page, page)

    changes = diff(FlatView([stays, grows, swapped, moves]), FlatView([stays, grown, other, moved]))

    assert changes.removed == (grows, swapped, moves)
    assert changes.shown == ((stays, stays), (None, grown), (None, other), (None, moved))


@pytest.mark.parametrize(("readonly", "direct"), [(True, True), (False, False)])
def test_range_that_changes_how_it_is_accessed_is_removed_and_added(
    memory: Memory, readonly: bool, direct: bool
) -> None:
    # T3 V5
    region = ram(memory, "ram", 1)
    before, after = flat(region, 0, 0, PAGE_SIZE), flat(region, 0, 0, PAGE_SIZE, readonly=readonly, direct=direct)

    changes = diff(FlatView([before]), FlatView([after]))

    assert (changes.removed, changes.shown) == ((before,), ((None, after),))


def test_change_of_logging_alone_keeps_a_range(memory: Memory) -> None:  # T3
    region = ram(memory, "ram", 1)
    quiet, logged = (flat(region, 0, 0, PAGE_SIZE, logging=clients) for clients in (NONE, Client.MIGRATION))

    changes = diff(FlatView([quiet]), FlatView([logged]))

    assert changes.removed == ()
    ((old, new),) = changes.shown
    assert old is not None
    assert (old.logging, new.logging) == (NONE, Client.MIGRATION)


@pytest.mark.parametrize("through", ["itself", "container", "alias", "alias of alias"])
def test_what_is_shown_through_something_readonly_is_readonly(memory: Memory, through: str) -> None:  # V3
    root, box, target = memory.container("root"), memory.container("box"), ram(memory, "ram", 2)
    alias = memory.alias("alias", target, 0, PAGE_SIZE)
    outer = memory.alias("outer", alias, 0, PAGE_SIZE)
    add(root, box, 0)
    add(box, outer, 0)
    {"itself": target, "container": box, "alias": alias, "alias of alias": outer}[through].set_readonly(True)
    add(root, memory.alias("elsewhere", target, PAGE_SIZE, PAGE_SIZE), 8)

    seen = {flat.start // PAGE_SIZE: flat.readonly for flat in render(root).ranges}

    assert seen == {0: True, 8: through == "itself"}


def test_disabled_region_shows_what_is_below_it(memory: Memory) -> None:  # V4
    root, box = memory.container("root"), memory.container("box", 4 * PAGE_SIZE)
    add(root, ram(memory, "low", 4), 0)
    add(root, box, 0, priority=1)
    add(box, ram(memory, "high", 2), 1)
    assert pieces(root) == [(0, 1, "low", 0), (1, 2, "high", 0), (3, 1, "low", 3)]

    box.set_enabled(False)

    assert pieces(root) == [(0, 4, "low", 0)]


def test_disabled_root_and_disabled_target_show_nothing(memory: Memory) -> None:  # V4
    root, target = memory.container("root"), ram(memory, "ram", 4)
    add(root, memory.alias("window", target, 0, PAGE_SIZE), 0)
    target.set_enabled(False)
    assert pieces(root) == []
    target.set_enabled(True)
    root.set_enabled(False)
    assert pieces(root) == []


def test_reservation_and_device_hide_what_is_below_them(memory: Memory) -> None:  # A7 T9
    root = memory.container("root")
    add(root, ram(memory, "low", 4), 0)
    add(root, memory.reservation("kept", PAGE_SIZE), 1, priority=1)
    add(root, memory.mmio("device", PAGE_SIZE, MemoryRegionOps()), 2, priority=1)

    assert pieces(root) == [(0, 1, "low", 0), (1, 1, "kept", 0), (2, 1, "device", 0), (3, 1, "low", 3)]


def test_regions_of_all_addresses_show_all_addresses(memory: Memory) -> None:  # V4
    root, everything = memory.container("root"), memory.reservation("everything", 1 << 64)
    root.add(everything, 0)
    root.add(memory.alias("again", everything, PAGE_SIZE, 1 << 64), (1 << 64) - PAGE_SIZE, priority=1)

    last = (1 << 64) - PAGE_SIZE
    assert [(it.start, it.size, it.offset) for it in render(root).ranges] == [
        (0, last, 0),
        (last, PAGE_SIZE, PAGE_SIZE),
    ]
    assert render(root).lookup((1 << 64) - 1) is not None
    assert render(root).lookup(1 << 64) is None


def grow(memory: Memory, nodes: list[Node], data: st.DataObject, *, wide: bool) -> None:
    """Make one more region, and map it or refuse to, as the oracle foresees."""
    node = make(memory, nodes, data, wide=wide)
    parent = data.draw(st.sampled_from([known for known in nodes if known.target is None]))
    address, priority = data.draw(places if wide else narrow_places), data.draw(priorities)
    if node.shows(parent):
        with pytest.raises(UsageError, match="would contain itself"):
            parent.region.add(node.region, address, priority=priority)
        return
    parent.region.add(node.region, address, priority=priority)
    parent.children.append((node, address, priority))
    nodes.append(node)
    if data.draw(st.integers(0, 4)) == 0:
        node.enabled = False
        node.region.set_enabled(False)
    if data.draw(st.integers(0, 3)) == 0:
        node.readonly = not node.readonly
        node.region.set_readonly(node.readonly)
    if node.region.kind == "rom-device" and data.draw(st.booleans()):
        node.trapped = True
        node.region.set_trapped(True)


@settings(max_examples=150)
@given(data=st.data())
def test_random_trees_show_what_asking_at_each_address_shows(data: st.DataObject) -> None:  # T9 V1 V2 V3 V4
    memory = Memory()
    root = Node(memory.container("root", ROOT_UNITS * UNIT), ROOT_UNITS * UNIT)
    nodes = [root]
    for _ in range(data.draw(st.integers(1, 9))):
        grow(memory, nodes, data, wide=False)

    view = render(root.region)

    for address in range(0, ROOT_UNITS * UNIT, UNIT):
        found = view.lookup(address)
        shown = None if found is None else Answer(
            found.region, found.offset + address - found.start, found.readonly, found.direct
        )  # fmt: skip
        assert shown == root.answer(address)
    assert all(left.end <= right.start for left, right in itertools.pairwise(view.ranges))
    memory.close()


@settings(max_examples=200)
@given(data=st.data())
def test_random_trees_of_any_size_show_what_asking_at_every_edge_shows(data: st.DataObject) -> None:
    # V1 V2 V3 V4 V5
    memory = Memory()
    root = Node(memory.container("root"), 1 << 64)
    nodes = [root]
    for _ in range(data.draw(st.integers(1, 9))):
        grow(memory, nodes, data, wide=True)

    assert as_asked(render(root.region)) == ask_everywhere(root)
    memory.close()


def test_oracle_knows_what_a_range_below_another_shows(memory: Memory) -> None:
    low, high = ram(memory, "low", 4), memory.reservation("high", PAGE_SIZE)
    root = Node(memory.container("root"), 1 << 64)
    below = Node(low, low.size, answers=True, has_memory=True)
    root.children = [(below, 0, 0), (Node(high, high.size, answers=True), PAGE_SIZE, 0)]

    assert ask_everywhere(root) == [
        (0, PAGE_SIZE, Answer(low, 0, False, True)),
        (PAGE_SIZE, PAGE_SIZE, Answer(high, 0, False, False)),
        (2 * PAGE_SIZE, 2 * PAGE_SIZE, Answer(low, 2 * PAGE_SIZE, False, True)),
    ]

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import Node

from dirtylog.errors import UsageError
from dirtylog.memory import Client, FlatRange, FlatView, Memory, MemoryRegion
from dirtylog.memory.flatview import diff, render
from dirtylog.units import PAGE_SIZE

PIECES = list[tuple[int, int, str, int]]
UNIT = PAGE_SIZE // 4
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


def test_neighbours_that_differ_stay_apart(memory: Memory) -> None:
    one, two = ram(memory, "one", 4), ram(memory, "two", 4)
    none, page = Client(0), PAGE_SIZE

    def joined(second: FlatRange) -> bool:
        return len(FlatView([FlatRange(one, 0, 0, page, none), second]).ranges) == 1

    assert joined(FlatRange(one, page, page, page, none))
    assert not joined(FlatRange(two, page, page, page, none))
    assert not joined(FlatRange(one, 2 * page, page, page, none))
    assert not joined(FlatRange(one, page, 2 * page, page, none))
    assert not joined(FlatRange(one, page, page, page, Client.DISPLAY))


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
    none, page = Client(0), PAGE_SIZE
    stays = FlatRange(one, 0, 0, page, none)
    grows, grown = FlatRange(one, 2 * page, 2 * page, page, none), FlatRange(one, 2 * page, 2 * page, 2 * page, none)
    moves, moved = FlatRange(two, 0, 8 * page, page, none), FlatRange(two, 0, 9 * page, page, none)
    swapped, other = FlatRange(two, 0, 5 * page, page, none), FlatRange(two, page, 5 * page, page, none)

    changes = diff(FlatView([stays, grows, swapped, moves]), FlatView([stays, grown, other, moved]))

    assert changes.kept == ((stays, stays),)
    assert changes.removed == (grows, swapped, moves)
    assert changes.added == (grown, other, moved)


def test_change_of_logging_alone_keeps_a_range(memory: Memory) -> None:  # T3
    region = ram(memory, "ram", 1)
    quiet, logged = (FlatRange(region, 0, 0, PAGE_SIZE, clients) for clients in (Client(0), Client.MIGRATION))

    changes = diff(FlatView([quiet]), FlatView([logged]))

    assert (changes.removed, changes.added) == ((), ())
    ((old, new),) = changes.kept
    assert (old.logging, new.logging) == (Client(0), Client.MIGRATION)


units = st.integers(0, 10).map(lambda count: count * UNIT)
positive_units = st.integers(1, 24).map(lambda count: count * UNIT)


def grow(memory: Memory, nodes: list[Node], data: st.DataObject) -> None:
    """Make one more region, and map it or refuse to, as the oracle foresees."""
    name = f"r{len(nodes)}"
    kind = data.draw(st.sampled_from(["ram", "container", "alias"]))
    if kind == "ram":
        node = Node(memory.ram(name, data.draw(st.integers(1, 4)) * PAGE_SIZE))
    elif kind == "container":
        node = Node(memory.container(name, data.draw(positive_units)))
    else:
        target, offset = data.draw(st.sampled_from(nodes)), data.draw(units)
        node = Node(memory.alias(name, target.region, offset, data.draw(positive_units)), target, offset)
    parent = data.draw(st.sampled_from([known for known in nodes if known.target is None]))
    address, priority = data.draw(units), data.draw(st.integers(-1, 1))
    if node.shows(parent):
        with pytest.raises(UsageError, match="would contain itself"):
            parent.region.add(node.region, address, priority=priority)
        return
    parent.region.add(node.region, address, priority=priority)
    parent.children.append((node, address, priority))
    nodes.append(node)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_random_trees_show_what_asking_at_each_address_shows(data: st.DataObject) -> None:  # T9
    memory = Memory()
    root = Node(memory.container("root", ROOT_UNITS * UNIT))
    nodes = [root]
    for _ in range(data.draw(st.integers(1, 7))):
        grow(memory, nodes, data)

    view = render(root.region)

    for address in range(0, ROOT_UNITS * UNIT, UNIT):
        flat = view.lookup(address)
        shown = None if flat is None else (flat.region, flat.offset + address - flat.start)
        assert shown == root.answer(address)
    assert all(left.end <= right.start for left, right in zip(view.ranges, view.ranges[1:], strict=False))
    memory.close()

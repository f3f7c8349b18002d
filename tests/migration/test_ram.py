from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_tracker import ModelWorld

from dirtylog.errors import ProtocolError
from dirtylog.linux.mapping import memory_of
from dirtylog.memory import (
    Client,
    Memory,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    PageBitmap,
    RAMBlock,
    TrackingReason,
)
from dirtylog.migration import ram as ram_module
from dirtylog.migration.batch import Batch, runs_of
from dirtylog.migration.messages import Pages, ZeroPages
from dirtylog.migration.ram import BATCH_PAGES, DirtyRAM, IncomingRAM, page_views
from dirtylog.trackers import KVMLogMode
from dirtylog.units import KIB, MIB, PAGE_SIZE

_CHUNK = 256 * KIB
"""The smallest: one word of the bitmap."""


def _block(region: MemoryRegion) -> RAMBlock:
    assert region.block is not None
    return region.block


def _numbers(message: Pages | ZeroPages | None) -> list[int]:
    runs = [] if message is None else message.runs.tolist()
    return [page for first, count in runs for page in range(first, first + count)]


class _Copy:
    """A destination without a connection."""

    def __init__(self, pages: int) -> None:
        self.block = RAMBlock("copy", pages * PAGE_SIZE)
        self.block.array[:] = 0xEE  # must not show through
        self._ram = IncomingRAM([self.block])

    def take(self, batch: Batch) -> None:
        if batch.zeros is not None:
            self._ram.zero(batch.zeros)
        if batch.pages is not None:
            for place, contents in zip(self._ram.place(batch.pages), batch.contents, strict=True):
                place[:] = memory_of(contents)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def _dirty_ram(memory: Memory, pages: int, chunk: int = _CHUNK) -> tuple[MemoryRegion, DirtyRAM]:
    region = memory.ram("ram", pages * PAGE_SIZE)
    return region, DirtyRAM(3, region, _block(region), chunk)


def _send_all(memory: Memory, region: MemoryRegion, ram: DirtyRAM) -> None:
    """A first pass, after which nothing is dirty."""
    memory.start_logging(TrackingReason.MIGRATION)
    list(ram.batches())
    region.test_and_clear_dirty(0, region.size, Client.MIGRATION)


def test_first_pass_sends_every_page_whatever_the_log_says(memory: Memory) -> None:  # M3
    region, ram = _dirty_ram(memory, 200)
    region.test_and_clear_dirty(0, region.size, Client.MIGRATION)
    _block(region).array[7 * PAGE_SIZE] = 1
    assert ram.pages == 200
    assert ram.harvest() == 0
    batches = list(ram.batches())
    assert sorted(page for batch in batches for page in _numbers(batch.pages) + _numbers(batch.zeros)) == [*range(200)]
    assert ram.pages == 0


def test_only_pages_that_are_not_all_zero_are_sent_with_contents(memory: Memory) -> None:  # M4
    region, ram = _dirty_ram(memory, 64)
    array = _block(region).array
    array[3 * PAGE_SIZE] = 1  # its first word
    array[6 * PAGE_SIZE - 1] = 1  # its last byte
    array[9 * PAGE_SIZE + 8] = 0  # stored, yet zero
    batches = list(ram.batches())
    assert [page for batch in batches for page in _numbers(batch.pages)] == [3, 5]
    assert [bytes(memory_of(part)) for batch in batches for part in batch.contents] == [
        array[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes() for page in (3, 5)
    ]
    zeros = [page for batch in batches for page in _numbers(batch.zeros)]
    assert sorted(zeros) == [page for page in range(64) if page not in (3, 5)]
    assert all(message.block == 3 for batch in batches for message in (batch.pages, batch.zeros) if message)


def test_looking_at_holes_does_not_allocate_them(memory: Memory) -> None:
    region, ram = _dirty_ram(memory, 1000)
    _block(region).array[500 * PAGE_SIZE] = 1
    list(ram.batches())
    assert list(_block(region).mapping.extents(0, region.size)) == [(500 * PAGE_SIZE, 501 * PAGE_SIZE)]


def test_data_that_become_a_hole_are_sent_as_zero(memory: Memory) -> None:  # M4
    region, ram = _dirty_ram(memory, 200)
    _block(region).array[:] = 1
    _send_all(memory, region, ram)
    _block(region).mapping.punch(64 * PAGE_SIZE, 10 * PAGE_SIZE)
    region.set_dirty(60 * PAGE_SIZE, 20 * PAGE_SIZE)
    ram.harvest()
    batches = list(ram.batches())
    assert _numbered_zeros(batches) == [*range(64, 74)]
    assert [page for batch in batches for page in _numbers(batch.pages)] == [*range(60, 64), *range(74, 80)]


def test_second_pass_sends_what_was_written_since(memory: Memory) -> None:
    region, ram = _dirty_ram(memory, 200)
    space = memory.address_space("system", region)
    _send_all(memory, region, ram)
    space.write(5 * PAGE_SIZE, b"x")
    space.write(130 * PAGE_SIZE - 1, b"xy")
    assert ram.harvest() == 3
    assert [page for batch in ram.batches() for page in _numbers(batch.pages)] == [5, 129, 130]
    assert list(ram.batches()) == []


def test_page_that_is_still_to_be_sent_is_not_fresh(memory: Memory) -> None:
    _, ram = _dirty_ram(memory, 10)
    assert ram.harvest() == 0  # all ten were to be sent anyway
    assert ram.pages == 10


class _Order(MemoryListener):
    """Writes down which pages are cleared."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def log_clear(self, section: MemoryRegionSection) -> None:
        self._log.append(f"clear {section.offset_within_region // PAGE_SIZE}+{section.size // PAGE_SIZE}")


def _clears_and_reads(memory: Memory, region: MemoryRegion, ram: DirtyRAM) -> str:
    """In their order, of the second pass over a guest that wrote four pages."""
    space = memory.address_space("system", region)
    _send_all(memory, region, ram)
    seen: list[str] = []
    memory.register(_Order(seen), space)
    for page in (3, 70, 71, 199):
        space.write(page * PAGE_SIZE, b"x")
    ram.harvest()
    for batch in ram.batches():
        assert batch.pages is not None
        seen += [f"read {first}+{count}" for first, count in batch.pages.runs.tolist()]
    return ", ".join(seen)


@pytest.mark.parametrize(
    ("chunk", "log"),
    [
        (_CHUNK, "clear 0+64, read 3+1, clear 64+64, read 70+2, clear 192+8, read 199+1"),
        (_CHUNK + 1, "clear 0+128, read 3+1, read 70+2, clear 128+72, read 199+1"),
        (MIB, "clear 0+200, read 3+1, read 70+2, read 199+1"),
    ],
    ids=["a word", "rounded up to words", "all at once"],
)
def test_each_chunk_is_cleared_right_before_its_first_page_is_read(  # D3
    memory: Memory, monkeypatch: pytest.MonkeyPatch, chunk: int, log: str
) -> None:
    monkeypatch.setattr(ram_module, "_WORTHWHILE", 1)
    region, ram = _dirty_ram(memory, 200, chunk)
    assert _clears_and_reads(memory, region, ram) == log


@pytest.mark.parametrize(
    ("worthwhile", "log"),
    [
        (2, "clear 0+64, clear 64+64, read 3+1, read 70+2, clear 192+8, read 199+1"),
        (4, "clear 0+64, clear 64+64, clear 192+8, read 3+1, read 70+2, read 199+1"),
    ],
)
def test_few_pages_wait_for_those_of_the_next_chunks(  # D3
    memory: Memory, monkeypatch: pytest.MonkeyPatch, worthwhile: int, log: str
) -> None:
    monkeypatch.setattr(ram_module, "_WORTHWHILE", worthwhile)
    region, ram = _dirty_ram(memory, 200, _CHUNK)
    _block(region).array[:] = 1
    assert _clears_and_reads(memory, region, ram) == log


def test_chunk_without_a_page_to_send_stays_due(memory: Memory) -> None:  # D3
    region, ram = _dirty_ram(memory, 128)
    space = memory.address_space("system", region)
    _send_all(memory, region, ram)
    seen: list[str] = []
    memory.register(_Order(seen), space)
    ram.harvest()
    space.write(0, b"x")
    ram.harvest()
    list(ram.batches())
    assert seen == ["clear 0+64"]
    space.write(64 * PAGE_SIZE, b"x")
    ram.harvest()
    list(ram.batches())
    assert seen == ["clear 0+64", "clear 64+64"]


@given(st.sets(st.integers(0, 5000)), st.sets(st.integers(0, 5000)))
@settings(max_examples=30)
def test_batches_cover_what_is_dirty_once_and_in_order(filled: set[int], dirty: set[int]) -> None:
    memory = Memory()
    try:
        region, ram = _dirty_ram(memory, 5001, 4 * MIB)
        array = _block(region).array
        array[sorted(page * PAGE_SIZE for page in filled)] = 1
        assert all(len(_numbers(batch.pages)) <= BATCH_PAGES for batch in ram.batches())
        memory.start_logging(TrackingReason.MIGRATION)
        region.test_and_clear_dirty(0, region.size, Client.MIGRATION)
        for page in dirty:
            array[page * PAGE_SIZE] = page in filled  # no part of a hole any more
            region.set_dirty(page * PAGE_SIZE, 1)
        assert ram.harvest() == len(dirty)
        batches = list(ram.batches())
        assert [page for batch in batches for page in _numbers(batch.pages)] == sorted(dirty & filled)
        assert sorted(page for batch in batches for page in _numbers(batch.zeros)) == sorted(dirty - filled)
    finally:
        memory.close()


def _numbered_zeros(batches: Iterable[Batch]) -> list[int]:
    return [page for batch in batches for page in _numbers(batch.zeros)]


def test_hole_is_announced_whole_and_its_log_is_left_alone(memory: Memory) -> None:
    region, ram = _dirty_ram(memory, 10 * 64)
    _block(region).array[[130 * PAGE_SIZE, 330 * PAGE_SIZE]] = 1
    memory.start_logging(TrackingReason.MIGRATION)
    cleared: list[str] = []
    memory.register(_Order(cleared), memory.address_space("system", region))
    ram.harvest()
    assert [batch.zeros.runs.tolist() for batch in ram.batches() if batch.zeros is not None] == [
        [[0, 128]],
        [[128, 2], [131, 61]],
        [[192, 128]],
        [[320, 10], [331, 53]],
        [[384, 256]],
    ]
    assert cleared == ["clear 128+64", "clear 320+64"]


def test_hole_that_the_log_still_calls_dirty_is_not_sent_again(memory: Memory) -> None:
    region, ram = _dirty_ram(memory, 10 * 64)
    _send_all(memory, region, ram)
    for _ in range(2):
        region.set_dirty(0, region.size)
        assert ram.harvest() == 0
        assert ram.pages == 0
        assert list(ram.batches()) == []


def test_part_of_a_hole_that_was_written_to_is_sent_and_cleared(memory: Memory) -> None:  # D1, D3
    region, ram = _dirty_ram(memory, 10 * 64)
    _send_all(memory, region, ram)
    cleared: list[str] = []
    memory.register(_Order(cleared), memory.address_space("system", region))
    _block(region).array[130 * PAGE_SIZE] = 1
    for fresh in (1, 1, 1):
        region.set_dirty(0, region.size)
        assert ram.harvest() == fresh
        (batch,) = ram.batches()
        assert _numbers(batch.pages) == [130]
        assert cleared == ["clear 128+64"]
        cleared.clear()


def test_page_of_a_hole_that_was_written_to_and_is_zero_is_sent_as_zero(memory: Memory) -> None:  # M4
    region, ram = _dirty_ram(memory, 10 * 64)
    _send_all(memory, region, ram)
    _block(region).array[130 * PAGE_SIZE] = 0
    region.set_dirty(0, region.size)
    assert ram.harvest() == 1
    assert _numbered_zeros(ram.batches()) == [130]


def test_hole_of_which_only_some_pages_are_to_be_sent_is_cleared_as_all_else(memory: Memory) -> None:  # D3
    region, ram = _dirty_ram(memory, 10 * 64)
    array = _block(region).array
    array[:] = 1
    _send_all(memory, region, ram)
    _block(region).mapping.punch(0, region.size)
    cleared: list[str] = []
    memory.register(_Order(cleared), memory.address_space("system", region))
    region.set_dirty(0, 100 * PAGE_SIZE)
    assert ram.harvest() == 100
    assert _numbered_zeros(ram.batches()) == [*range(100)]
    assert cleared == ["clear 0+64", "clear 64+64"]


_MOMENTS = 40


class _RacingGuest(MemoryListener):
    """A guest that writes in the very moments at which a wrong order would lose it: around each clear."""

    def __init__(self, world: ModelWorld, pages: Callable[[], list[int]], priority: int) -> None:
        self._world = world
        self._pages = pages
        self.priority = priority

    def log_clear(self, section: MemoryRegionSection) -> None:
        self._world.write([page * PAGE_SIZE for page in self._pages()])


@given(st.sampled_from(KVMLogMode), st.integers(1, 200), st.sampled_from([_CHUNK, 2 * _CHUNK, MIB]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_no_write_of_a_racing_guest_is_lost(  # D1, D3
    mode: KVMLogMode, pages: int, chunk: int, random: Random
) -> None:
    moments = 0

    def some_pages() -> list[int]:
        nonlocal moments
        moments += 1
        return [random.randrange(pages) for _ in range(3)] if moments <= _MOMENTS else []

    world = ModelWorld(mode, pages)
    copy = _Copy(pages)
    try:
        world.root.add(world.ram, 0)
        world.memory.register(_RacingGuest(world, some_pages, priority=5), world.system)  # before the tracker's clear
        world.memory.register(_RacingGuest(world, some_pages, priority=20), world.system)  # after it
        world.memory.start_logging(TrackingReason.MIGRATION)
        world.write([page * PAGE_SIZE for page in some_pages()])
        ram = DirtyRAM(0, world.ram, _block(world.ram), chunk)
        while ram.pages or moments < _MOMENTS:
            for batch in ram.batches():
                world.write([page * PAGE_SIZE for page in some_pages()])
                copy.take(batch)
                world.write([page * PAGE_SIZE for page in some_pages()])
            world.memory.sync_dirty_log()
            ram.harvest()
            world.write([page * PAGE_SIZE for page in some_pages()])
            world.ram.harvest_dirty(PageBitmap(pages), client=Client.WATCH)  # clears all of the log
        assert np.array_equal(copy.block.array, _block(world.ram).array)
    finally:
        copy.block.close()
        world.close()


@pytest.fixture
def blocks() -> Iterator[list[RAMBlock]]:
    blocks = [RAMBlock("one", 8 * PAGE_SIZE), RAMBlock("two", 4 * PAGE_SIZE)]
    yield blocks
    for block in blocks:
        block.close()


def _runs(*runs: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array(runs, np.int64).reshape(len(runs), 2)


def test_contents_are_placed_in_the_order_of_the_runs(blocks: list[RAMBlock]) -> None:
    views = IncomingRAM(blocks).place(Pages(1, _runs((0, 1), (2, 2))))
    for number, view in enumerate(views, 1):
        view[:] = bytes((number,)) * len(view)
    assert [int(blocks[1].array[page * PAGE_SIZE]) for page in range(4)] == [1, 0, 2, 2]
    assert not blocks[0].array.any()


def test_zero_pages_make_whatever_was_there_zero(blocks: list[RAMBlock]) -> None:  # M4
    block = blocks[0]
    block.array[:] = 0xFF
    IncomingRAM(blocks).zero(ZeroPages(0, _runs((1, 2), (7, 1))))
    kept = [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in block.mapping.extents(0, block.size)]
    assert kept == [(0, 1), (3, 7)]
    assert block.page_words.any(axis=1).tolist() == [page not in (1, 2, 7) for page in range(8)]


def test_zero_pages_take_no_memory_where_there_was_none(blocks: list[RAMBlock]) -> None:  # M4
    IncomingRAM(blocks).zero(ZeroPages(0, _runs((0, 8))))
    assert list(blocks[0].mapping.extents(0, blocks[0].size)) == []


@pytest.mark.parametrize("kind", [Pages, ZeroPages])
@pytest.mark.parametrize(
    ("block", "runs", "reason"),
    [
        (2, [(0, 1)], "pages of block 2 of 2"),
        ((1 << 32) - 1, [(0, 1)], "pages of block 4294967295 of 2"),
        (1, [(4, 1)], "page 4 of block 'two', which has 4"),
        (1, [(0, 1), (3, 2)], "page 4 of block 'two', which has 4"),
        (0, [(0, 9)], "page 8 of block 'one', which has 8"),
        (0, [((1 << 52) - 1, (1 << 52) - 1)], "page 9007199254740989 of block 'one'"),
    ],
)
def test_memory_that_is_not_there_is_refused_untouched(  # M5
    blocks: list[RAMBlock], kind: type[Pages] | type[ZeroPages], block: int, runs: list[tuple[int, int]], reason: str
) -> None:
    for one in blocks:
        one.array[:] = 0x55
    message = kind(block, _runs(*runs))
    ram = IncomingRAM(blocks)
    with pytest.raises(ProtocolError, match=f"the stream is corrupt: {reason}"):
        ram.place(message) if isinstance(message, Pages) else ram.zero(message)
    assert all((one.array == 0x55).all() for one in blocks)


def test_memory_filled_in_large_pieces_holds_what_was_sent() -> None:
    """Whole huge pages are asked for where a message fills them; their contents must not differ for that."""
    copy = _Copy(2048)
    memory = Memory()
    try:
        region, ram = _dirty_ram(memory, 2048, 8 * MIB)
        ram = DirtyRAM(0, region, _block(region), 8 * MIB)
        words = _block(region).page_words
        words[:] = np.arange(1, 2049, dtype=np.uint64)[:, None]
        words[700:900] = 0
        for _ in range(2):
            for batch in ram.batches():
                copy.take(batch)
            assert np.array_equal(copy.block.array, _block(region).array)
            words[600:800] = 9
            ram.harvest()  # all of it: pages are born dirty
    finally:
        copy.block.close()
        memory.close()


def test_batch_ends_where_a_huge_page_does() -> None:
    def end(pages: list[int]) -> int:
        return ram_module._batch_end(np.array(pages, np.int64))

    assert end([*range(BATCH_PAGES)]) == BATCH_PAGES
    assert end([*range(2 * BATCH_PAGES - 1)]) == BATCH_PAGES
    assert end([*range(100, 2 * BATCH_PAGES)]) == BATCH_PAGES - 100
    assert end([*range(0, 4 * BATCH_PAGES, 2)]) == BATCH_PAGES
    assert end([*range(0, 512 * 2 * BATCH_PAGES, 512)]) == BATCH_PAGES


@given(st.sets(st.integers(0, 300)))
def test_runs_of_pages_are_those_pages(pages: set[int]) -> None:
    runs = runs_of(np.array(sorted(pages), np.int64))
    assert _numbers(ZeroPages(0, runs)) == sorted(pages)
    assert all(first + count < following for (first, count), (following, _) in pairwise(runs.tolist()))


def test_views_are_the_memory_itself(blocks: list[RAMBlock]) -> None:
    (view,) = page_views(blocks[0], _runs((2, 1)))
    view[0] = 7
    assert blocks[0].array[2 * PAGE_SIZE] == 7
    assert len(view) == PAGE_SIZE

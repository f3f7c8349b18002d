import ctypes
import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from support.forks import in_child, refused_with
from support.oracles import to_bits
from support.require import require

from dirtylog.errors import ClosedError, ForkedError, HostError, LostMappingError, UsageError
from dirtylog.linux import pagemap
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.pagemap import Category, Pagemap, ScanArgument
from dirtylog.linux.userfaultfd import Feature, RegisterMode, Userfaultfd
from dirtylog.units import PAGE_SIZE

PAGES = 2 * 70_000  # with every other one written, more ranges than one call returns, twice
WRITE_WATCH = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM


@pytest.fixture
def memory() -> Iterator[MemfdMapping]:
    with closing(MemfdMapping("test", PAGES * PAGE_SIZE)) as mapping:
        yield mapping


@pytest.fixture
def scanner(memory: MemfdMapping) -> Iterator[Pagemap]:
    with Pagemap() as opened:
        try:
            opened.scan(memory.address, memory.address + PAGE_SIZE, Category.PRESENT)
        except HostError as error:
            require("pagemap-scan", False, str(error))
            raise
        yield opened


def page_numbers(memory: MemfdMapping, regions: np.ndarray) -> list[int]:
    return [
        (address - memory.address) // PAGE_SIZE
        for region in regions
        for address in range(int(region["start"]), int(region["end"]), PAGE_SIZE)
    ]


def test_request_has_the_number_of_the_kernel_headers() -> None:
    assert ctypes.sizeof(ScanArgument) == 96
    assert pagemap.PAGEMAP_SCAN.code == 0xC0606610
    assert pagemap.REGION.itemsize == 24


def test_entry_tells_present_pages(memory: MemfdMapping) -> None:
    memory.array[PAGE_SIZE] = 1
    with Pagemap() as opened:
        entries = opened.entries(memory.address, 3)
    assert [int(entry) >> 63 for entry in entries] == [0, 1, 0]


def test_entries_past_user_memory_are_refused() -> None:
    with Pagemap() as opened, pytest.raises(UsageError, match="not all user addresses"):
        opened.entries(1 << 60, 1)


def test_scan_finds_present_pages_even_if_one_call_cannot_hold_them(memory: MemfdMapping, scanner: Pagemap) -> None:
    memory.array[:: 2 * PAGE_SIZE] = 1
    regions = scanner.scan(memory.address, memory.address + memory.size, Category.PRESENT)
    assert page_numbers(memory, regions) == list(range(0, PAGES, 2))
    assert set(regions["categories"].tolist()) == {Category.PRESENT.value}


@pytest.mark.parametrize("regions", [1, 511, 512, 513, 1024, 1500, 32767, 32768, 32769, 65536])
def test_scan_finds_each_page_once_however_many_ranges_there_are(
    memory: MemfdMapping, scanner: Pagemap, regions: int
) -> None:
    # The kernel keeps 512 ranges at a time, and reports a stale end when it went on after that.
    memory.array[: regions * 2 * PAGE_SIZE : 2 * PAGE_SIZE] = 1
    found = scanner.scan(memory.address, memory.address + memory.size, Category.PRESENT)
    assert page_numbers(memory, found) == list(range(0, 2 * regions, 2))


def test_scan_keeps_to_its_range(memory: MemfdMapping, scanner: Pagemap) -> None:
    memory.array[: 10 * PAGE_SIZE] = 1
    regions = scanner.scan(memory.address + 3 * PAGE_SIZE, memory.address + 5 * PAGE_SIZE, Category.PRESENT)
    assert page_numbers(memory, regions) == [3, 4]


def test_scan_of_nothing_finds_nothing(memory: MemfdMapping, scanner: Pagemap) -> None:
    assert len(scanner.scan(memory.address, memory.address, Category.PRESENT)) == 0


def test_scan_that_protects_finds_only_pages_written_since(memory: MemfdMapping, scanner: Pagemap) -> None:
    try:
        watch = Userfaultfd(WRITE_WATCH)
    except HostError as error:
        require("write-watch", False, str(error))
        raise
    start, end = memory.address, memory.address + memory.size
    with watch:
        watch.register(start, memory.size, RegisterMode.WP)
        scanner.scan(start, end, Category.WRITTEN, protect=True)
        assert len(scanner.scan(start, end, Category.WRITTEN)) == 0
        memory.array[:: 2 * PAGE_SIZE] = 1
        assert page_numbers(memory, scanner.scan(start, end, Category.WRITTEN, protect=True)) == list(
            range(0, PAGES, 2)
        )
        memory.array[7 * PAGE_SIZE] = 1
        assert page_numbers(memory, scanner.scan(start, end, Category.WRITTEN)) == [7]


def test_scan_that_protects_unregistered_memory_is_refused(memory: MemfdMapping, scanner: Pagemap) -> None:
    with pytest.raises(LostMappingError, match="is not watched"):
        scanner.scan(memory.address, memory.address + PAGE_SIZE, Category.WRITTEN, protect=True)
    with pytest.raises(LostMappingError, match="is not watched"):
        scanner.scan(memory.address, memory.address + PAGE_SIZE, Category.WRITTEN, watched=True)


def test_pagemap_of_a_parent_is_refused(memory: MemfdMapping) -> None:
    with Pagemap() as opened:
        assert in_child(lambda: refused_with(ForkedError, lambda: opened.entries(memory.address, 1)))
        assert len(opened.entries(memory.address, 1)) == 1


def test_missing_pagemap_names_the_remedy() -> None:
    with pytest.raises(HostError, match="cannot be opened: No such file") as caught:
        Pagemap("/nonexistent/pagemap")
    assert "CONFIG_PROC_PAGE_MONITOR" in (caught.value.remedy or "")


def test_closed_pagemap_is_refused_and_closes_again() -> None:
    opened = Pagemap()
    opened.close()
    opened.close()
    with pytest.raises(ClosedError):
        opened.entries(0, 1)


def test_soft_dirty_agrees_with_the_pagemap_of_a_new_page(memory: MemfdMapping) -> None:
    """The second witness: the entry read by plain file I/O."""
    memory.array[0] = 1
    with open(pagemap.PAGEMAP, "rb", buffering=0) as file:
        entry = int.from_bytes(os.pread(file.fileno(), 8, memory.address // PAGE_SIZE * 8), "little")
    assert pagemap.has_soft_dirty() == bool(entry & pagemap.ENTRY_SOFT_DIRTY)


def test_soft_dirty_bits_are_gathered_across_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = {0, 63, 64, 99, 65_536, 65_599}

    def entries(_: Pagemap, address: int, pages: int) -> np.ndarray:
        found = np.full(pages, ~np.uint64(pagemap.ENTRY_SOFT_DIRTY))
        for page in dirty:
            if 0 <= page - address // PAGE_SIZE < pages:
                found[page - address // PAGE_SIZE] = pagemap.ENTRY_SOFT_DIRTY
        return found

    monkeypatch.setattr(Pagemap, "entries", entries)
    with Pagemap() as opened:
        assert to_bits(opened.soft_dirty(0, 65_600)) == dirty
        assert to_bits(opened.soft_dirty(60 * PAGE_SIZE, 40)) == {3, 4, 39}

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.memory import RAMBlock
from dirtylog.migration import digest as digest_module
from dirtylog.migration.digest import block_digest
from dirtylog.units import GIB, PAGE_SIZE

_PAGES = 20


@pytest.fixture
def block() -> Iterator[RAMBlock]:
    block = RAMBlock("ram", _PAGES * PAGE_SIZE)
    yield block
    block.close()


def _fill(block: RAMBlock, pages: dict[int, int]) -> None:
    for page, value in pages.items():
        block.array[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = value


def _digest(pages: dict[int, int], size: int = _PAGES) -> bytes:
    block = RAMBlock("ram", size * PAGE_SIZE)
    try:
        _fill(block, pages)
        return block_digest(block)
    finally:
        block.close()


def test_digest_is_two_128_bit_numbers(block: RAMBlock) -> None:
    assert len(block_digest(block)) == 32


def test_hole_equals_stored_zeros(block: RAMBlock) -> None:
    _fill(block, {2: 7, 3: 0, 4: 9, 19: 0})
    assert block_digest(block) == _digest({2: 7, 4: 9})


def test_looking_allocates_no_hole(block: RAMBlock) -> None:
    _fill(block, {5: 1})
    block_digest(block)
    assert list(block.mapping.extents(0, block.size)) == [(5 * PAGE_SIZE, 6 * PAGE_SIZE)]


def test_size_of_the_pieces_that_are_read_does_not_matter(block: RAMBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(block, {page: page % 3 for page in range(_PAGES)})
    whole = block_digest(block)
    for pages in (1, 2, 7):
        monkeypatch.setattr(digest_module, "_PIECE", pages * PAGE_SIZE)
        assert block_digest(block) == whole


def test_one_changed_byte_changes_the_digest(block: RAMBlock) -> None:
    _fill(block, {2: 7})
    before = block_digest(block)
    block.array[3 * PAGE_SIZE - 1] ^= 1
    assert block_digest(block) != before


def test_page_that_moves_changes_the_digest() -> None:
    assert len({_digest({page: 7}) for page in range(_PAGES)}) == _PAGES


def test_two_pages_that_change_places_change_the_digest() -> None:
    assert _digest({2: 7, 4: 9}) != _digest({2: 9, 4: 7})


@given(
    st.dictionaries(st.integers(0, _PAGES - 1), st.integers(0, 2)),
    st.dictionaries(st.integers(0, _PAGES - 1), st.integers(0, 2)),
)
def test_digests_are_equal_exactly_when_the_contents_are(one: dict[int, int], other: dict[int, int]) -> None:
    def contents(pages: dict[int, int]) -> list[int]:
        return [pages.get(page, 0) for page in range(_PAGES)]

    assert (_digest(one) == _digest(other)) is (contents(one) == contents(other))


def test_large_sparse_block_is_not_read_through() -> None:
    block = RAMBlock("sparse", 16 * GIB)
    try:
        block.array[8 * GIB] = 1
        block_digest(block)
        assert list(block.mapping.extents(0, block.size)) == [(8 * GIB, 8 * GIB + PAGE_SIZE)]
    finally:
        block.close()

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.errors import UsageError
from dirtylog.memory import ClearChunks
from dirtylog.units import KIB, MIB


@pytest.mark.parametrize(("size", "pages"), [(1, 64), (256 * KIB, 64), (256 * KIB + 1, 128), (128 * MIB, 32768)])
def test_chunks_are_whole_words(size: int, pages: int) -> None:  # W2
    assert ClearChunks(100_000, size).chunk == pages


@pytest.mark.parametrize("size", [0, -1])
def test_chunk_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="clear chunk"):
        ClearChunks(100, size)


def test_nothing_is_due_at_first() -> None:
    assert ClearChunks(1000, 1).take(0, 1000) == []


def test_whole_chunks_are_due_once_and_the_last_ends_with_the_block() -> None:
    chunks = ClearChunks(1000, 1)
    chunks.postpone(0, 1000)

    assert chunks.take(70, 1) == [(64, 64)]
    assert chunks.take(64, 64) == []
    assert chunks.take(100, 200) == [(128, 192)]
    assert chunks.take(0, 1000) == [(0, 64), (320, 680)]
    assert chunks.take(0, 1000) == []


def test_chunk_becomes_due_again_with_the_next_harvest() -> None:
    chunks = ClearChunks(100, 1)
    chunks.postpone(0, 100)
    chunks.take(0, 100)
    chunks.postpone(99, 1)

    assert chunks.take(0, 100) == [(64, 36)]


ranges = st.tuples(st.integers(0, 699), st.integers(1, 700)).map(lambda pair: (pair[0], min(pair[1], 700 - pair[0])))


@given(chunk=st.integers(1, 3), steps=st.lists(st.tuples(st.booleans(), ranges), max_size=12))
def test_every_harvested_page_is_cleared_before_it_is_read(
    chunk: int, steps: list[tuple[bool, tuple[int, int]]]
) -> None:
    # D3
    chunks = ClearChunks(700, chunk * 256 * KIB)
    due: set[int] = set()
    for postpone, (first, count) in steps:
        if postpone:
            chunks.postpone(first, count)
            due |= set(range(first, first + count))
        else:
            taken = chunks.take(first, count)
            cleared = {page for start, length in taken for page in range(start, start + length)}
            assert len(cleared) == sum(length for _, length in taken)
            assert all(start % chunks.chunk == 0 for start, _ in taken)
            assert all(length % chunks.chunk == 0 or start + length == 700 for start, length in taken)
            due -= cleared
            assert due.isdisjoint(range(first, first + count))

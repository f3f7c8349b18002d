"""Bitmaps that are looked at in several blocks, and each way of finding bits."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import SetBitmap, to_bits, to_words

from dirtylog.memory import PageBitmap, bitmap

PAGES = 64 * 7 + 9
EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 320, PAGES - 1, PAGES]

words = st.lists(
    st.sampled_from((0, (1 << 64) - 1, 1, 1 << 63, 0x5555_5555_5555_5555)) | st.integers(0, (1 << 64) - 1),
    min_size=8,
    max_size=8,
)
ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda ends: (min(ends), max(ends) - min(ends)))


@pytest.fixture(scope="module", params=[1, 2, 3], autouse=True)
def block(request: pytest.FixtureRequest) -> Iterator[int]:
    """Blocks of so few words that small bitmaps have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_BLOCK", request.param)
        yield request.param


@pytest.fixture(scope="module", params=[(64, 1), (64, 64), (0, 1), (4, 6)], autouse=True)
def ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """How many bits a word are few, and how many are found one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_FEW", request.param[0])
        patch.setattr(bitmap, "_LAYERS", request.param[1])
        yield


def made(values: list[int]) -> tuple[PageBitmap, SetBitmap]:
    oracle = SetBitmap(PAGES)
    given_words = np.array(values, np.uint64)
    oracle.bits = {bit for bit in to_bits(given_words) if bit < PAGES}
    return PageBitmap(PAGES, given_words), oracle


def check(fast: PageBitmap, slow: SetBitmap, first: int, count: int) -> None:
    assert fast.runs(first, count).tolist() == slow.runs(first, count)
    assert fast.indices(first, count).tolist() == slow.indices(first, count)
    assert fast.count(first, count) == slow.count(first, count)
    assert fast.any(first, count) == bool(slow.count(first, count))


@given(values=words, place=ranges)
def test_bits_and_runs_of_any_range_agree_with_the_oracle(values: list[int], place: tuple[int, int]) -> None:
    fast, slow = made(values)
    before = fast.words.copy()
    check(fast, slow, *place)
    assert np.array_equal(fast.words, before)


@given(values=words, added=words, place=ranges)
def test_merge_agrees_with_the_oracle(values: list[int], added: list[int], place: tuple[int, int]) -> None:
    fast, slow = made(values)
    source = np.array(added, np.uint64)[: -(-place[1] // 64)]
    given_words = source.copy()
    assert fast.merge(source, *place) == slow.merge(source, *place)
    assert to_bits(fast.words) == slow.bits
    assert np.array_equal(source, given_words)


@pytest.mark.parametrize("bits", [set(), set(range(PAGES)), set(range(0, PAGES, 2)), set(range(60, 200)), {PAGES - 1}])
def test_ranges_that_end_near_blocks_ends_agree_with_the_oracle(bits: set[int]) -> None:
    fast, slow = made(to_words(bits, PAGES).tolist())
    for first in EDGES:
        for end in EDGES:
            if first <= end:
                check(fast, slow, first, end - first)


@given(place=st.tuples(st.integers(0, PAGES - 1), st.integers(0, 70)))
def test_few_pages_are_set_as_in_the_oracle(place: tuple[int, int]) -> None:
    first, count = place[0], min(place[1], PAGES - place[0])
    fast, slow = made([0] * 8)
    fast.set(first, count)
    slow.set(first, count)
    assert to_bits(fast.words) == slow.bits

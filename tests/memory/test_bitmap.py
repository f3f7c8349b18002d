from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import SetBitmap, to_bits, to_words

from dirtylog.errors import UsageError
from dirtylog.memory import PageBitmap, Words

EDGES = [0, 1, 2, 62, 63, 64, 65, 127, 128, 129, 190, 199, 200]
"""Where words begin and end, in a bitmap of 200 pages."""
RANGES = [(first, end - first) for first in EDGES for end in EDGES if first <= end]

some_bits = st.sets(st.integers(0, 259))


def filled(pages: int, bits: set[int]) -> tuple[PageBitmap, SetBitmap]:
    oracle = SetBitmap(pages)
    oracle.bits = {bit for bit in bits if bit < pages}
    return PageBitmap(pages, to_words(oracle.bits, pages)), oracle


def test_bit_i_of_word_w_is_page_64w_plus_i() -> None:  # W1
    bitmap = PageBitmap(200)
    for page in (0, 63, 64, 130):
        bitmap.set(page, 1)

    assert bitmap.words.tobytes() == bytes.fromhex(
        "0100000000000080 0100000000000000 0400000000000000 0000000000000000"
    )


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 128, 200])
def test_new_bitmap_is_empty_and_filled_one_has_no_bit_past_its_end(pages: int) -> None:  # D9
    bitmap = PageBitmap(pages)

    assert bitmap.count() == 0
    assert not bitmap.any()

    bitmap.set()

    assert bitmap.count() == pages
    assert to_bits(bitmap.words) == set(range(pages))
    assert bitmap.runs().tolist() == ([[0, pages]] if pages else [])


def test_bits_past_the_end_of_given_words_are_dropped() -> None:  # D9
    assert to_bits(PageBitmap(70, to_words(range(128), 128)).words) == set(range(70))


@given(st.integers(0, 300), st.sets(st.integers(0, 300)), st.booleans())
def test_bitmap_from_runs_agrees_with_the_oracle(pages: int, bits: set[int], touching: bool) -> None:  # W1 D9
    _, oracle = filled(pages, bits)
    runs = [[page, 1] for page in sorted(oracle.bits)] if touching else oracle.runs()
    starts, ends = (np.array([run[0] + run[1] * last for run in runs], np.int64) for last in (0, 1))

    bitmap = PageBitmap.from_runs(pages, starts, ends)

    assert to_bits(bitmap.words) == oracle.bits


@pytest.mark.parametrize("runs", [[(3, 3)], [(4, 3)], [(-1, 3)], [(0, 101)], [(0, 5), (4, 6)], [(5, 6), (0, 1)]])
def test_runs_that_overlap_or_leave_the_bitmap_are_refused(runs: list[tuple[int, int]]) -> None:  # D1
    starts, ends = np.array(runs, np.int64).T

    with pytest.raises(UsageError, match="not ascending runs of 100"):
        PageBitmap.from_runs(100, starts, ends)


@pytest.mark.parametrize("bits", [set(), set(range(200)), set(range(0, 200, 3)), {63, 64, 127, 128, 199}])
def test_every_alignment_of_a_range_agrees_with_the_oracle(bits: set[int]) -> None:  # W4
    source = to_words([bit for bit in range(200) if bit % 5 < 3], 200)
    for first, count in RANGES:
        bitmap, oracle = filled(200, bits)
        assert bitmap.count(first, count) == oracle.count(first, count)
        assert bitmap.any(first, count) == bool(oracle.count(first, count))
        assert bitmap.runs(first, count).tolist() == oracle.runs(first, count)
        assert bitmap.extract(first, count).tolist() == oracle.extract(first, count)
        assert bitmap.indices(first, count).tolist() == oracle.indices(first, count)
        for change in ("set", "clear"):
            bitmap, oracle = filled(200, bits)
            getattr(bitmap, change)(first, count)
            getattr(oracle, change)(first, count)
            assert to_bits(bitmap.words) == oracle.bits
        bitmap, oracle = filled(200, bits)
        words = source[: (count + 63) // 64].copy()
        assert bitmap.merge(words, first, count) == oracle.merge(words, first, count)
        assert to_bits(bitmap.words) == oracle.bits


@pytest.mark.parametrize("bits", [set(), set(range(200)), {0}, {63, 64, 127, 128, 199}, {70}, {199}])
def test_search_from_every_page_agrees_with_the_oracle(bits: set[int]) -> None:  # W4
    bitmap, oracle = filled(200, bits)
    assert [bitmap.find(first) for first in range(201)] == [oracle.find(first) for first in range(201)]


@given(pages=st.integers(0, 260), bits=some_bits, some=some_bits)
def test_pages_one_by_one_agree_with_the_oracle(pages: int, bits: set[int], some: set[int]) -> None:  # W1
    bitmap, oracle = filled(pages, bits)
    numbers = np.array(sorted(page for page in some if page < pages), np.int64)

    assert bitmap.test_each(numbers).tolist() == oracle.test_each(numbers.tolist())
    assert to_bits(bitmap.words) == oracle.bits

    bitmap.clear_each(numbers)
    oracle.clear_each(numbers.tolist())
    assert to_bits(bitmap.words) == oracle.bits


def test_page_named_twice_is_cleared_once() -> None:
    bitmap, _ = filled(200, {3, 4, 70})
    bitmap.clear_each(np.array([70, 3, 3], np.int64))
    assert to_bits(bitmap.words) == {4}


def test_search_past_the_end_is_refused() -> None:
    with pytest.raises(UsageError, match="not in a bitmap of 200"):
        PageBitmap(200).find(201)


class Twins:
    """A bitmap and its oracle, given the same operations."""

    def __init__(self, pages: int) -> None:
        self.fast = PageBitmap(pages)
        self.slow = SetBitmap(pages)

    def set(self, first: int, count: int, data: st.DataObject) -> None:
        self.fast.set(first, count)
        self.slow.set(first, count)

    def clear(self, first: int, count: int, data: st.DataObject) -> None:
        self.fast.clear(first, count)
        self.slow.clear(first, count)

    def merge(self, first: int, count: int, data: st.DataObject) -> None:
        # Bits past the count are there on purpose, within the last word.
        words = to_words(data.draw(st.sets(st.integers(0, (count + 63) // 64 * 64 - 1))) if count else (), count)
        given_words = words.copy()
        assert self.fast.merge(words, first, count) == self.slow.merge(words, first, count)
        assert np.array_equal(words, given_words)

    def fetch_and_clear(self, first: int, count: int, data: st.DataObject) -> None:
        assert self.fast.fetch_and_clear(first, count).tolist() == self.slow.extract(first, count)
        self.slow.clear(first, count)

    def look(self, first: int, count: int, data: st.DataObject) -> None:
        assert self.fast.count(first, count) == self.slow.count(first, count)
        assert self.fast.any(first, count) == bool(self.slow.count(first, count))
        assert self.fast.runs(first, count).tolist() == self.slow.runs(first, count)
        assert self.fast.extract(first, count).tolist() == self.slow.extract(first, count)
        assert self.fast.indices(first, count).tolist() == self.slow.indices(first, count)
        assert self.fast.find(first) == self.slow.find(first)
        if count:
            assert self.fast.test(first) == (first in self.slow.bits)


OPERATIONS: list[Callable[[Twins, int, int, st.DataObject], None]] = [
    Twins.set,
    Twins.clear,
    Twins.merge,
    Twins.fetch_and_clear,
    Twins.look,
]


@settings(deadline=None)
@given(pages=st.integers(0, 260), data=st.data())
def test_any_sequence_of_operations_agrees_with_the_oracle(pages: int, data: st.DataObject) -> None:
    twins = Twins(pages)
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=12)):
        first = data.draw(st.integers(0, pages))
        operation(twins, first, data.draw(st.integers(0, pages - first)), data)

        assert to_bits(twins.fast.words) == twins.slow.bits  # D9: no bit past the end either


@given(pages=st.integers(0, 260), bits=some_bits)
def test_ranges_default_to_everything(pages: int, bits: set[int]) -> None:
    bitmap, oracle = filled(pages, bits)

    assert bitmap.count() == len(oracle.bits)
    assert bitmap.runs().tolist() == oracle.runs()
    assert bitmap.extract().tolist() == oracle.extract()
    assert bitmap.indices().tolist() == oracle.indices()
    assert bitmap.merge(to_words(range(pages), pages)) == pages - len(oracle.bits)
    assert to_bits(bitmap.fetch_and_clear()) == set(range(pages))
    assert not bitmap.any()


def test_copy_is_independent_and_equal() -> None:
    bitmap, _ = filled(100, {1, 99})
    twin = bitmap.copy()

    assert twin == bitmap
    twin.clear(1, 1)
    assert twin != bitmap
    assert bitmap.test(1)


def test_bitmaps_of_other_lengths_differ_even_if_empty() -> None:
    assert PageBitmap(63) != PageBitmap(64)
    assert PageBitmap(63) != 63


def test_bitmap_has_no_hash() -> None:
    with pytest.raises(TypeError):
        hash(PageBitmap(1))


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 201), (200, 1), (201, 0), (201, None), (5, -1), (199, 2)])
@pytest.mark.parametrize("method", ["set", "clear", "any", "count", "runs", "extract", "indices", "fetch_and_clear"])
def test_range_outside_is_refused(method: str, first: int, count: int | None) -> None:
    bitmap, _ = filled(200, {0, 199})
    with pytest.raises(UsageError, match="not in a bitmap of 200"):
        getattr(bitmap, method)(first, count)
    assert to_bits(bitmap.words) == {0, 199}


@pytest.mark.parametrize(("first", "count", "words"), [(0, 200, 3), (0, 200, 5), (0, 64, 2), (10, 65, 1), (0, 0, 1)])
def test_words_of_the_wrong_length_are_refused(first: int, count: int, words: int) -> None:
    with pytest.raises(UsageError, match="do not cover"):
        PageBitmap(200).merge(np.zeros(words, np.uint64), first, count)


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        (64, np.zeros(2, np.uint64)),
        (65, np.zeros(1, np.uint64)),
        (0, np.zeros(1, np.uint64)),
        (64, np.zeros(1, np.int64)),
        (64, np.zeros((1, 1), np.uint64)),
    ],
)
def test_words_that_are_not_such_a_bitmap_are_refused(pages: int, words: npt.NDArray[np.generic]) -> None:
    with pytest.raises(UsageError, match="are not a bitmap"):
        PageBitmap(pages, cast("Words", words))


def test_negative_length_is_refused() -> None:
    with pytest.raises(UsageError, match="bitmap of -1 pages"):
        PageBitmap(-1)


# QEMU's tests of its bitmaps, tests/unit/test-bitmap.c, as values.
@pytest.mark.parametrize("k", range(65))
def test_qemu_vectors_of_bitmap_set(k: int) -> None:
    def runs_of(first: int, count: int) -> list[list[int]]:
        bitmap = PageBitmap(320)
        bitmap.set(first, count)
        runs: list[list[int]] = bitmap.runs().tolist()
        return runs

    assert runs_of(64 + k, 1) == [[64 + k, 1]]
    assert runs_of(64, 128) == [[64, 128]]
    assert runs_of(64 - k, 128 + k) == [[64 - k, 128 + k]]
    assert runs_of(64, 128 + k) == [[64, 128 + k]]


def test_qemu_vectors_of_copies_with_an_offset() -> None:
    source, _ = filled(1024, set(range(100, 245)))

    down = PageBitmap(1024)
    down.merge(source.extract(40, 250), 0, 250)
    assert down.runs().tolist() == [[60, 145]]

    up = PageBitmap(1024)
    up.merge(source.extract(0, 250), 35, 250)
    assert up.runs().tolist() == [[135, 145]]


@given(words=st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4))
def test_qemu_vector_of_a_round_trip_through_odd_offsets(words: list[int]) -> None:
    original = np.array(words, np.uint64)
    once, twice = PageBitmap(1024), PageBitmap(1024)
    once.merge(original, 115, 256)
    twice.merge(once.extract(0, 371), 85, 371)

    assert twice.extract(200, 256).tolist() == words

import itertools
import pickle
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import to_words
from support.watches import Array, pages, write

from dirtylog.memory import PageBitmap
from dirtylog.trackers.watch import Written, watch, zeros
from dirtylog.units import PAGE_SIZE


class Oracle:
    """`Written` from loops over pages, bytes and rows."""

    def __init__(self, dirty: set[int], size: int, stride: int) -> None:
        self.byte_ranges: list[tuple[int, int]] = []
        for page in sorted(dirty):
            start, end = page * PAGE_SIZE, min((page + 1) * PAGE_SIZE, size)
            if self.byte_ranges and self.byte_ranges[-1][1] == start:
                start = self.byte_ranges.pop()[0]
            self.byte_ranges.append((start, end))
        self.slices: list[slice] = []
        rows = [
            row
            for row in range(size // stride)
            if any(start < (row + 1) * stride and row * stride < end for start, end in self.byte_ranges)
        ]
        for row in rows:
            if self.slices and self.slices[-1].stop == row:
                self.slices[-1] = slice(self.slices[-1].start, row + 1)
            else:
                self.slices.append(slice(row, row + 1))


@st.composite
def reports(draw: st.DrawFn) -> tuple[set[int], int, int]:
    """Dirty pages, a size and a stride, of an array of rows."""
    stride = draw(st.one_of(st.sampled_from([1024, 4095, 4096, 4097, 8192, 10_000, 20_480]), st.integers(500, 30_000)))
    size = stride * draw(st.integers(1, max(1, 300_000 // stride)))
    return draw(st.sets(st.integers(0, -(-size // PAGE_SIZE) - 1))), size, stride


@given(reports())
def test_report_is_what_loops_find(report: tuple[set[int], int, int]) -> None:
    dirty, size, stride = report
    count = -(-size // PAGE_SIZE)
    written = Written(PageBitmap(count, to_words(dirty, count)), size, stride)
    expected = Oracle(dirty, size, stride)
    assert written.byte_ranges() == expected.byte_ranges
    assert written.slices() == expected.slices
    assert bool(written) == bool(dirty)
    assert pages(written) == sorted(dirty)
    assert [list(range(first, first + length)) for first, length in written.runs().tolist()] == [
        list(range(start // PAGE_SIZE, -(-end // PAGE_SIZE))) for start, end in expected.byte_ranges
    ]


@given(
    shape=st.sampled_from([(5000,), (70, 70), (7, 11, 13), (1, 3000), (4, 512, 2), (2, 4097)]),
    dtype=st.sampled_from(["u1", "u2", "f8", "c16", "S3", [("a", "u1"), ("b", "f8")]]),
    data=st.data(),
)
def test_slices_have_every_element_that_was_written(shape: tuple[int, ...], dtype: Any, data: st.DataObject) -> None:
    array = zeros(shape, dtype)
    before = array.copy()
    elements = data.draw(st.lists(st.integers(0, array.size - 1), max_size=5))
    raw = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    with watch(array, "comparison") as watched:
        raw[elements] = 1
        found = watched.harvest().slices()
    for piece in found:
        before[piece] = array[piece]
    assert before.tobytes() == array.tobytes()
    assert all(left.stop < right.start for left, right in itertools.pairwise(found))
    assert all(0 <= piece.start < piece.stop <= shape[0] for piece in found)


def test_report_pickles_and_shows_itself(array: Array) -> None:
    with watch(array, "comparison") as watched:
        write(array, 1, 5)
        written = watched.harvest()
    assert repr(written) == "<Written: 2 of 100 pages>"
    again = pickle.loads(pickle.dumps(written))  # noqa: S301 - our own
    assert (again.pages, again.size, again.stride) == (written.pages, written.size, written.stride)


def test_report_stays_what_it_was(tracker: str, array: Array) -> None:
    with watch(array, tracker) as watched:
        write(array, 1)
        written = watched.collect()
        watched.clear()
        write(array, 2)
        watched.collect()
        assert pages(written) == [1]

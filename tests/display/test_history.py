from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.closed_form import distinct_pages
from support.oracles import to_words

from dirtylog.display import Sample, WriteHistory
from dirtylog.errors import UsageError
from dirtylog.memory import PageBitmap
from dirtylog.units import PAGE_SIZE

PAGES: Final = 200


def sample(end: float, seconds: float, pages: Sequence[int], count: int = PAGES) -> Sample:
    return Sample(end, seconds, {"ram": PageBitmap(count, to_words(pages, count))})


def each_second(*written: Sequence[int]) -> WriteHistory:
    history = WriteHistory({"ram": PAGES})
    for second, pages in enumerate(written, 1):
        history.add(sample(second, 1.0, pages))
    return history


@given(
    written=st.lists(st.sets(st.integers(0, PAGES - 1), max_size=30), max_size=8),
    window=st.integers(1, 10),
    cell_pages=st.sampled_from([1, 2, 32, 64, 128, 256]),
)
def test_working_set_and_cells_agree_with_sets_of_pages(written: list[set[int]], window: int, cell_pages: int) -> None:
    history = each_second(*map(sorted, written))
    lately = set().union(*written[-window:])
    ever = set().union(*written)

    assert history.working_set(window).pages == len(lately)
    assert history.ever == len(ever)
    assert history.count_cells("ram", cell_pages, [window]).tolist() == [
        [len(pages & set(range(first, first + cell_pages))) for pages in (lately, ever)]
        for first in range(0, PAGES, cell_pages)
    ]


def test_more_samples_than_there_was_room_for_are_kept() -> None:
    history = each_second(*([page] for page in range(150)))
    assert [history.working_set(window).pages for window in (1, 60, 100, 1000)] == [1, 60, 100, 150]


def test_nothing_is_known_before_the_first_sample() -> None:
    history = WriteHistory({"ram": PAGES})
    working_set = history.working_set(10)
    assert (working_set.seconds, working_set.pages, history.ever) == (0.0, 0, 0)
    assert not history.count_cells("ram", 64, [1]).any()


def test_window_is_filled_with_what_there_is() -> None:
    working_set = each_second([1], [2]).working_set(60)
    assert (working_set.window, working_set.seconds, working_set.pages) == (60, 2.0, 2)


def test_window_shorter_than_the_interval_is_the_last_sample() -> None:
    history = WriteHistory({"ram": PAGES})
    for end in (5, 10):
        history.add(sample(end, 5, [end]))
    working_set = history.working_set(1)
    assert (working_set.seconds, working_set.pages) == (5, 1)


def test_samples_that_are_a_little_late_fill_as_many_windows() -> None:
    history = WriteHistory({"ram": PAGES})
    end = 0.0
    for page in range(40):
        length = 1.004 if page % 3 else 0.998
        end += length
        history.add(sample(end, length, [page]))
    assert [history.working_set(window).pages for window in (1, 10, 30)] == [1, 10, 30]


@pytest.mark.parametrize("cell_pages", [1, 64, 1 << 17, 1 << 18, 1 << 19, 1 << 20])
def test_cells_of_a_large_block_are_counted_wherever_it_was_written(cell_pages: int) -> None:
    pages, written = (5 << 18) + 7, [0, 1 << 17, (3 << 18) - 1, 5 << 18, (5 << 18) + 6]
    bitmap = PageBitmap(pages)
    for page in written:
        bitmap.set(page, 1)
    history = WriteHistory({"ram": pages})
    history.add(Sample(1.0, 1.0, {"ram": bitmap}))

    counts = history.count_cells("ram", cell_pages, [1])

    assert counts.shape == (-(-pages // cell_pages), 2)
    assert {cell: int(counts[cell, 0]) for cell in np.flatnonzero(counts[:, 0]).tolist()} == {
        cell: sum(page // cell_pages == cell for page in written) for cell in {page // cell_pages for page in written}
    }
    assert (counts[:, 0] == counts[:, 1]).all()


def test_blocks_are_told_apart() -> None:
    history = WriteHistory({"a": 70, "b": 3})
    history.add(Sample(1.0, 1.0, {"a": PageBitmap(70, to_words([69], 70)), "b": PageBitmap(3, to_words([0, 2], 3))}))
    assert history.working_set(1).pages == 3
    assert history.count_cells("a", 64, [1]).tolist() == [[0, 0], [1, 1]]
    assert history.count_cells("b", 1, [1]).tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("blocks", [{}, {"ram": PAGES + 1}, {"rom": PAGES}, {"ram": PAGES, "rom": 1}])
def test_sample_of_other_memory_is_refused(blocks: dict[str, int]) -> None:
    other = Sample(1.0, 1.0, {name: PageBitmap(pages) for name, pages in blocks.items()})
    with pytest.raises(UsageError, match="not of the memory"):
        WriteHistory({"ram": PAGES}).add(other)


@pytest.mark.parametrize("writes_per_second", [1_000, 20_000, 200_000])
def test_rate_of_a_random_writer_follows_the_closed_form(writes_per_second: int) -> None:
    pages, seconds = 16_384, 2.0
    writes = int(writes_per_second * seconds)
    numbers = np.random.default_rng(7).integers(0, pages, writes)
    bitmap = PageBitmap(pages)
    bitmap.merge(np.packbits(np.bincount(numbers, minlength=pages) > 0, bitorder="little").view(np.uint64))
    size = pages * PAGE_SIZE

    rate = Sample(seconds, seconds, {"ram": bitmap}).rate * PAGE_SIZE

    closed_form = size * (1 - (1 - PAGE_SIZE / size) ** (seconds * writes_per_second)) / seconds
    assert distinct_pages(pages, writes).mean * PAGE_SIZE / seconds == pytest.approx(closed_form)
    assert abs(rate - closed_form) <= 5 * distinct_pages(pages, writes).deviation * PAGE_SIZE / seconds

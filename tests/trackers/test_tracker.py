import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.trackers import clear_window


@pytest.mark.parametrize(
    ("pages", "start", "size", "window"),
    [
        # pages of a slot; start and size of the clear; first page, count and skip of what the kernel is asked for
        (1000, 70, 10, (64, 64, 6)),
        (1000, 960, 40, (960, 40, 0)),
        (1000, 0, 65, (0, 128, 0)),
        (1000, 900, 100, (896, 104, 4)),
        (100, 0, 100, (0, 100, 0)),
        (100, 70, 30, (64, 36, 6)),
        (1000, 63, 2, (0, 128, 63)),
        (1000, 64, 64, (64, 64, 0)),
        (1, 0, 1, (0, 1, 0)),
        (64, 63, 1, (0, 64, 63)),
        (65, 64, 1, (64, 1, 0)),
    ],
)
def test_window_is_the_whole_words_around_a_range(
    pages: int, start: int, size: int, window: tuple[int, int, int]
) -> None:  # W2
    assert clear_window(pages, start, size) == window


@given(pages=st.integers(1, 400), data=st.data())
def test_window_is_the_smallest_that_the_kernel_takes(pages: int, data: st.DataObject) -> None:  # W2
    start = data.draw(st.integers(0, pages - 1))
    size = data.draw(st.integers(1, pages - start))

    first, length, skip = clear_window(pages, start, size)

    acceptable = [
        (low, high - low)
        for low in range(0, start + 1, 64)
        for high in range(start + size, pages + 1)
        if (high - low) % 64 == 0 or high == pages
    ]
    assert (first, length) == min(acceptable, key=lambda window: window[1])
    assert first + skip == start

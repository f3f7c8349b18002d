"""The model must notice what it is there to notice, or the tests that lean on it prove nothing."""

import numpy as np
import pytest
from support.oracles import to_bits, to_words

from dirtylog.testing import ContractError, ModelTracker


def armed(pages: int = 100, *, clears_on_collect: bool = False) -> ModelTracker:
    tracker = ModelTracker(pages, clears_on_collect=clears_on_collect)
    tracker.arm()
    return tracker


def collect(tracker: ModelTracker) -> set[int]:
    words = to_words((), tracker.pages)
    tracker.collect(words)
    return {page for page in to_bits(words) if page < tracker.pages}


@pytest.mark.parametrize("clears_on_collect", [False, True])
def test_written_pages_are_collected(clears_on_collect: bool) -> None:  # D1 D5
    tracker = armed(clears_on_collect=clears_on_collect)
    tracker.write(99)
    tracker.write(3)

    assert collect(tracker) == {3, 99}
    assert collect(tracker) == (set() if clears_on_collect else {3, 99})


def test_bits_past_the_end_are_anything_but_zero() -> None:
    tracker, words = armed(), to_words((), 100)
    tracker.collect(words)
    assert to_bits(words) == set(range(100, 128))


def test_log_that_starts_all_set_starts_with_every_page() -> None:
    tracker = ModelTracker(100, starts_all_set=True)
    tracker.arm()
    assert collect(tracker) == set(range(100))


def test_clear_of_a_page_that_was_never_collected_is_noticed() -> None:  # D2
    tracker = armed()
    tracker.write(70)
    with pytest.raises(ContractError, match="page 70 cleared, which is WRITTEN"):
        tracker.clear(64, 36, to_words([6], 36))


def test_second_clear_is_noticed() -> None:  # D2
    tracker = armed()
    tracker.write(70)
    collect(tracker)
    tracker.clear(64, 36, to_words([6], 36))
    with pytest.raises(ContractError, match="PROTECTED"):
        tracker.clear(64, 36, to_words([6], 36))


@pytest.mark.parametrize(("first", "count"), [(1, 64), (0, 63), (64, 35), (64, 64), (0, 0), (0, 101)])
def test_window_that_the_kernel_does_not_take_is_noticed(first: int, count: int) -> None:  # W2
    with pytest.raises(ContractError, match="does not take"):
        armed().clear(first, count, to_words((), count))


def test_bit_past_the_window_is_noticed() -> None:  # D9
    with pytest.raises(ContractError, match="past the window's end"):
        armed().clear(64, 36, to_words([36], 37))


def test_words_of_another_length_are_noticed() -> None:
    tracker = armed()
    with pytest.raises(ContractError, match="words for"):
        tracker.collect(np.zeros(1, np.uint64))
    with pytest.raises(ContractError, match="words for"):
        tracker.clear(0, 64, np.zeros(2, np.uint64))


def test_clear_does_nothing_where_collecting_clears() -> None:  # D5
    tracker = armed(clears_on_collect=True)
    tracker.write(3)
    collect(tracker)
    tracker.write(3)

    tracker.clear(0, 64, to_words([3], 64))

    assert collect(tracker) == {3}


def test_calls_out_of_order_are_noticed() -> None:
    tracker = armed()
    with pytest.raises(ContractError, match="armed twice"):
        tracker.arm()
    tracker.disarm()
    for call in (tracker.disarm, lambda: collect(tracker), lambda: tracker.clear(0, 64, to_words((), 64))):
        with pytest.raises(ContractError, match="not armed"):
            call()

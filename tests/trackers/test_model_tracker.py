"""The model must notice what it is there to notice, or the tests that lean on it prove nothing."""

import numpy as np
import pytest
from support.model_tracker import ContractError, ModelTracker
from support.oracles import to_bits, to_words

from dirtylog.trackers import KVMLogMode

MODES = list(KVMLogMode)
SPLIT = [mode for mode in MODES if not mode.clears_on_collect]


def armed(mode: KVMLogMode, pages: int = 100) -> ModelTracker:
    tracker = ModelTracker(mode, pages)
    tracker.arm()
    if mode is KVMLogMode.INITIALLY_SET:
        collect(tracker)
        tracker.clear(0, pages, to_words(range(pages), pages))
    return tracker


def collect(tracker: ModelTracker) -> set[int]:
    words = to_words((), tracker.pages)
    tracker.collect(words)
    return {page for page in to_bits(words) if page < tracker.pages}


@pytest.mark.parametrize("mode", MODES)
def test_written_pages_are_collected(mode: KVMLogMode) -> None:  # D1
    tracker = armed(mode)
    tracker.write(99)
    tracker.write(3)

    assert collect(tracker) == {3, 99}
    assert collect(tracker) == (set() if mode.clears_on_collect else {3, 99})


def test_bits_past_the_end_are_anything_but_zero() -> None:
    tracker, words = armed(KVMLogMode.MANUAL), to_words((), 100)
    tracker.collect(words)
    assert to_bits(words) == set(range(100, 128))


def test_initially_set_log_starts_with_every_page() -> None:
    tracker = ModelTracker(KVMLogMode.INITIALLY_SET, 100)
    tracker.arm()
    assert collect(tracker) == set(range(100))


@pytest.mark.parametrize("mode", SPLIT)
def test_clear_of_a_page_that_was_never_collected_is_noticed(mode: KVMLogMode) -> None:  # D2
    tracker = armed(mode)
    tracker.write(70)
    with pytest.raises(ContractError, match="page 70 cleared, which is WRITTEN"):
        tracker.clear(64, 36, to_words([6], 36))


@pytest.mark.parametrize("mode", SPLIT)
def test_second_clear_is_noticed(mode: KVMLogMode) -> None:  # D2
    tracker = armed(mode)
    tracker.write(70)
    collect(tracker)
    tracker.clear(64, 36, to_words([6], 36))
    with pytest.raises(ContractError, match="PROTECTED"):
        tracker.clear(64, 36, to_words([6], 36))


@pytest.mark.parametrize(("first", "count"), [(1, 64), (0, 63), (64, 35), (64, 64), (0, 0), (0, 101)])
def test_window_that_the_kernel_does_not_take_is_noticed(first: int, count: int) -> None:  # W2
    with pytest.raises(ContractError, match="does not take"):
        armed(KVMLogMode.MANUAL).clear(first, count, to_words((), count))


def test_bit_past_the_window_is_noticed() -> None:  # D9
    with pytest.raises(ContractError, match="past the window's end"):
        armed(KVMLogMode.MANUAL).clear(64, 36, to_words([36], 37))


def test_words_of_another_length_are_noticed() -> None:
    tracker = armed(KVMLogMode.MANUAL)
    with pytest.raises(ContractError, match="words for"):
        tracker.collect(np.zeros(1, np.uint64))
    with pytest.raises(ContractError, match="words for"):
        tracker.clear(0, 64, np.zeros(2, np.uint64))


def test_clear_of_a_log_that_collecting_clears_is_noticed() -> None:  # D5
    with pytest.raises(ContractError, match="collecting clears"):
        armed(KVMLogMode.LEGACY).clear(0, 64, to_words((), 64))


def test_calls_out_of_order_are_noticed() -> None:
    tracker = armed(KVMLogMode.MANUAL)
    with pytest.raises(ContractError, match="armed twice"):
        tracker.arm()
    tracker.disarm()
    for call in (tracker.disarm, lambda: collect(tracker), lambda: tracker.clear(0, 64, to_words((), 64))):
        with pytest.raises(ContractError, match="not armed"):
            call()

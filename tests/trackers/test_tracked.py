from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_tracker import ModelTracker
from support.oracles import to_bits

from dirtylog.errors import KernelError
from dirtylog.memory import Words
from dirtylog.trackers import KVMLogMode, TrackedRange

PAGES = 200

pages = st.integers(0, PAGES - 1)
ranges = st.tuples(st.integers(-10, PAGES + 10), st.integers(-5, PAGES + 20))


class Failing(ModelTracker):
    """Clears the first half of what it is told to, and fails, once."""

    failed = False

    def clear(self, first: int, count: int, words: Words) -> None:
        if self.failed:
            super().clear(first, count, words)
            return
        self.failed = True
        half = words.copy()
        half[len(half) // 2 :] = 0
        super().clear(first, count, half)
        raise KernelError("clear", 12, "no memory")


def tracked(make: Callable[[KVMLogMode, int], ModelTracker] = ModelTracker) -> TrackedRange[ModelTracker]:
    found = TrackedRange(make(KVMLogMode.MANUAL, PAGES))
    found.arm()
    return found


# The model raises if a page is cleared that was not collected, or was cleared since, and if the words are not what KVM
# takes: D2, D9, W2.
@given(st.lists(st.one_of(pages, ranges, st.none())))
def test_what_was_written_is_reported_until_it_is_cleared(steps: list[int | tuple[int, int] | None]) -> None:  # D1 D2
    subject = tracked()
    written: set[int] = set()
    collected: set[int] = set()
    for step in steps:
        if isinstance(step, int):
            subject.tracker.write(step)
            written.add(step)
        elif step is None:
            assert to_bits(subject.collect().words) == written
            collected = set(written)
        else:
            first, count = step
            subject.clear(first, count)
            written -= collected & set(range(first, first + count))
            collected -= set(range(first, first + count))
        assert to_bits(subject.collected.words) == collected
    assert to_bits(subject.collect().words) == written


def test_bits_past_the_end_are_dropped() -> None:  # D9
    subject = tracked()
    subject.tracker.write(PAGES - 1)  # the model reports all past the end with it
    assert to_bits(subject.collect().words) == {PAGES - 1}
    assert subject.collect().pages == subject.pages == PAGES


def test_clear_that_fails_half_way_names_no_page_twice() -> None:  # D2
    subject = tracked(Failing)
    for page in (1, 190):
        subject.tracker.write(page)
    subject.collect()
    with pytest.raises(KernelError):
        subject.clear(0, PAGES)
    subject.tracker.write(1)

    subject.clear(0, PAGES)  # the model fails if page 1 is named

    assert to_bits(subject.collect().words) == {1, 190}


def test_arming_forgets_what_was_collected() -> None:
    subject = tracked()
    subject.tracker.write(3)
    subject.collect()
    subject.disarm()
    subject.arm()
    assert not subject.collected.any()
    assert not subject.collect().any()


def test_disarming_twice_is_once_and_clearing_after_it_nothing() -> None:
    subject = tracked()
    subject.tracker.write(3)
    subject.collect()
    subject.disarm()
    subject.disarm()
    subject.clear(0, PAGES)
    assert not subject.armed


def test_arming_that_fails_leaves_it_disarmed() -> None:
    class Refusing(ModelTracker):
        def arm(self) -> None:
            raise KernelError("arm", 12, "no memory")

    subject = TrackedRange(Refusing(KVMLogMode.MANUAL, PAGES))
    with pytest.raises(KernelError):
        subject.arm()
    assert not subject.armed
    subject.disarm()


def test_report_is_the_callers_to_keep() -> None:
    subject = tracked()
    subject.tracker.write(3)
    found = subject.collect()
    subject.clear(0, PAGES)
    assert found.indices().tolist() == [3]
    found.words[:] = ~np.uint64(0)
    assert not subject.collected.any()

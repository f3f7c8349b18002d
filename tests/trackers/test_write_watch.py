from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_tracker import ModelTracker
from support.oracles import to_bits, to_words
from support.own_memory import (
    PRIVATE,
    SHARED,
    Bytes,
    anonymous,
    as_array,
    huge_pages,
    nothing_left,
    require_write_watch,
)
from support.waiting import Task

from dirtylog.errors import AlreadyWatchedError, KernelError, UntrackableError, UsageError
from dirtylog.linux.write_watch import Regions, WriteWatch
from dirtylog.memory import PageBitmap
from dirtylog.trackers import KVMLogMode, TrackedRange
from dirtylog.trackers.write_watch import WriteWatchTracker
from dirtylog.units import HUGE_PAGE_SIZE, PAGE_SIZE, WORD_BITS

PAGES = 200
HUGE = HUGE_PAGE_SIZE // PAGE_SIZE

pages = st.integers(0, PAGES - 1)
ranges = pages.flatmap(lambda first: st.tuples(st.just(first), st.integers(1, PAGES - first)))

Steps = list[int | tuple[int, int] | None]


@pytest.fixture(autouse=True, scope="module")
def _supported() -> None:
    require_write_watch()


@pytest.fixture
def array() -> Bytes:
    return as_array(anonymous(PAGES))


def tracker_of(array: Bytes, *, initially_set: bool = False) -> WriteWatchTracker:
    return WriteWatchTracker(array.ctypes.data, array.size // PAGE_SIZE, initially_set=initially_set)


def armed(array: Bytes, *, initially_set: bool = False) -> TrackedRange[WriteWatchTracker]:
    tracked = TrackedRange(tracker_of(array, initially_set=initially_set))
    tracked.arm()
    return tracked


def write(array: Bytes, *numbers: int) -> None:
    for number in numbers:
        array[number * PAGE_SIZE] += 1


def collect(tracked: TrackedRange[WriteWatchTracker]) -> set[int]:
    return to_bits(tracked.collect().words)


@given(st.booleans(), st.lists(st.one_of(pages, pages, ranges, st.none()), max_size=60))
def test_agrees_with_the_model(initially_set: bool, steps: Steps) -> None:  # D1 D2
    array = as_array(anonymous(PAGES))
    mode = KVMLogMode.INITIALLY_SET if initially_set else KVMLogMode.MANUAL
    model = TrackedRange(ModelTracker(mode, PAGES))
    model.arm()
    tracked = armed(array, initially_set=initially_set)
    try:
        for step in [*steps, None]:
            if isinstance(step, int):
                write(array, step)
                model.tracker.write(step)
            elif step is None:
                assert tracked.collect() == model.collect()
            else:
                tracked.clear(*step)
                model.clear(*step)
    finally:
        tracked.disarm()


def test_scattered_pages_are_cleared_without_those_between(array: Bytes) -> None:  # D2 D9
    tracked = armed(array)
    write(array, 1, 70, 150, 199)
    assert collect(tracked) == {1, 70, 150, 199}
    write(array, 2, 71, 160)
    tracked.clear(70, 81)
    assert collect(tracked) == {1, 2, 71, 160, 199}
    tracked.clear(0, PAGES)
    assert collect(tracked) == set()
    write(array, 70, 160)
    assert collect(tracked) == {70, 160}
    tracked.disarm()


class _Interrupted(WriteWatch):
    """Fails after a scan that protected pages has been made."""

    def __init__(self, tracker: WriteWatchTracker, error: BaseException) -> None:
        watch = tracker._watch
        assert watch is not None
        self.__dict__ = watch.__dict__
        self._error = error

    def written(self, offset: int, size: int, *, protect: bool = False) -> Regions:
        found = super().written(offset, size, protect=protect)
        if protect:
            raise self._error
        return found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KernelError("PAGEMAP_SCAN", 12, "no memory")])
def test_clear_that_is_interrupted_loses_nothing(array: Bytes, error: BaseException) -> None:  # D1
    tracked = armed(array)
    write(array, 1, 150)
    tracked.collect()
    write(array, 70)
    whole = tracked.tracker._watch
    tracked.tracker._watch = _Interrupted(tracked.tracker, error)
    with pytest.raises(type(error)):
        tracked.clear(0, PAGES)
    tracked.tracker._watch = whole

    assert {1, 70, 150} <= collect(tracked)

    tracked.clear(0, PAGES)
    write(array, 3)
    assert collect(tracked) == {3}
    tracked.disarm()


def test_arming_that_is_interrupted_leaves_nothing(array: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, protect: bool = False) -> Regions:
        if protect:
            raise KeyboardInterrupt
        return np.zeros(1, [("start", "<u8")])

    monkeypatch.setattr(WriteWatch, "written", interrupt)
    with nothing_left(), pytest.raises(KeyboardInterrupt):
        tracker_of(array).arm()
    monkeypatch.undo()
    armed(array).disarm()


def test_every_page_is_reported_first_if_asked_for(array: Bytes) -> None:  # M3
    tracked = armed(array, initially_set=True)
    assert collect(tracked) == set(range(PAGES))
    tracked.clear(10, 100)
    assert collect(tracked) == set(range(PAGES)) - set(range(10, 110))
    write(array, 20)
    assert 20 in collect(tracked)
    tracked.disarm()


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_never_touched_page_of_hugetlbfs_is_reported_first_too(flags: int) -> None:
    with huge_pages(2, flags) as memory:
        array = as_array(memory)
        tracked = armed(array, initially_set=True)
        assert collect(tracked) == set(range(2 * HUGE))
        tracked.clear(0, 2 * HUGE)
        assert collect(tracked) == set()
        write(array, 3)
        assert collect(tracked) == set(range(HUGE))
        tracked.disarm()


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_clear_of_a_part_of_a_huge_page_neither_loses_nor_forgets_the_rest(flags: int) -> None:  # D1 D2 D9
    with huge_pages(2, flags) as memory:
        array = as_array(memory)
        array[:] = 1
        tracked = armed(array)
        write(array, 5)
        assert collect(tracked) == set(range(HUGE))
        tracked.clear(5, 1)
        assert collect(tracked) == set(range(HUGE)) - {5}
        write(array, 5)
        assert collect(tracked) == set(range(HUGE))
        tracked.clear(0, 2 * HUGE)
        assert collect(tracked) == set()
        write(array, HUGE + 100)
        assert collect(tracked) == set(range(HUGE, 2 * HUGE))
        tracked.disarm()


def test_writes_of_threads_are_never_lost(array: Bytes) -> None:  # D1 D3
    """Clear, then read: who copies what was reported ends with what is there, whatever is written meanwhile."""
    tracked = armed(array, initially_set=True)
    copy = np.zeros_like(array)

    def writer(seed: int) -> None:
        random = np.random.default_rng(seed)
        for page in random.integers(0, PAGES, 3000).tolist():
            array[page * PAGE_SIZE + seed] += 1

    def take() -> None:
        tracked.collect()
        first, end = sorted(random.integers(0, PAGES + 1, 2).tolist())
        taken = PageBitmap(end - first, tracked.collected.extract(first, end - first)).indices() + first
        tracked.clear(first, end - first)
        for page in taken.tolist():
            copy[page * PAGE_SIZE :][:PAGE_SIZE] = array[page * PAGE_SIZE :][:PAGE_SIZE]

    random = np.random.default_rng(0)
    tasks = [Task(partial(writer, seed)) for seed in (1, 2)]
    while any(task.running for task in tasks):
        take()
    for task in tasks:
        task.join()
    for page in tracked.collect().indices().tolist():
        copy[page * PAGE_SIZE :][:PAGE_SIZE] = array[page * PAGE_SIZE :][:PAGE_SIZE]
    assert np.array_equal(copy, array)
    tracked.disarm()


def test_tracker_that_is_not_armed_is_refused(array: Bytes) -> None:
    tracker = tracker_of(array)
    words = to_words([1], PAGES)
    for _ in range(2):
        with pytest.raises(UsageError, match="not armed"):
            tracker.collect(words)
        with pytest.raises(UsageError, match="not armed"):
            tracker.clear(0, PAGES, words)
        tracker.arm()
        tracker.disarm()
        tracker.disarm()


def test_arming_again_starts_anew(array: Bytes) -> None:
    tracked = armed(array)
    write(array, 1)
    tracked.disarm()
    write(array, 2)
    tracked.arm()
    assert collect(tracked) == set()
    tracked.disarm()


def test_second_tracker_is_refused_and_the_first_goes_on(array: Bytes) -> None:
    tracked = armed(array)
    other = tracker_of(array)
    with nothing_left(), pytest.raises(AlreadyWatchedError):
        other.arm()
    other.disarm()
    write(array, 1)
    assert collect(tracked) == {1}
    tracked.disarm()


def test_memory_of_no_kind_is_refused_when_it_is_armed() -> None:
    with nothing_left(), pytest.raises(UntrackableError):
        WriteWatchTracker(0, WORD_BITS).arm()

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_tracker import ModelTracker
from support.oracles import to_words
from support.own_memory import Unowned, as_array, mapped_file

from dirtylog.errors import HostError, LostMappingError, UsageError
from dirtylog.trackers import KVMLogMode, TrackedRange, Tracker
from dirtylog.trackers.comparison import Bytes, ComparisonTracker, CopyTracker, HashTracker
from dirtylog.units import PAGE_SIZE

SIZES = [1, PAGE_SIZE, PAGE_SIZE + 1, 64 * PAGE_SIZE, 70 * PAGE_SIZE - 1, 600 * PAGE_SIZE + 100]

Steps = list[int | tuple[int, int] | None]


@pytest.fixture(params=[CopyTracker, HashTracker])
def kind(request: pytest.FixtureRequest) -> type[ComparisonTracker]:
    chosen: type[ComparisonTracker] = request.param
    return chosen


def armed(kind: type[ComparisonTracker], memory: Bytes) -> TrackedRange[ComparisonTracker]:
    tracked = TrackedRange(kind(memory))
    tracked.arm()
    return tracked


def found(tracked: TrackedRange[ComparisonTracker]) -> list[int]:
    pages: list[int] = tracked.collect().indices().tolist()
    return pages


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, Steps]:
    """A size, and what happens: writes at an offset, clears of a range of pages, and collects."""
    size = draw(st.integers(1, 130 * PAGE_SIZE))
    pages = -(-size // PAGE_SIZE)
    write = st.integers(0, size - 1)
    clear = st.integers(0, pages - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, pages - first)))
    return size, draw(st.lists(st.one_of(write, clear, st.none()), max_size=30))


@given(histories())
def test_copies_hashes_and_the_model_agree(history: tuple[int, Steps]) -> None:  # D1 D2
    size, steps = history
    memory = np.zeros(size, np.uint8)
    model = ModelTracker(KVMLogMode.MANUAL, -(-size // PAGE_SIZE))
    subjects: list[TrackedRange[Tracker]] = [
        TrackedRange(tracker) for tracker in (CopyTracker(memory), HashTracker(memory), model)
    ]
    for tracked in subjects:
        tracked.arm()
    for step in steps:
        if isinstance(step, int):
            memory[step] += 1  # up to 30 times: never what it was
            model.write(step // PAGE_SIZE)
        elif step is None:
            copies, hashes, expected = (tracked.collect() for tracked in subjects)
            assert copies == hashes == expected
        else:
            for tracked in subjects:
                tracked.clear(*step)
    copies, hashes, expected = (tracked.collect() for tracked in subjects)
    assert copies == hashes == expected


@pytest.mark.parametrize("size", SIZES)
def test_any_byte_that_changes_is_found(kind: type[ComparisonTracker], size: int) -> None:
    memory = np.zeros(size, np.uint8)
    tracked = armed(kind, memory)
    assert found(tracked) == []
    for offset in {0, size // 2, size - 1}:
        memory[offset] = 1
        assert found(tracked) == [offset // PAGE_SIZE]
        tracked.clear(0, tracked.pages)
        assert found(tracked) == []


def test_page_that_changes_back_is_not_reported(kind: type[ComparisonTracker]) -> None:
    memory = np.zeros(4 * PAGE_SIZE, np.uint8)
    tracked = armed(kind, memory)
    memory[0] = 1
    assert found(tracked) == [0]
    memory[0] = 0
    memory[PAGE_SIZE] = 0
    assert found(tracked) == []


def test_what_was_written_since_the_collect_is_not_forgotten_with_a_clear(kind: type[ComparisonTracker]) -> None:  # D2
    memory = np.zeros(100 * PAGE_SIZE, np.uint8)
    tracked = armed(kind, memory)
    memory[0] = 1
    tracked.collect()
    memory[PAGE_SIZE] = 1
    memory[70 * PAGE_SIZE] = 1
    tracked.clear(0, 100)
    assert found(tracked) == [1, 70]


def test_clear_that_names_no_page_is_nothing(kind: type[ComparisonTracker]) -> None:
    memory = np.zeros(4 * PAGE_SIZE, np.uint8)
    tracker = kind(memory)
    tracker.arm()
    memory[0] = 1
    tracker.clear(0, 4, to_words([], 4))
    assert found(TrackedRange(tracker)) == [0]


def test_tracker_that_is_not_armed_is_refused(kind: type[ComparisonTracker]) -> None:
    tracker = kind(np.zeros(4 * PAGE_SIZE, np.uint8))
    words = to_words([], 4)
    for _ in range(2):
        with pytest.raises(UsageError, match="not armed"):
            tracker.collect(words)
        with pytest.raises(UsageError, match="not armed"):
            tracker.clear(0, 4, words)
        tracker.arm()
        tracker.disarm()


def test_arming_again_starts_from_what_is_there_then(kind: type[ComparisonTracker]) -> None:
    memory = np.zeros(4 * PAGE_SIZE, np.uint8)
    tracked = armed(kind, memory)
    tracked.disarm()
    memory[0] = 1
    tracked.arm()
    assert found(tracked) == []


def test_unmapped_memory_is_an_error_and_no_crash(kind: type[ComparisonTracker]) -> None:
    memory = Unowned(100)
    tracked = armed(kind, memory.array)
    memory.array[0] = 1
    tracked.collect()
    memory.unmap(50, 1)
    with pytest.raises(LostMappingError, match="was unmapped") as caught:
        tracked.collect()
    assert caught.value.remedy is not None
    with pytest.raises(LostMappingError):
        tracked.clear(0, 100)
    with pytest.raises(LostMappingError):
        armed(kind, memory.array)


def test_replaced_memory_is_compared_as_it_is(kind: type[ComparisonTracker]) -> None:
    memory = Unowned(4)
    memory.array[:] = 1
    tracked = armed(kind, memory.array)
    memory.replace(2, 1)
    assert found(tracked) == [2]


def test_file_that_was_cut_short_is_an_error_and_no_crash(kind: type[ComparisonTracker], tmp_path: Path) -> None:
    tracked = armed(kind, as_array(mapped_file(tmp_path, 8)))
    os.truncate(tmp_path / "mapped", 5 * PAGE_SIZE)
    with pytest.raises(LostMappingError, match="cut short"):
        tracked.collect()


def test_copy_that_does_not_fit_names_the_remedy() -> None:
    class Vast(np.ndarray):
        def copy(self, *_: object, **__: object) -> "Vast":
            raise MemoryError

    memory = np.zeros(PAGE_SIZE, np.uint8).view(Vast)
    with pytest.raises(HostError, match=r"a copy of 4\.0 KiB") as caught:
        CopyTracker(memory).arm()
    assert "hashes" in (caught.value.remedy or "")

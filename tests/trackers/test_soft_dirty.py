"""Several watchers, one log: against a model of the kernel's bits, and against the bits where there are any."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.forks import in_child, refused_with
from support.oracles import to_bits, to_words
from support.own_memory import SHARED, Bytes, Unowned, anonymous, as_array, nothing_left, require_soft_dirty
from support.waiting import Task

from dirtylog.errors import ForkedError, HostError, KernelError, LostMappingError, UsageError
from dirtylog.memory import Words
from dirtylog.trackers import TrackedRange
from dirtylog.trackers import soft_dirty as soft_dirty_module
from dirtylog.trackers.soft_dirty import Hold, SoftDirtyLog, SoftDirtyTracker, soft_dirty_log
from dirtylog.units import PAGE_SIZE, word_count

PAGES = 100


class Kernel:
    """The soft-dirty bits of a process: pages by address, cleared all at once.

    Attributes:
        before_clear: called between the reading of the bits and their clearing.
        gone: pages that are not mapped.
    """

    def __init__(self) -> None:
        self.dirty: set[int] = set()
        self.gone: set[int] = set()
        self.before_clear: Callable[[], None] = lambda: None

    def write(self, *pages: int) -> None:
        self.dirty |= set(pages)

    def clear(self) -> None:
        self.before_clear()
        self.dirty.clear()

    @contextmanager
    def pagemap(self) -> Iterator["Kernel"]:
        yield self

    def soft_dirty(self, address: int, pages: int) -> Words:
        first = address // PAGE_SIZE
        return to_words((page - first for page in self.dirty if first <= page < first + pages), pages)

    def is_mapped(self, address: int, size: int) -> bool:
        first = address // PAGE_SIZE
        return not any(first <= page < first + size // PAGE_SIZE for page in self.gone)


@contextmanager
def model() -> Iterator[Kernel]:
    """The kernel, replaced by a model, and a log that knows of nothing."""
    kernel = Kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_dirty_module, "has_soft_dirty", lambda: True)
        patch.setattr(soft_dirty_module, "Pagemap", kernel.pagemap)
        patch.setattr(soft_dirty_module, "clear_soft_dirty", kernel.clear)
        patch.setattr(soft_dirty_module, "is_mapped", kernel.is_mapped)
        patch.setattr(soft_dirty_module, "_LOGS", {})
        yield kernel


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with model() as kernel:
        yield kernel


def watching(first: int, pages: int = PAGES, hold: Hold | None = None) -> SoftDirtyTracker:
    address = first * PAGE_SIZE
    tracker = SoftDirtyTracker(address, pages) if hold is None else SoftDirtyTracker(address, pages, hold)
    tracker.arm()
    return tracker


def collect(tracker: SoftDirtyTracker) -> set[int]:
    words = np.zeros(word_count(tracker.pages), np.uint64)
    tracker.collect(words)
    return to_bits(words)


def test_collecting_clears_and_what_was_written_before_is_not_reported(kernel: Kernel) -> None:  # D5
    kernel.write(1)
    tracker = watching(0)
    assert collect(tracker) == set()
    kernel.write(1, 70, PAGES)
    assert collect(tracker) == {1, 70}
    assert collect(tracker) == set()
    tracker.clear(0, PAGES, to_words([1], PAGES))
    kernel.write(1)
    assert collect(tracker) == {1}


def test_watchers_lose_nothing_to_each_other(kernel: Kernel) -> None:  # D1 D4
    one, other, around = watching(0), watching(200), watching(50, 200)
    kernel.write(1, 60, 210, 260)
    assert collect(one) == {1, 60}
    kernel.write(61, 211)
    assert collect(other) == {10, 11, 60}
    assert collect(around) == {10, 11, 160, 161}
    assert collect(one) == {61}


def test_watcher_that_comes_or_goes_costs_the_others_nothing(kernel: Kernel) -> None:  # D1
    one = watching(0)
    kernel.write(1)
    other = watching(0)
    kernel.write(2)
    assert collect(other) == {2}
    other.disarm()
    kernel.write(3)
    assert collect(one) == {1, 2, 3}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 59)),
        st.tuples(st.sampled_from(["collect", "toggle"]), st.integers(0, 2)),
    ),
    max_size=60,
)


@given(steps)
def test_each_watcher_is_told_of_each_write_since_it_last_asked(history: list[tuple[str, int]]) -> None:  # D1
    ranges = [range(40), range(20, 60), range(30, 31)]
    expected: list[set[int] | None] = [None, None, None]
    with model() as kernel:
        trackers = [SoftDirtyTracker(pages.start * PAGE_SIZE, len(pages)) for pages in ranges]
        for action, number in [*history, *(("collect", number) for number in range(3))]:
            if action == "write":
                kernel.write(number)
                for pages, waiting in zip(ranges, expected, strict=True):
                    if waiting is not None and number in pages:
                        waiting.add(number - pages.start)
                continue
            waiting, tracker = expected[number], trackers[number]
            if waiting is None:
                if action == "toggle":
                    tracker.arm()
                    expected[number] = set()
            elif action == "toggle":
                tracker.disarm()
                expected[number] = None
            else:
                assert collect(tracker) == waiting
                waiting.clear()


def test_writers_of_all_watchers_are_held_while_the_bits_are_read_and_cleared(kernel: Kernel) -> None:  # D1
    held: set[str] = set()

    def holds(name: str) -> Hold:
        @contextmanager
        def hold() -> Iterator[None]:
            held.add(name)
            yield
            held.remove(name)

        return hold

    seen: list[set[str]] = []
    kernel.before_clear = lambda: seen.append(set(held))
    one = watching(0, hold=holds("one"))
    watching(200, hold=holds("other"))
    collect(one)
    assert seen == [{"one"}, {"one", "other"}, {"one", "other"}]
    assert held == set()


def test_writers_that_cannot_be_held_cost_nothing(kernel: Kernel) -> None:  # D1
    refusing = False

    @contextmanager
    def hold() -> Iterator[None]:
        if refusing:
            raise HostError("a vCPU did not leave the guest")
        yield

    tracker = watching(0, hold=hold)
    kernel.write(1)
    refusing = True
    with pytest.raises(HostError):
        collect(tracker)
    refusing = False
    assert collect(tracker) == {1}


def test_bits_that_cannot_be_cleared_cost_nothing(kernel: Kernel) -> None:  # D1
    def refuse() -> None:
        raise KernelError("write to clear_refs", 12, "no memory")

    tracker = watching(0)
    kernel.write(1)
    kernel.before_clear = refuse
    with pytest.raises(KernelError):
        collect(tracker)
    kernel.before_clear = lambda: None
    kernel.dirty.clear()
    assert collect(tracker) == {1}


def test_memory_that_was_unmapped_is_lost_for_its_watcher_only(kernel: Kernel) -> None:
    one, other = watching(0), watching(200)
    kernel.write(1, 201)
    kernel.gone.add(5)
    for _ in range(2):
        with pytest.raises(LostMappingError) as caught:
            collect(one)
        assert caught.value.remedy is not None
    assert collect(other) == {1}
    kernel.gone.clear()
    assert collect(one) == {1}


def test_log_of_a_process_is_one_whoever_asks(kernel: Kernel) -> None:
    ready = threading.Barrier(4)
    logs: list[SoftDirtyLog] = []

    def ask() -> None:
        ready.wait(30)
        logs.append(soft_dirty_log())

    tasks = [Task(ask) for _ in range(4)]
    for task in tasks:
        task.join()
    assert len(set(map(id, logs))) == 1
    assert soft_dirty_log() is logs[0]


def test_child_has_a_log_of_its_own_and_is_refused_its_parents(kernel: Kernel) -> None:
    tracker = watching(0)
    log = soft_dirty_log()

    def childs() -> bool:
        kernel.write(3)
        own = watching(0)
        kernel.write(4)
        return (
            soft_dirty_log() is not log
            and refused_with(ForkedError, lambda: collect(tracker))
            and refused_with(ForkedError, lambda: log.watch(object(), 0, 1, threading.Lock))
            and collect(own) == {4}
        )

    kernel.write(1)
    assert in_child(childs)
    assert collect(tracker) == {1}


def test_child_leaves_its_parents_log_without_the_lock_that_nobody_gives_back(kernel: Kernel) -> None:
    tracker = watching(0)
    with soft_dirty_log()._lock:
        assert in_child(lambda: tracker.disarm() is None)  # type: ignore[func-returns-value]
    kernel.write(1)
    assert collect(tracker) == {1}


def test_watcher_may_go_while_the_log_is_being_read(kernel: Kernel) -> None:
    """As garbage collection may have it, in the same thread."""
    tracker, other = watching(0), watching(200)
    kernel.before_clear = other.disarm
    kernel.write(1, 201)
    assert collect(tracker) == {1}
    kernel.before_clear = lambda: None
    assert collect(tracker) == set()


def test_tracker_that_is_not_armed_is_refused(kernel: Kernel) -> None:
    tracker = SoftDirtyTracker(0, PAGES)
    for _ in range(2):
        with pytest.raises(UsageError, match="not armed"):
            collect(tracker)
        tracker.arm()
        tracker.disarm()
        tracker.disarm()


def test_kernel_without_the_bits_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_dirty_module, "_LOGS", {})
    monkeypatch.setattr(soft_dirty_module, "has_soft_dirty", lambda: False)
    with nothing_left(), pytest.raises(HostError, match="keeps no soft-dirty bits") as caught:
        SoftDirtyTracker(0, PAGES).arm()
    assert "CONFIG_MEM_SOFT_DIRTY" in (caught.value.remedy or "")


@pytest.fixture
def array() -> Bytes:
    """Memory that the kernel does not merge with its neighbours, so that it reports no more than was written."""
    require_soft_dirty()
    array = as_array(anonymous(PAGES, SHARED))
    array[::PAGE_SIZE] = 1
    return array


def armed(array: Bytes) -> TrackedRange[SoftDirtyTracker]:
    tracked = TrackedRange(SoftDirtyTracker(array.ctypes.data, array.size // PAGE_SIZE))
    tracked.arm()
    return tracked


def write(array: Bytes, *pages: int) -> None:
    for page in pages:
        array[page * PAGE_SIZE] += 1


def test_the_kernels_bits_tell_what_was_written(array: Bytes) -> None:  # D1 D5
    with nothing_left():
        tracked = armed(array)
        assert tracked.collect().indices().tolist() == []
        write(array, 0, 3, 4, 99)
        assert tracked.collect().indices().tolist() == [0, 3, 4, 99]
        assert tracked.collect().indices().tolist() == []
        write(array, 3)
        assert tracked.collect().indices().tolist() == [3]
        tracked.disarm()


def test_watchers_of_the_kernels_bits_lose_nothing_to_each_other(array: Bytes) -> None:  # D1 D4
    one, other = armed(array[: 60 * PAGE_SIZE]), armed(array[40 * PAGE_SIZE :])
    write(array, 1, 50, 90)
    assert one.collect().indices().tolist() == [1, 50]
    write(array, 51)
    assert other.collect().indices().tolist() == [10, 11, 50]
    assert one.collect().indices().tolist() == [51]
    one.disarm()
    other.disarm()


def test_private_memory_is_reported_at_least_where_it_was_written() -> None:  # D1
    require_soft_dirty()
    array = as_array(anonymous(PAGES))
    tracked = armed(array)
    write(array, 1, 50)
    assert {1, 50} <= to_bits(tracked.collect().words)
    write(array, 50)
    assert 50 in to_bits(tracked.collect().words)
    tracked.disarm()


def test_unmapped_memory_is_lost_and_replaced_memory_counts_as_written() -> None:
    require_soft_dirty()
    memory = Unowned(PAGES)
    tracked = armed(memory.array)
    memory.replace(3, 2)
    assert {3, 4} <= to_bits(tracked.collect().words)
    memory.unmap(5, 1)
    with pytest.raises(LostMappingError):
        tracked.collect()
    tracked.disarm()

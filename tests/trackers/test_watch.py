import copy
import gc
import mmap
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.forks import in_child, refused_with
from support.own_memory import (
    PRIVATE,
    SHARED,
    anonymous,
    as_array,
    huge_pages,
    mapped_file,
    nothing_left,
    require_write_watch,
)
from support.waiting import Task
from support.watches import PAGES, Array, pages, supported, write

import dirtylog
from dirtylog.errors import (
    ClosedError,
    ForkedError,
    HostError,
    UsageError,
)
from dirtylog.memory import PageBitmap, RAMBlock
from dirtylog.trackers.tracked import TrackedRange
from dirtylog.trackers.watch import TRACKERS, Watch, Written, watch, zeros
from dirtylog.units import HUGE_PAGE_SIZE, PAGE_SIZE


def done(action: Callable[[], object]) -> bool:
    action()
    return True


def test_package_offers_it() -> None:
    assert dirtylog.watch is watch
    assert dirtylog.zeros is zeros


@pytest.mark.parametrize("name", TRACKERS)
def test_watch_tells_its_mechanism_and_its_size(name: str) -> None:
    with watch(zeros(PAGE_SIZE + 1, np.uint8), supported(name)) as watched:
        assert (watched.tracker, watched.size, watched.pages) == (name, PAGE_SIZE + 1, 2)
        assert repr(watched) == f"<Watch of 2 pages, by {name}>"
    assert repr(watched) == "<Watch of 2 pages, closed>"


def test_pages_are_reported_until_they_are_cleared(tracker: str, array: Array) -> None:  # D1 D2
    with watch(array, tracker) as watched:
        assert not watched.collect()
        write(array, 1, 2, 70)
        assert pages(watched.collect()) == [1, 2, 70]
        assert pages(watched.collect()) == [1, 2, 70]
        write(array, 80)
        watched.clear(2, 60)
        assert pages(watched.collect()) == [1, 70, 80]
        watched.clear()
        assert not watched.collect()
        write(array, 1)
        assert pages(watched.harvest()) == [1]
        assert not watched.harvest()


def test_null_reports_everything_always(array: Array) -> None:
    with watch(array, "null") as watched:
        assert pages(watched.harvest()) == pages(watched.harvest()) == list(range(PAGES))


def test_what_was_put_back_is_reported_until_it_is_cleared(tracker: str, array: Array) -> None:  # D7
    with watch(array, tracker) as watched:
        write(array, 1, 2)
        taken = watched.harvest()
        write(array, 2, 3)
        watched.put_back(taken)
        write(array, 1)  # not collected yet: a clear of what was put back must not cost it
        watched.clear(1, 1)
        assert pages(watched.collect()) == [1, 2, 3]
        watched.clear()
        assert not watched.collect()


def test_pages_of_another_buffer_are_not_put_back(array: Array) -> None:
    with watch(array, "null") as watched, pytest.raises(UsageError, match="of a buffer of 3, not of 100"):
        watched.put_back(Written(PageBitmap(3), 3 * PAGE_SIZE, 1))


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, PAGES + 1), (PAGES, 1), (PAGES + 1, None), (5, -1)])
def test_clear_of_pages_that_are_not_there_is_refused(array: Array, first: int, count: int | None) -> None:
    with watch(array, "null") as watched, pytest.raises(UsageError, match="are not in a buffer"):
        watched.clear(first, count)


def test_empty_clear_is_nothing(tracker: str, array: Array) -> None:
    with watch(array, tracker) as watched:
        write(array, 99)
        watched.collect()
        watched.clear(PAGES)
        watched.clear(0, 0)
        assert pages(watched.collect()) == [99]


def test_writes_of_threads_are_never_lost(tracker: str, array: Array) -> None:  # D1 D3
    """Harvest, then read: who copies what was reported ends with what is there, whatever is written meanwhile."""
    if tracker == "soft-dirty":
        pytest.skip("it forgets what is written between the reading and the clearing of the bits")

    def writer(seed: int) -> None:
        for page in np.random.default_rng(seed).integers(0, PAGES, 2000).tolist():
            array[page * PAGE_SIZE + seed] += 1

    def take() -> None:
        for piece in watched.harvest().slices():
            kept[piece] = array[piece]

    kept = array.copy()
    with watch(array, tracker) as watched:
        tasks = [Task(partial(writer, seed)) for seed in (1, 2)]
        while any(task.running for task in tasks):
            take()
        for task in tasks:
            task.join()
        take()
    assert np.array_equal(kept, array)


# What can be watched.


@contextmanager
def shared_memory() -> Iterator[SharedMemory]:
    block = SharedMemory(create=True, size=PAGES * PAGE_SIZE)
    yield block
    block.close()
    block.unlink()


@contextmanager
def mapping() -> Iterator[mmap.mmap]:
    with anonymous(PAGES, SHARED) as memory:
        yield memory


@contextmanager
def ram_block() -> Iterator[RAMBlock]:
    with closing(RAMBlock("ram", PAGES * PAGE_SIZE)) as block:
        yield block


@contextmanager
def ram_block_of_a_buffer() -> Iterator[RAMBlock]:
    buffer = memoryview(anonymous(PAGES, SHARED))
    with closing(RAMBlock("ram", buffer.nbytes, buffer)) as block:
        yield block


@contextmanager
def shm_file() -> Iterator[mmap.mmap]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield mapped_file(Path(folder), PAGES)


def bytes_of(buffer: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(getattr(buffer, "buf", getattr(buffer, "memory", buffer)), np.uint8)


@pytest.mark.parametrize("make", [shared_memory, mapping, ram_block, ram_block_of_a_buffer, shm_file])
def test_buffers_of_all_kinds_are_watched(tracker: str, make: Callable[[], AbstractContextManager[Any]]) -> None:
    with make() as buffer, watch(buffer, tracker) as watched:
        write(bytes_of(buffer), 7)
        written = watched.harvest()
        assert pages(written) == [7]
        assert written.slices() == [slice(7 * PAGE_SIZE, 8 * PAGE_SIZE)]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("f8", 1),
        (">f8", 1),
        ("c16", 1),
        ("f2", 1),
        ("?", True),
        ("U5", "word"),
        ("M8[s]", 5),
        ([("a", "i4"), ("b", "M8[s]")], 5),
    ],
)
def test_arrays_of_all_types_are_watched(dtype: Any, value: Any) -> None:
    array = zeros(3000, dtype)
    with watch(array) as watched:
        array[2500] = value
        (piece,) = watched.harvest().slices()
        assert piece.start <= 2500 < piece.stop
        assert piece.stop - piece.start <= PAGE_SIZE // array.itemsize + 2


def test_scalar_array_is_one_element() -> None:
    array = zeros((), "f8")
    with watch(array) as watched:
        array[...] = 5
        assert watched.harvest().byte_ranges() == [(0, 8)]


def test_part_of_an_array_is_watched_alone(tracker: str) -> None:
    array = zeros((64, 512))  # a row a page
    with watch(array[10:20], tracker) as watched:
        array[5] = array[12] = array[30] = 1
        assert watched.harvest().slices() == [slice(2, 3)]


def test_memory_map_of_numpy_is_watched(tracker: str, tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "file", np.float64, "w+", shape=(100, 512))
    with watch(array, tracker) as watched:
        array[3, 5] = 1
        assert watched.harvest().slices() == [slice(3, 4)]


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_file_is_watched_by_either(tmp_path: Path, tracker: str, flags: int) -> None:
    memory = mapped_file(tmp_path, PAGES, flags)
    with watch(memory, tracker) as watched:
        write(as_array(memory), 7)
        assert pages(watched.harvest()) == [7]
        memory.flush()
        assert not watched.harvest()
        write(as_array(memory), 7)
        assert pages(watched.harvest()) == [7]


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_clearing_a_part_of_a_huge_page_neither_loses_nor_forgets_the_rest(flags: int) -> None:  # D1 D2
    require_write_watch()
    granule = HUGE_PAGE_SIZE // PAGE_SIZE
    with huge_pages(2, flags) as memory:
        array = as_array(memory)
        array[:] = 1
        with watch(memory) as watched:
            assert watched.tracker == "write-watch"
            write(array, granule + 5)
            assert watched.collect().runs().tolist() == [[granule, granule]]
            watched.clear(granule + 5, 1)
            assert watched.collect().runs().tolist() == [[granule, 5], [granule + 6, granule - 6]]
            write(array, granule + 5)
            assert watched.harvest().runs().tolist() == [[granule, granule]]
            assert not watched.collect()


# Closing, forks, threads, garbage.


def test_closed_watch_is_refused_and_closes_again(tracker: str, array: Array) -> None:
    watched = watch(array, tracker)
    written = watched.collect()
    watched.close()
    watched.close()
    calls: list[Callable[[], object]] = [
        watched.collect,
        watched.clear,
        watched.harvest,
        lambda: watched.put_back(written),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="was closed"):
            call()


def test_close_lets_go_of_the_buffer(tracker: str) -> None:
    memory = anonymous(PAGES)
    with nothing_left():
        watched = watch(memory, tracker)
        watched.harvest()
        watched.close()
    memory.close()
    assert repr(watched)


def test_forgotten_watch_ends(tracker: str) -> None:
    memory = anonymous(PAGES, SHARED)
    with nothing_left():
        watched = watch(memory, tracker)
        watched.harvest()
        del watched
    with nothing_left():
        circle = [watch(memory, tracker)]
        circle.append(circle)  # type: ignore[arg-type]
        del circle
        gc.collect()
    with watch(memory, tracker):  # nobody watches it any more
        pass
    memory.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, HostError])
def test_watch_that_fails_to_start_leaves_nothing(
    tracker: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    memory = anonymous(PAGES)
    real = TrackedRange.arm

    def fail(tracked: TrackedRange[Any]) -> None:
        real(tracked)
        raise error("now")

    monkeypatch.setattr(TrackedRange, "arm", fail)
    with nothing_left(), pytest.raises(error):
        watch(memory, tracker)
    monkeypatch.undo()
    gc.collect()
    watch(memory, tracker).close()
    memory.close()


def test_child_is_refused_its_parents_watch_which_goes_on(tracker: str, array: Array) -> None:
    with watch(array, tracker) as watched:
        written = watched.collect()
        calls: list[Callable[[], object]] = [
            watched.collect,
            watched.clear,
            watched.harvest,
            lambda: watched.put_back(written),
        ]
        for call in calls:
            assert in_child(partial(refused_with, ForkedError, call))
        assert in_child(partial(done, watched.close))
        write(array, 3)
        assert pages(watched.harvest()) == [3]
        write(array, 3)
        assert pages(watched.harvest()) == [3]


def test_child_may_end_while_a_thread_of_its_parent_collects(tracker: str, array: Array) -> None:
    """A lock that is held at the fork is never given back in the child."""
    watched = watch(array, tracker)
    with watched._lock:
        assert in_child(lambda: refused_with(ForkedError, watched.collect) and done(watched.close))
    watched.close()


def test_child_may_watch_for_itself(tracker: str) -> None:
    array = as_array(anonymous(PAGES))

    def childs_own() -> bool:
        with watch(array, tracker) as own:
            write(array, 7)
            return pages(own.harvest()) == [7] and not own.harvest()

    with watch(array, tracker) as watched:
        assert in_child(childs_own)
        assert not watched.harvest()
        write(array, 8)
        assert pages(watched.harvest()) == [8]


def test_writes_of_a_child_to_shared_memory_are_seen_by_comparison_only(tracker: str, array: Array) -> None:
    with watch(array, tracker) as watched:
        assert in_child(partial(write, array, 3))
        assert pages(watched.harvest()) == ([3] if tracker in ("comparison", "hashes") else [])


def test_watch_is_used_by_one_thread_at_a_time(array: Array) -> None:
    """Calls from threads come one after the other, and one that waits when the watch is closed is refused."""
    watched = watch(array)
    started = threading.Event()

    def collect() -> None:
        started.set()
        watched.collect()

    with watched._lock:
        task = Task(collect)
        assert started.wait(30)
        watched._tracked = None
    assert isinstance(task.error(), ClosedError)


def test_watch_does_not_pickle(array: Array) -> None:
    with watch(array) as watched:
        for duplicate in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError):
                duplicate(watched)


# Arrays to be watched.


@pytest.mark.parametrize("shape", [1, 5000, np.int64(7), (3,), (2, 3, 4), [4, 5], (np.uint8(2), 3), ()])
@pytest.mark.parametrize("dtype", ["u1", "f8", ">i4", "M8[s]", [("a", "i4")], (float, 3)])
def test_zeros_are_numpys_in_pages_of_their_own(shape: Any, dtype: Any) -> None:
    array = zeros(shape, dtype)
    expected = np.zeros(shape, dtype)
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert array.tobytes() == expected.tobytes()
    assert array.ctypes.data % PAGE_SIZE == 0
    assert array.flags.writeable
    assert array.flags.c_contiguous


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (0, "u1"),
        (-1, "u1"),
        ((3, 0), "u1"),
        ((-1, -1), "u1"),
        (3, object),
        (3, "V0"),
        (3, [("a", object)]),
        ((2.5, 3), "u1"),
        ("3", "u1"),
        (None, "u1"),
        (3, "magic"),
    ],
)
def test_zeros_of_nothing_are_refused(shape: Any, dtype: Any) -> None:
    with pytest.raises(UsageError):
        zeros(shape, dtype)


@pytest.mark.parametrize("size", [1 << 60, 1 << 63, 1 << 80])
def test_zeros_that_the_host_cannot_map_are_refused(size: int) -> None:
    with pytest.raises(HostError, match="cannot map"):
        zeros(size, np.uint8)


def test_zeros_take_memory_as_they_are_written() -> None:
    array = zeros(1 << 30, np.uint8)
    with watch(array, supported("write-watch")) as watched:
        array[1 << 29] = 1
        assert watched.harvest().byte_ranges() == [(1 << 29, (1 << 29) + PAGE_SIZE)]


def test_type_of_a_watch_is_exported(array: Array) -> None:
    with watch(array) as watched:
        assert isinstance(watched, Watch)
        assert isinstance(watched.collect(), dirtylog.Written)

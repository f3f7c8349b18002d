"""Memory that cannot be watched, or not in every way, and memory that goes away: each a named error, or safe."""

import errno
import gc
import mmap
import os
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pytest
from support.forks import in_child
from support.own_memory import (
    SHARED,
    Unowned,
    anonymous,
    as_array,
    become_nobody,
    huge_pages,
    nothing_left,
    require_write_watch,
)
from support.pinned import device_memory
from support.require import require
from support.watches import PAGES, Array, pages, supported, write

from dirtylog.errors import (
    AlreadyWatchedError,
    ClosedError,
    HostError,
    LostMappingError,
    UntrackableError,
    UsageError,
)
from dirtylog.linux import ioctl, userfaultfd
from dirtylog.memory import Memory, RAMBlock
from dirtylog.trackers import watch as watch_module
from dirtylog.trackers.watch import AUTO, TRACKERS, watch, zeros
from dirtylog.units import PAGE_SIZE

# What cannot.


class _Hidden:
    def __buffer__(self, flags: int) -> memoryview:
        raise BufferError("not now")


def closed_mapping() -> mmap.mmap:
    memory = anonymous(1)
    memory.close()
    return memory


def released_view() -> memoryview:
    view = memoryview(anonymous(1))
    view.release()
    return view


def closed_shared_memory() -> SharedMemory:
    block = SharedMemory(create=True, size=PAGE_SIZE)
    block.close()
    block.unlink()
    return block


def read_only_array() -> Array:
    array = zeros(1000)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", [AUTO, *TRACKERS])
@pytest.mark.parametrize(
    ("make", "reason", "remedy"),
    [
        (read_only_array, "read-only", "view of"),
        (lambda: b"bytes", "read-only", "view of"),
        (lambda: zeros(1000)[:0], "empty", None),
        (bytearray, "empty", None),
        (lambda: zeros(1000)[1:], "within a page", r"dirtylog\.zeros"),
        (lambda: memoryview(anonymous(2))[8:], "within a page", r"dirtylog\.zeros"),
        (lambda: zeros((100, 100))[:, :50], "not contiguous", "part of"),
        (lambda: zeros(1000)[::2], "not contiguous", "part of"),
        (lambda: memoryview(anonymous(2))[::2], "not contiguous", "part of"),
        (lambda: zeros((100, 100)).T, "not contiguous", "transpose"),
        (lambda: np.zeros((100, 100), order="F"), "not contiguous", "transpose"),
        (lambda: np.empty(1000, object), "ndarray offers no memory", "array of numbers"),
        (lambda: [1, 2, 3], "list offers no memory", "array"),
        (lambda: None, "NoneType offers no memory", "array"),
        (_Hidden, "_Hidden offers no memory", "array"),
        (closed_mapping, "mmap offers no memory", "open mmap"),
        (released_view, "memoryview offers no memory", "open mmap"),
        (closed_shared_memory, "SharedMemory offers no memory", "open mmap"),
        (lambda: Memory().container("root"), "MemoryRegion offers no memory", "RAMBlock"),
    ],
)
def test_buffer_that_cannot_be_watched_is_refused(
    name: str, make: Callable[[], Any], reason: str, remedy: str | None
) -> None:
    buffer = make()
    with nothing_left(), pytest.raises(UntrackableError, match=reason) as caught:
        watch(buffer, name)
    assert type(caught.value) is UntrackableError
    if remedy is not None:
        assert caught.match(remedy)


def test_ordinary_array_within_a_page_is_refused_and_its_copy_is_not() -> None:
    array = np.zeros(PAGE_SIZE + 8, np.uint8)
    array = array[(8 - array.ctypes.data) % PAGE_SIZE :][:8]
    with pytest.raises(UntrackableError, match=r"dirtylog\.zeros"):
        watch(array)
    own = zeros(array.shape, array.dtype)
    own[:] = array
    watch(own).close()


def test_closed_block_is_refused() -> None:
    block = RAMBlock("ram", PAGE_SIZE)
    block.close()
    with pytest.raises(ClosedError):
        watch(block)


def test_unknown_tracker_is_refused_with_those_that_there_are(array: Array) -> None:
    with pytest.raises(UsageError, match="no tracker 'magic'") as caught:
        watch(array, "magic")
    assert caught.match("use auto, write-watch, soft-dirty, comparison, hashes, null")


def test_memory_of_a_device_is_compared() -> None:
    with device_memory() as memory:
        with pytest.raises(UntrackableError, match="not all memory that userfaultfd serves"):
            watch(memory, supported("write-watch"))
        watched = watch(memory)
        assert watched.tracker == "comparison"
        watched.close()


def test_part_of_a_huge_page_is_compared() -> None:
    with huge_pages(1) as memory:
        part = as_array(memory)[: 5 * PAGE_SIZE]
        with pytest.raises(UntrackableError) as caught:
            watch(part, supported("write-watch"))
        assert caught.match("watched whole")
        with watch(part) as watched:
            assert watched.tracker == "comparison"
            write(part, 3)
            assert pages(watched.harvest()) == [3]


def refuse_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(flags: int) -> int:
        raise ioctl.kernel_error("userfaultfd", PermissionError(errno.EPERM, "Operation not permitted"))

    monkeypatch.setattr(userfaultfd, "_call", refuse)
    monkeypatch.setattr(userfaultfd, "_ask_device", lambda device: refuse(0))


def test_host_that_forbids_write_watch_compares_and_says_so(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_calls(monkeypatch)
    with nothing_left(), pytest.raises(HostError) as caught:
        watch(array, "write-watch")
    assert "unprivileged_userfaultfd" in (caught.value.remedy or "")
    with watch(array) as watched:
        assert watched.tracker == "comparison"
        write(array, 3)
        assert pages(watched.harvest()) == [3]


def test_memory_that_not_even_a_copy_fits_into_is_an_error(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: object) -> None:
        raise HostError("there is no memory for a copy")

    refuse_calls(monkeypatch)
    monkeypatch.setitem(watch_module.TRACKERS, "comparison", refuse)
    with pytest.raises(HostError, match="for a copy"):
        watch(array)


def test_ordinary_users_may_watch() -> None:
    require("root", os.getuid() == 0, "only root can become somebody else")
    require_write_watch()
    array = zeros(PAGES * PAGE_SIZE, np.uint8)

    def watches() -> bool:
        become_nobody(dumpable=True)
        with watch(array) as watched, open("/dev/zero", "rb", buffering=0) as file:
            write(array, 1)
            os.readv(file.fileno(), [array.data[5 * PAGE_SIZE :][:PAGE_SIZE]])
            return pages(watched.harvest()) == [1, 5] and not watched.harvest()

    assert in_child(watches)


def test_second_watch_of_a_range_is_refused_by_write_watch_only(array: Array) -> None:
    supported("write-watch")
    with watch(array, "write-watch") as first:
        for part in (array, array[: 10 * PAGE_SIZE], array[50 * PAGE_SIZE :]):
            with nothing_left(), pytest.raises(AlreadyWatchedError) as caught:
                watch(part, "write-watch")
            assert "close the other watch" in (caught.value.remedy or "")
        with watch(array) as second:
            assert second.tracker == "comparison"
            write(array, 1)
            assert pages(first.harvest()) == pages(second.harvest()) == [1]
    with watch(array) as third:
        assert third.tracker == "write-watch"


@pytest.mark.parametrize("name", ["soft-dirty", "comparison", "hashes", "null"])
def test_two_watches_of_one_range_lose_nothing_to_each_other(array: Array, name: str) -> None:  # D1
    with watch(array, supported(name)) as first, watch(array[10 * PAGE_SIZE :], name) as second:
        write(array, 1, 11)
        assert {1, 11} <= set(pages(first.harvest()))
        write(array, 12)
        assert {1, 2} <= set(pages(second.harvest()))
        assert 12 in pages(first.harvest())


# Memory that goes away.


def test_watched_memory_cannot_be_freed_or_resized(tracker: str) -> None:
    memory, array = anonymous(PAGES, SHARED), zeros(PAGES * PAGE_SIZE, np.uint8)
    with watch(memory, tracker) as watched, watch(array, tracker):
        with pytest.raises(BufferError):
            memory.close()
        with pytest.raises(BufferError):
            memory.resize(2 * PAGES * PAGE_SIZE)
        with pytest.raises(ValueError, match="resize"):
            array.resize(10, refcheck=False)
        memory[PAGE_SIZE] = 1
        assert pages(watched.harvest()) == [1]
    memory.resize(2 * PAGES * PAGE_SIZE)
    memory.close()


def test_shared_memory_cannot_be_closed_while_it_is_watched(tracker: str) -> None:
    block = SharedMemory(create=True, size=PAGES * PAGE_SIZE)
    with watch(block, tracker) as watched:
        with pytest.raises(BufferError):
            block.close()
        assert not watched.harvest()
    block.close()
    block.unlink()


def test_closed_block_goes_on_being_watched(tracker: str) -> None:
    block = RAMBlock("ram", PAGES * PAGE_SIZE)
    array = block.array
    with watch(block, tracker) as watched:
        block.close()
        write(array, 1)
        assert pages(watched.harvest()) == [1]


def test_array_outlives_its_last_name(tracker: str) -> None:
    with watch(zeros(1000), tracker) as watched:
        gc.collect()
        assert not watched.harvest()


@pytest.mark.parametrize("lose", [Unowned.unmap, Unowned.move])
def test_memory_that_goes_behind_the_watch_is_lost(tracker: str, lose: Callable[[Unowned], object]) -> None:
    memory = Unowned(PAGES)
    with watch(memory.array, tracker) as watched:
        write(memory.array, 1)
        watched.collect()
        lose(memory)
        for call in (watched.collect, watched.harvest, watched.collect):
            with pytest.raises(LostMappingError) as caught:
                call()
            assert caught.value.remedy is not None
        if tracker != "soft-dirty":  # which has nothing to do for a clear
            with pytest.raises(LostMappingError):
                watched.clear()


def test_memory_replaced_behind_the_watch_is_lost_or_reported(tracker: str) -> None:
    memory = Unowned(PAGES)
    memory.array[:] = 1
    with watch(memory.array, tracker) as watched:
        memory.replace(50, 2)
        if tracker == "write-watch":
            with pytest.raises(LostMappingError):
                watched.collect()
        else:
            assert {50, 51} <= set(pages(watched.collect()))


def test_array_made_on_shared_memory_that_is_closed_under_it_is_lost(tracker: str) -> None:
    """The idiom of multiprocessing's documentation: such an array does not hold the block open."""
    block = SharedMemory(create=True, size=PAGES * PAGE_SIZE)
    array: Array = np.ndarray((PAGES, PAGE_SIZE), np.uint8, block.buf)
    with watch(array, tracker) as watched:
        write(array, 1)
        assert pages(watched.harvest()) == [1]
        block.close()
        with pytest.raises(LostMappingError):
            watched.collect()
    block.unlink()

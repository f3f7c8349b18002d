"""What counts as written: each sentence of the module's page, on this kernel."""

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support.forks import in_child, refused_with
from support.mappings import address_of
from support.own_memory import (
    PRIVATE,
    SHARED,
    Bytes,
    Unowned,
    anonymous,
    as_array,
    become_nobody,
    huge_pages,
    mapped_file,
    nothing_left,
    require_write_watch,
)
from support.pinned import ReadsIntoRegisteredBuffer, device_memory
from support.require import require
from support.waiting import Task

from dirtylog.errors import (
    AlreadyWatchedError,
    ClosedError,
    DirtylogError,
    ForkedError,
    HostError,
    LostMappingError,
    UntrackableError,
)
from dirtylog.linux import ioctl, pagemap, userfaultfd
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.pagemap import Pagemap
from dirtylog.linux.write_watch import WriteWatch
from dirtylog.units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE

PAGES = 64
HUGE = HUGE_PAGE_SIZE // PAGE_SIZE


@pytest.fixture(autouse=True)
def _supported() -> None:
    require_write_watch()


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a file system that keeps files on a disk, as a folder for temporary files need not be."""
    here = Path(__file__).parent
    require("writable-tests", os.access(here, os.W_OK), "the tests' own folder cannot be written")
    with tempfile.TemporaryDirectory(dir=here) as name:
        yield Path(name)


def started(array: Bytes) -> WriteWatch:
    """A watch that has nothing to report yet."""
    watch = WriteWatch(array.ctypes.data, array.size)
    watch.written(0, array.size, protect=True)
    return watch


def pages(watch: WriteWatch, *, protect: bool = False) -> list[int]:
    found = watch.written(0, watch.size, protect=protect)
    return [
        (address - watch.address) // PAGE_SIZE
        for region in found
        for address in range(int(region["start"]), int(region["end"]), PAGE_SIZE)
    ]


def write(array: Bytes, *numbers: int) -> tuple[int, ...]:
    for number in numbers:
        array[number * PAGE_SIZE] += 1
    return numbers


def done(action: Callable[[], None]) -> bool:
    action()
    return True


@pytest.fixture(params=["private", "shared", "memfd", "shm file", "private shm file", "file", "private file"])
def array(request: pytest.FixtureRequest, folder: Path) -> Bytes:
    """Memory of one kind; of each page the first half was touched before."""
    kind: str = request.param
    flags = PRIVATE if kind.startswith("private") else SHARED
    if kind == "memfd":
        array = MemfdMapping("test", PAGES * PAGE_SIZE).array
    elif kind.endswith("shm file"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            array = as_array(mapped_file(Path(name), PAGES, flags))
    elif kind.endswith("file"):
        array = as_array(mapped_file(folder, PAGES, flags))
    else:
        array = as_array(anonymous(PAGES, flags))
    write(array, *range(0, PAGES, 2))
    return array


def test_all_pages_count_as_written_at_first_and_none_after(array: Bytes) -> None:
    with closing(WriteWatch(array.ctypes.data, array.size)) as watch:
        assert pages(watch, protect=True) == list(range(PAGES))
        assert pages(watch) == []


def test_writes_are_found_once_protected_again_and_reads_are_not(array: Bytes) -> None:
    with closing(started(array)) as watch:
        assert array.sum() == PAGES // 2  # reads all
        write(array, 0, 3, 4, 63)
        assert pages(watch) == [0, 3, 4, 63]
        assert pages(watch, protect=True) == [0, 3, 4, 63]
        assert pages(watch) == []
        write(array, 3)
        assert pages(watch) == [3]


def test_part_is_scanned_and_protected_alone(array: Bytes) -> None:
    with closing(started(array)) as watch:
        write(array, 1, 2, 3)
        assert len(watch.written(2 * PAGE_SIZE, PAGE_SIZE, protect=True)) == 1
        assert pages(watch) == [1, 3]


def test_writes_of_the_kernel_for_this_process_count(array: Bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE_SIZE))
    with closing(started(array)) as watch, (tmp_path / "file").open("rb", buffering=0) as file:
        assert os.readv(file.fileno(), [array.data[PAGE_SIZE + 100 : 3 * PAGE_SIZE + 100]]) == 2 * PAGE_SIZE
        assert pages(watch) == [1, 2, 3]


def test_writes_of_other_threads_count(array: Bytes) -> None:
    with closing(started(array)) as watch:
        Task(lambda: write(array, 5)).join()
        assert pages(watch) == [5]


def test_parents_watch_goes_on_after_a_fork_and_has_nothing_of_the_child(array: Bytes) -> None:
    with closing(started(array)) as watch:
        write(array, 1)
        assert in_child(lambda: bool(write(array, 10)))
        write(array, 2)
        assert pages(watch, protect=True) == [1, 2]
        write(array, 10)
        assert pages(watch) == [10]


def test_child_neither_uses_nor_ends_its_parents_watch(array: Bytes) -> None:
    with closing(started(array)) as watch:
        assert in_child(lambda: refused_with(ForkedError, lambda: watch.written(0, PAGE_SIZE)))
        assert in_child(lambda: done(watch.close))
        write(array, 1)
        assert pages(watch) == [1]


def test_child_may_have_a_watch_of_its_own(array: Bytes) -> None:
    def childs_own() -> bool:
        with closing(started(array)) as own:
            write(array, 7)
            return pages(own) == [7]

    with closing(started(array)) as watch:
        assert in_child(childs_own)
        assert pages(watch) == []


def test_write_through_another_mapping_or_the_file_is_not_noted() -> None:
    with closing(MemfdMapping("test", PAGES * PAGE_SIZE)) as memory:
        other = as_array(mmap.mmap(memory.fd, memory.size))
        with closing(started(memory.array)) as watch:
            write(other, 1)
            os.pwrite(memory.fd, b"x", 2 * PAGE_SIZE)
            assert memory.array[::PAGE_SIZE].nonzero()[0].tolist() == [1, 2]
            assert pages(watch) == []


def test_pages_given_to_the_kernel_before_are_written_unnoticed() -> None:
    array = as_array(anonymous(PAGES))
    array[:] = 1
    with closing(ReadsIntoRegisteredBuffer(array)) as ring, closing(started(array)) as watch:
        ring.read_zeros(5 * PAGE_SIZE, PAGE_SIZE)
        assert not array[5 * PAGE_SIZE :][:PAGE_SIZE].any()
        assert pages(watch) == []


def test_memory_of_a_device_is_refused() -> None:
    with device_memory() as memory, pytest.raises(UntrackableError) as caught:
        WriteWatch(address_of(memory), len(memory))
    assert "by comparison" in (caught.value.remedy or "")


def test_memory_that_scans_leave_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # What older kernels do with memory of devices.
    monkeypatch.setattr(Pagemap, "scan", lambda *_, **__: np.empty(0, pagemap.REGION))
    memory = anonymous(1)
    with nothing_left(), pytest.raises(UntrackableError, match="does not tell"):
        WriteWatch(address_of(memory), PAGE_SIZE)


def test_watching_takes_no_memory() -> None:
    with closing(MemfdMapping("test", 256 * MIB)) as memory, closing(started(memory.array)) as watch:
        assert os.fstat(memory.fd).st_blocks == 0
        memory.array[100 * MIB] = 1
        assert pages(watch) == [100 * MIB // PAGE_SIZE]


def test_private_memory_given_back_reads_as_zeros_and_counts() -> None:
    memory = anonymous(PAGES)
    array = as_array(memory)
    array[:] = 1
    with closing(started(array)) as watch:
        memory.madvise(mmap.MADV_DONTNEED, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert pages(watch) == [4, 5]
        assert not array[4 * PAGE_SIZE : 6 * PAGE_SIZE].any()


def test_shared_memory_given_back_keeps_its_contents_and_does_not_count() -> None:
    memory = anonymous(PAGES, SHARED)
    array = as_array(memory)
    array[:] = 1
    with closing(started(array)) as watch:
        memory.madvise(mmap.MADV_DONTNEED, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert array.all()
        assert pages(watch) == []
        write(array, 4)
        assert pages(watch) == [4]


def test_memory_that_the_kernel_may_take_does_not_count() -> None:
    memory = anonymous(PAGES)
    array = as_array(memory)
    array[:] = 1
    with closing(started(array)) as watch:
        memory.madvise(mmap.MADV_FREE, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert pages(watch) == []
        write(array, 4)
        assert pages(watch) == [4]


def test_hole_is_not_noted_and_the_next_write_to_it_is() -> None:
    with closing(MemfdMapping("test", PAGES * PAGE_SIZE)) as memory:
        memory.array[:] = 1
        with closing(started(memory.array)) as watch:
            memory.punch(4 * PAGE_SIZE, PAGE_SIZE)
            assert not memory.array[4 * PAGE_SIZE :][:PAGE_SIZE].any()
            assert pages(watch) == []
            write(memory.array, 4)
            assert pages(watch) == [4]


def test_memory_that_was_unmapped_moved_or_replaced_is_lost() -> None:
    for lose in (Unowned.unmap, Unowned.move, Unowned.replace):
        memory = Unowned(PAGES)
        with closing(started(memory.array)) as watch:
            lose(memory)
            for protect in (False, True):
                with pytest.raises(LostMappingError) as caught:
                    pages(watch, protect=protect)
                assert caught.value.remedy is not None


@pytest.mark.parametrize("first", [0, 31, 63])
def test_one_page_that_is_lost_is_noticed(first: int) -> None:
    for lose in (Unowned.unmap, Unowned.replace):
        memory = Unowned(PAGES)
        with closing(started(memory.array)) as watch:
            lose(memory, first, 1)
            with pytest.raises(LostMappingError):
                pages(watch)


def test_moved_memory_can_be_watched_where_it_is() -> None:
    memory = Unowned(PAGES)
    with closing(started(memory.array)) as watch:
        write(memory.array, 1)
        array = memory.move()
        with closing(started(array)) as anew:
            write(array, 2)
            assert pages(anew) == [2]
        with pytest.raises(LostMappingError):
            pages(watch)


def test_closing_the_watch_of_lost_memory_leaves_the_watch_that_followed() -> None:
    memory = Unowned(PAGES)
    watch = started(memory.array)
    memory.replace()
    with closing(started(memory.array)) as anew:
        watch.close()
        write(memory.array, 2)
        assert pages(anew) == [2]


def test_transparent_huge_page_is_split_as_it_is_written() -> None:
    memory = anonymous(4 * HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = as_array(memory)
    array[:] = 1
    with closing(started(array)) as watch:
        write(array, 700, 1500)
        assert pages(watch, protect=True) == [700, 1500]
        write(array, 701)
        assert pages(watch) == [701]


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_page_of_hugetlbfs_counts_whole(flags: int) -> None:
    with huge_pages(2, flags) as memory:
        array = as_array(memory)
        write(array, 0, HUGE)
        with closing(started(array)) as watch:
            write(array, HUGE + 7)
            assert pages(watch) == list(range(HUGE, 2 * HUGE))
            watch.written((HUGE + 100) * PAGE_SIZE, PAGE_SIZE, protect=True)
            assert pages(watch) == []
            write(array, HUGE + 7)
            assert pages(watch) == list(range(HUGE, 2 * HUGE))


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_page_of_hugetlbfs_that_was_never_touched_counts_when_it_is(flags: int) -> None:
    with huge_pages(2, flags) as memory:
        array = as_array(memory)
        with closing(started(array)) as watch:
            assert pages(watch) == []
            assert array[0] == 0
            write(array, HUGE)
            assert pages(watch, protect=True) == list(range(2 * HUGE))
            assert array[0] == 0
            assert pages(watch) == []


def test_page_of_hugetlbfs_given_back_does_not_count() -> None:
    with huge_pages(1) as memory:
        array = as_array(memory)
        array[:] = 1
        with closing(started(array)) as watch:
            memory.madvise(mmap.MADV_DONTNEED)
            assert not array.any()
            assert pages(watch) == []


@pytest.mark.parametrize("part", [slice(0, 5), slice(1, HUGE), slice(1, 2), slice(0, 1)])
def test_part_of_a_page_of_hugetlbfs_is_refused(part: slice) -> None:
    with huge_pages(1) as memory:
        array = as_array(memory)[part.start * PAGE_SIZE : part.stop * PAGE_SIZE]
        with nothing_left(), pytest.raises(UntrackableError, match="in whole pages") as caught:
            WriteWatch(array.ctypes.data, array.size)
        assert "watched whole" in (caught.value.remedy or "")


def test_memory_of_another_watch_is_refused_whatever_the_overlap(array: Bytes) -> None:
    half = array[: 32 * PAGE_SIZE]
    with closing(started(half)) as watch:
        for other in (half, array, array[31 * PAGE_SIZE :], array[4 * PAGE_SIZE :][:PAGE_SIZE]):
            with nothing_left(), pytest.raises(AlreadyWatchedError) as caught:
                WriteWatch(other.ctypes.data, other.size)
            assert "close the other watch" in (caught.value.remedy or "")
        write(array, 1, 40)
        assert pages(watch) == [1]


def test_parts_of_one_mapping_have_watches_of_their_own(array: Bytes) -> None:
    left, right = array[: 32 * PAGE_SIZE], array[32 * PAGE_SIZE :]
    with closing(started(left)) as one, closing(started(right)) as other:
        write(array, 3, 40)
        assert pages(one, protect=True) == [3]
        assert pages(other) == [8]
        one.close()
        write(array, 41)
        assert pages(other) == [8, 9]


def test_unmapped_memory_is_refused() -> None:
    memory = Unowned(PAGES)
    memory.unmap()
    with nothing_left(), pytest.raises(UntrackableError):
        WriteWatch(memory.address, memory.size)


def test_memory_that_can_never_be_written_is_refused(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(PAGE_SIZE))
    with (folder / "file").open("rb") as file, mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ) as memory:
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        with nothing_left(), pytest.raises(UntrackableError, match="can never be written") as caught:
            WriteWatch(address, PAGE_SIZE)
    assert caught.value.remedy is not None


def test_closed_watch_is_refused_and_the_memory_is_free(array: Bytes) -> None:
    with nothing_left():
        watch = started(array)
        watch.close()
        watch.close()
        with pytest.raises(ClosedError):
            pages(watch)
        started(array).close()


@pytest.mark.parametrize("device", [userfaultfd.USERFAULTFD_DEVICE, "/nonexistent"])
def test_ordinary_users_may_watch_and_have_the_kernels_writes(device: str) -> None:
    require("root", os.getuid() == 0, "only root can become somebody else")
    array = as_array(anonymous(PAGES))

    def watches() -> bool:
        become_nobody(dumpable=True)
        try:
            watch = WriteWatch(array.ctypes.data, array.size, device=device)
        except HostError as error:  # where a sandbox forbids it, it must say what would help
            return error.remedy is not None
        with closing(watch), open("/dev/zero", "rb", buffering=0) as zeros:
            watch.written(0, watch.size, protect=True)
            write(array, 1)
            os.readv(zeros.fileno(), [array.data[5 * PAGE_SIZE :][: 2 * PAGE_SIZE]])
            return pages(watch, protect=True) == [1, 5, 6] and pages(watch) == []

    assert in_child(watches)


def test_process_that_changed_its_user_is_told_what_to_do() -> None:
    require("root", os.getuid() == 0, "only root can become somebody else")
    memory = anonymous(1)

    def is_told() -> bool:
        become_nobody(dumpable=False)
        try:
            WriteWatch(address_of(memory), PAGE_SIZE)
        except HostError as error:
            return "PR_SET_DUMPABLE" in (error.remedy or "")
        return False

    assert in_child(is_told)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EPERM, "vm.unprivileged_userfaultfd=1"),
        (errno.ENOSYS, "CONFIG_USERFAULTFD"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_host_without_userfaultfd_names_the_remedy(monkeypatch: pytest.MonkeyPatch, code: int, remedy: str) -> None:
    def refuse(flags: int) -> int:
        raise ioctl.kernel_error("userfaultfd", OSError(code, os.strerror(code)))

    monkeypatch.setattr(userfaultfd, "_call", refuse)
    memory = anonymous(1)
    with nothing_left(), pytest.raises(HostError, match=os.strerror(code)) as caught:
        WriteWatch(address_of(memory), PAGE_SIZE, device="/nonexistent")
    assert remedy in (caught.value.remedy or "")


def refuse_request(monkeypatch: pytest.MonkeyPatch, module: object, request: ioctl.Request, code: int) -> None:
    """The kernel answers one request with an error."""
    real = ioctl.ioctl

    def answer(fd: int, asked: ioctl.Request, argument: object = 0) -> int:
        if asked == request:
            raise ioctl.kernel_error(asked.name, OSError(code, os.strerror(code)))
        return real(fd, asked, argument)

    monkeypatch.setattr(module, "ioctl", answer)


def test_kernel_without_asynchronous_protection_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_request(monkeypatch, userfaultfd, userfaultfd.UFFDIO_API, errno.EINVAL)
    memory = anonymous(1)
    with nothing_left(), pytest.raises(HostError, match=r"does not offer .*WP_ASYNC") as caught:
        WriteWatch(address_of(memory), PAGE_SIZE)
    assert "6.7" in (caught.value.remedy or "")


def test_kernel_without_scans_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_request(monkeypatch, pagemap, pagemap.PAGEMAP_SCAN, errno.ENOTTY)
    memory = anonymous(1)
    with nothing_left(), pytest.raises(HostError, match="no PAGEMAP_SCAN") as caught:
        WriteWatch(address_of(memory), PAGE_SIZE)
    assert "6.7" in (caught.value.remedy or "")


def test_kernel_that_cannot_tell_a_mapping_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_request(monkeypatch, userfaultfd, userfaultfd.UFFDIO_REGISTER, errno.ENOSPC)
    memory = anonymous(1)
    with nothing_left(), pytest.raises(DirtylogError, match="UFFDIO_REGISTER failed"):
        WriteWatch(address_of(memory), PAGE_SIZE)


def test_old_registrations_end_with_their_descriptor(array: Bytes) -> None:
    with closing(started(array)) as forgotten:
        forgotten._userfaultfd.close()
        started(array).close()

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support.descriptors import few_descriptors, same_file
from support.kvm import open_descriptors
from support.own_memory import Unowned, as_array, mapped_file

from dirtylog.errors import ClosedError, HostError, KernelError, UsageError
from dirtylog.linux import mapping as mapping_module
from dirtylog.linux.mapping import MemfdMapping, is_mapped, is_readable
from dirtylog.units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE


@pytest.fixture
def mapping() -> Iterator[MemfdMapping]:
    mapping = MemfdMapping("test", 16 * PAGE_SIZE)
    yield mapping
    mapping.close()


def allocated(mapping: MemfdMapping) -> list[tuple[int, int]]:
    return [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in mapping.extents(0, mapping.size)]


def test_file_and_mapping_are_the_same_zeroed_memory(mapping: MemfdMapping) -> None:
    assert mapping.array.shape == (16 * PAGE_SIZE,)
    assert not mapping.array.any()
    mapping.array[5] = 7
    mapping.memory[6] = 8

    assert os.pread(mapping.fd, 3, 4) == b"\0\7\x08"
    assert mapping.array.ctypes.data == mapping.address
    assert mapping.array.flags.writeable


def test_file_can_neither_shrink_nor_grow(mapping: MemfdMapping) -> None:
    for size in (PAGE_SIZE, 17 * PAGE_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(mapping.fd, size)


def test_extents_are_where_data_is_cropped_to_what_was_asked(mapping: MemfdMapping) -> None:
    for page in (2, 3, 4, 9):
        mapping.array[page * PAGE_SIZE] = 1

    assert allocated(mapping) == [(2, 5), (9, 10)]
    assert list(mapping.extents(3 * PAGE_SIZE, 9 * PAGE_SIZE)) == [(3 * PAGE_SIZE, 5 * PAGE_SIZE)]
    assert list(mapping.extents(5 * PAGE_SIZE, 9 * PAGE_SIZE)) == []
    assert list(mapping.extents(10 * PAGE_SIZE, 16 * PAGE_SIZE)) == []
    assert list(mapping.extents(0, 0)) == []
    found = [mapping.next_data(page * PAGE_SIZE, 9 * PAGE_SIZE) // PAGE_SIZE for page in (0, 3, 4, 5, 9, 10)]
    assert found == [2, 3, 4, 9, 9, 9]


def test_extents_after_close_are_an_error() -> None:
    mapping = MemfdMapping("test", PAGE_SIZE)
    mapping.close()
    with pytest.raises(KernelError) as caught:
        list(mapping.extents(0, PAGE_SIZE))
    assert caught.value.errno == errno.EBADF


def test_punched_pages_are_holes_of_zeros(mapping: MemfdMapping) -> None:
    mapping.array[:] = 1
    mapping.punch(4 * PAGE_SIZE, 2 * PAGE_SIZE)

    assert allocated(mapping) == [(0, 4), (6, 16)]
    assert np.flatnonzero(mapping.array[::PAGE_SIZE] == 0).tolist() == [4, 5]
    assert mapping.size == os.fstat(mapping.fd).st_size


def test_populated_pages_are_allocated(mapping: MemfdMapping) -> None:
    mapping.populate(2 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert allocated(mapping) == [(2, 5)]


def test_range_outside_the_mapping_is_refused_by_the_kernel(mapping: MemfdMapping) -> None:
    with pytest.raises(KernelError, match="madvise MADV_POPULATE_WRITE failed"):
        mapping.populate(1, PAGE_SIZE)
    with pytest.raises(KernelError, match="fallocate FALLOC_FL_PUNCH_HOLE failed"):
        mapping.punch(-PAGE_SIZE, PAGE_SIZE)


def test_close_is_idempotent_and_gives_the_descriptors_back() -> None:
    before = open_descriptors()
    mapping = MemfdMapping("test", PAGE_SIZE)
    mapping.array[0] = 1
    assert open_descriptors() != before

    mapping.close()
    mapping.close()

    assert open_descriptors() == before
    with pytest.raises(ClosedError):
        _ = mapping.array
    with pytest.raises(ClosedError):
        _ = mapping.memory


def test_array_in_use_outlives_the_close() -> None:
    mapping = MemfdMapping("test", PAGE_SIZE)
    array = mapping.array
    mapping.close()
    array[0] = 7
    assert array.sum() == 7


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_size_of_no_whole_pages_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="positive whole number"):
        MemfdMapping("test", size)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 70])
def test_size_that_the_host_cannot_map_is_refused_without_a_leak(size: int) -> None:
    before = open_descriptors()
    with pytest.raises(HostError, match="cannot map") as caught:
        MemfdMapping("test", size)
    assert caught.value.remedy is not None
    assert open_descriptors() == before


def test_sparse_memory_costs_nothing_until_it_is_written() -> None:
    mapping = MemfdMapping("test", 1 << 40)
    mapping.array[(1 << 40) - 1] = 1
    assert os.fstat(mapping.fd).st_blocks * 512 <= MIB
    mapping.close()


def test_exhausted_descriptors_are_a_kernel_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(KernelError, match="memfd_create failed: Too many open files"):
        MemfdMapping("test", PAGE_SIZE)


@pytest.fixture
def large() -> Iterator[MemfdMapping]:
    mapping = MemfdMapping("large", 2 * HUGE_PAGE_SIZE + PAGE_SIZE)
    yield mapping
    mapping.close()


def test_mapping_starts_where_a_huge_page_could(large: MemfdMapping) -> None:
    assert large.address % HUGE_PAGE_SIZE == 0


def test_huge_page_reads_as_the_zeros_that_were_there(large: MemfdMapping) -> None:
    huge = large.make_huge(HUGE_PAGE_SIZE)

    pages = HUGE_PAGE_SIZE // PAGE_SIZE
    # The kernel may have no huge page free, or offer none for shared memory: then the page that was touched is there.
    assert allocated(large) == [(pages, 2 * pages if huge else pages + 1)]
    assert not large.array.any()


def test_part_of_a_huge_page_at_the_end_is_left_alone(large: MemfdMapping) -> None:
    assert not large.make_huge(2 * HUGE_PAGE_SIZE)
    assert allocated(large) == []


@pytest.mark.parametrize(
    ("refused", "code", "times"),
    [
        (mapping_module._MADV_POPULATE_WRITE, errno.EINVAL, 1),
        (mapping_module._MADV_COLLAPSE, errno.EINVAL, 1),
        (mapping_module._MADV_COLLAPSE, errno.EAGAIN, 2),
        (mapping_module._MADV_COLLAPSE, errno.ENOMEM, 2),
    ],
    ids=["old-kernel", "no-huge-pages", "none-free", "no-memory"],
)
def test_host_that_will_never_have_huge_pages_is_asked_once(
    large: MemfdMapping, monkeypatch: pytest.MonkeyPatch, refused: int, code: int, times: int
) -> None:
    asked: list[int] = []

    class Kernel:
        def madvise(self, address: int, size: int, advice: int) -> int:
            asked.append(advice)
            ctypes.set_errno(code)
            return -1 if advice == refused else 0

    monkeypatch.setattr(mapping_module, "_libc", Kernel())
    assert [large.make_huge(start) for start in (0, HUGE_PAGE_SIZE)] == [False, False]
    assert asked.count(refused) == times


def test_huge_page_keeps_what_is_in_its_place(large: MemfdMapping) -> None:
    large.array[: 3 * PAGE_SIZE] = 7
    large.make_huge(0)
    assert large.array[: 3 * PAGE_SIZE].min() == 7
    assert not large.array[3 * PAGE_SIZE : HUGE_PAGE_SIZE].any()


@pytest.fixture
def other(mapping: MemfdMapping) -> Iterator[MemfdMapping]:
    """Another mapping of the same size."""
    with closing(MemfdMapping("other", mapping.size)) as other:
        yield other


def test_adopted_file_is_seen_at_the_same_address_by_all_who_look_there(
    mapping: MemfdMapping, other: MemfdMapping
) -> None:
    array, memory, address = mapping.array, mapping.memory, mapping.address
    mapping.array[:] = 0xEE
    other.array[3 * PAGE_SIZE] = 7

    os.close(mapping.adopt(os.dup(other.fd)))

    assert (mapping.address, mapping.size) == (address, 16 * PAGE_SIZE)
    assert same_file(mapping.fd, other.fd)
    assert allocated(mapping) == [(3, 4)]
    assert [*np.flatnonzero(array)] == [3 * PAGE_SIZE]
    memory[5] = 8
    assert other.array[5] == mapping.array[5] == 8


def test_adopted_file_outlives_the_one_who_gave_it(mapping: MemfdMapping) -> None:
    other = MemfdMapping("other", mapping.size)
    other.array[:] = 7
    os.close(mapping.adopt(os.dup(other.fd)))
    other.close()
    assert mapping.array.min() == 7


def test_adopted_file_is_owned_and_the_own_one_the_callers(mapping: MemfdMapping, other: MemfdMapping) -> None:
    before = open_descriptors()
    mapping.array[:] = 7
    own = mapping.adopt(os.dup(other.fd))
    assert os.pread(own, 1, 0) == b"\x07"
    os.close(own)
    for _ in range(2):
        os.close(mapping.adopt(os.dup(other.fd)))
    assert len(open_descriptors()) == len(before)
    mapping.close()
    assert len(open_descriptors()) == len(before) - 1


def _regular_file(size: int) -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)  # noqa: S108 - has no name
    os.ftruncate(fd, size)
    return fd


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, mapping_module._F_ADD_SEALS, seals)
    return fd


def _read_only(size: int) -> int:
    fd = _memfd(size, mapping_module._F_SEAL_SHRINK)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def _closed(size: int) -> int:
    fd = _memfd(size, mapping_module._F_SEAL_SHRINK)
    os.close(fd)
    return fd


_F_SEAL_WRITE = 8


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda size: _memfd(size - PAGE_SIZE, mapping_module._F_SEAL_SHRINK), "cannot stand in for 65536 that cannot"),
        (lambda size: _memfd(size + PAGE_SIZE, mapping_module._F_SEAL_SHRINK), "cannot stand in for 65536 that cannot"),
        (lambda size: _memfd(0, mapping_module._F_SEAL_SHRINK), "the memfd of 0 bytes cannot stand in"),
        (lambda size: _memfd(size, 0), "cannot stand in for 65536 that cannot shrink"),
        (lambda size: _memfd(size, mapping_module._F_SEAL_GROW), "cannot stand in for 65536 that cannot shrink"),
        (lambda size: _memfd(size, mapping_module._F_SEAL_SHRINK | _F_SEAL_WRITE), "the memfd cannot be written"),
        (_read_only, "the memfd cannot be written"),
        # tmpfs has seals, too, and a file there cannot have the one that is wanted
        (_regular_file, "no memfd: Invalid argument|cannot stand in for 65536 that cannot shrink"),
        (lambda size: os.eventfd(0), "the file to be mapped is no memfd: Invalid argument"),
        (_closed, "the file to be mapped is no memfd: Bad file descriptor"),
    ],
    ids=[
        "smaller",
        "larger",
        "empty",
        "unsealed",
        "can-shrink",
        "cannot-be-written",
        "read-only",
        "regular-file",
        "eventfd",
        "closed",
    ],
)
def test_file_that_cannot_be_adopted_is_refused_and_changes_nothing(
    mapping: MemfdMapping, make: Callable[[int], int], cause: str
) -> None:
    mapping.array[:] = 7
    file = make(mapping.size)
    before, own = open_descriptors(), os.fstat(mapping.fd)
    with pytest.raises(UsageError, match=cause):
        mapping.adopt(file)
    assert open_descriptors() == before  # so the file is still the caller's
    if make is not _closed:
        os.close(file)
    assert mapping.array.min() == 7
    mapping.array[0] = 8
    assert os.pread(mapping.fd, 1, 0) == b"\x08"
    assert os.path.samestat(os.fstat(mapping.fd), own)


def test_host_that_cannot_map_the_file_leaves_what_was_there(
    mapping: MemfdMapping, other: MemfdMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel:
        def mmap(self, *_: int) -> int:
            ctypes.set_errno(errno.ENOMEM)
            return -1

    mapping.array[:] = 7
    monkeypatch.setattr(mapping_module, "_libc", Kernel())
    with pytest.raises(HostError, match=r"cannot map 64\.0 KiB of memory"):
        mapping.adopt(other.fd)
    assert not same_file(mapping.fd, other.fd)
    assert mapping.array.min() == 7


def test_closed_memory_adopts_and_renews_nothing(other: MemfdMapping) -> None:
    mapping = MemfdMapping("test", other.size)
    mapping.close()
    with pytest.raises(ClosedError, match="this memory was closed"):
        mapping.adopt(other.fd)
    with pytest.raises(ClosedError, match="this memory was closed"):
        mapping.renew()
    assert mapping.fd == -1
    other.array[0] = 1


def test_renewed_memory_is_empty_and_others_keep_what_was_there(mapping: MemfdMapping, other: MemfdMapping) -> None:
    other.array[:] = 7
    os.close(mapping.adopt(os.dup(other.fd)))
    array = mapping.array
    before = open_descriptors()

    mapping.renew()

    assert len(open_descriptors()) == len(before)
    assert not array.any()
    assert allocated(other) == [(0, 16)]
    array[0] = 8
    assert other.array.min() == other.array.max() == 7
    assert os.pread(mapping.fd, 1, 0) == b"\x08"
    for size in (PAGE_SIZE, 17 * PAGE_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(mapping.fd, size)


def test_memory_can_be_renewed_with_no_descriptor_left(mapping: MemfdMapping) -> None:
    mapping.array[:] = 7
    with few_descriptors(0):
        mapping.renew()
    assert not mapping.array.any()


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_memory_that_cannot_be_renewed_stays_and_can_be_later(
    mapping: MemfdMapping, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    mapping.array[:] = 7
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises((HostError, KernelError), match="Cannot allocate memory"):
            mapping.renew()
    assert len(open_descriptors()) == len(before) - 1
    assert mapping.array.min() == 7
    mapping.renew()
    assert not mapping.array.any()
    assert len(open_descriptors()) == len(before)


@pytest.mark.parametrize("page", [0, 5, 15])
def test_gap_in_a_range_is_found(page: int) -> None:
    memory = Unowned(16)
    assert is_mapped(memory.address, memory.size)
    assert is_readable(memory.address, memory.size)
    memory.unmap(page, 1)
    assert not is_mapped(memory.address, memory.size)
    assert not is_readable(memory.address, memory.size)
    memory.replace(page, 1)
    assert is_mapped(memory.address, memory.size)


def test_file_that_was_cut_short_is_not_readable(tmp_path: Path) -> None:
    array = as_array(mapped_file(tmp_path, 16))
    assert is_readable(array.ctypes.data, array.size)
    os.truncate(tmp_path / "mapped", 8 * PAGE_SIZE)
    assert is_mapped(array.ctypes.data, array.size)
    assert not is_readable(array.ctypes.data, array.size)
    assert is_readable(array.ctypes.data, array.size // 2)


def test_part_of_a_page_is_asked_for_whole() -> None:
    memory = Unowned(2)
    memory.unmap(1, 1)
    assert is_readable(memory.address + 100, PAGE_SIZE - 100)
    assert not is_readable(memory.address + 100, PAGE_SIZE)


def test_kernel_that_does_not_know_the_question_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def msync(self, address: int, size: int, flags: int) -> int:
            return 0

        def madvise(self, address: int, size: int, advice: int) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(mapping_module, "_libc", Kernel())
    assert is_readable(0, PAGE_SIZE)

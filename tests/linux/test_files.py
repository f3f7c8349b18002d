import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtylog.errors import KernelError
from dirtylog.linux.files import extents, lock, next_data, punch_hole
from dirtylog.units import PAGE_SIZE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A sparse file of 16 pages, with data in pages 2 to 4 and 9."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 16 * PAGE_SIZE)
    os.pwrite(fd, bytes([7]) * 3 * PAGE_SIZE, 2 * PAGE_SIZE)
    os.pwrite(fd, b"x", 9 * PAGE_SIZE)
    yield fd
    os.close(fd)


def _pages(fd: int, first: int, end: int) -> list[tuple[int, int]]:
    return [(start // PAGE_SIZE, stop // PAGE_SIZE) for start, stop in extents(fd, first * PAGE_SIZE, end * PAGE_SIZE)]


def test_extents_are_where_data_is_cropped_to_what_was_asked(file: int) -> None:
    assert _pages(file, 0, 16) == [(2, 5), (9, 10)]
    assert _pages(file, 3, 9) == [(3, 5)]
    assert _pages(file, 5, 9) == _pages(file, 10, 16) == _pages(file, 4, 4) == []


def test_next_data_is_the_place_itself_where_there_are_some(file: int) -> None:
    places = [next_data(file, page * PAGE_SIZE, 9 * PAGE_SIZE) // PAGE_SIZE for page in (0, 3, 5, 9, 12)]
    assert places == [2, 3, 9, 9, 9]


def test_hole_reads_as_zeros_and_leaves_the_rest(file: int) -> None:
    assert punch_hole(file, 3 * PAGE_SIZE, PAGE_SIZE)
    assert _pages(file, 0, 16) == [(2, 3), (4, 5), (9, 10)]
    assert os.pread(file, PAGE_SIZE, 3 * PAGE_SIZE) == bytes(PAGE_SIZE)
    assert os.fstat(file).st_size == 16 * PAGE_SIZE


def test_closed_file_is_an_error() -> None:
    with pytest.raises(KernelError):
        next_data(-1, 0, 1)
    with pytest.raises(KernelError):
        punch_hole(-1, 0, PAGE_SIZE)


def test_file_is_locked_for_one_until_it_is_closed(tmp_path: Path) -> None:
    one, other = (os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(one)
    assert not lock(other)
    os.close(one)
    assert lock(other)
    os.close(other)

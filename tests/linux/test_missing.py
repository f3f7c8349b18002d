import ctypes
import errno
import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from support.require import require
from support.touching import Touch
from support.waiting import Task, wait_until

from dirtylog.errors import AlreadyWatchedError, ClosedError, HostError, KernelError, UntrackableError
from dirtylog.linux import ioctl, missing, userfaultfd
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.missing import Fault, MissingFaults
from dirtylog.linux.userfaultfd import Access
from dirtylog.units import PAGE_SIZE

_PAGES = 8


def _contents(pages: int, first: int = 1) -> ctypes.Array[ctypes.c_char]:
    """Pages of which each holds its number, from ``first`` on."""
    data = b"".join(bytes([first + index]) * PAGE_SIZE for index in range(pages))
    return ctypes.create_string_buffer(data, len(data))


@pytest.fixture
def memory() -> Iterator[MemfdMapping]:
    with closing(MemfdMapping("test", _PAGES * PAGE_SIZE)) as mapping:
        yield mapping


@pytest.fixture
def faults(memory: MemfdMapping) -> Iterator[MissingFaults]:
    try:
        opened = MissingFaults()
    except HostError as error:
        require("userfaultfd", False, str(error))
        raise
    with opened:
        opened.register(memory.address, memory.size)
        yield opened


def _page(memory: MemfdMapping, page: int) -> int:
    return memory.address + page * PAGE_SIZE


def _copy(faults: MissingFaults, memory: MemfdMapping, first: int, pages: int) -> int:
    contents = _contents(pages)
    return faults.copy(_page(memory, first), ctypes.addressof(contents), len(contents))


def _faults(faults: MissingFaults, number: int) -> list[Fault]:
    """So many faults, once they are there."""
    found: list[Fault] = []

    def enough() -> bool:
        found.extend(faults.read())
        return len(found) >= number

    wait_until(enough, f"{number} faults came")
    return found


def _present(memory: MemfdMapping) -> list[int]:
    return [
        page for page in range(_PAGES) if memory.next_data(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) == page * PAGE_SIZE
    ]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (missing.UFFDIO_WAKE, 0x8010AA02),
        (missing.UFFDIO_COPY, 0xC028AA03),
        (missing.UFFDIO_ZEROPAGE, 0xC020AA04),
    ],
)
def test_requests_have_the_numbers_of_the_kernel_headers(request_: ioctl.Request, code: int) -> None:
    assert request_.code == code


def test_structures_have_the_kernels_sizes() -> None:
    assert ctypes.sizeof(missing._CopyArgument) == 40
    assert ctypes.sizeof(missing._ZeroArgument) == 32
    assert missing._MESSAGE.size == 32


def test_nothing_is_read_while_nobody_waits(faults: MissingFaults) -> None:
    assert faults.read() == []


def test_fault_tells_the_page_and_the_thread_that_waits(faults: MissingFaults, memory: MemfdMapping) -> None:
    touch = Touch(memory, 3 * PAGE_SIZE + 17)
    (fault,) = _faults(faults, 1)
    assert fault == Fault(_page(memory, 3), touch.thread)
    assert touch.waits
    faults.zero(fault.address, PAGE_SIZE)
    touch.result()


def test_page_that_is_there_has_no_fault(faults: MissingFaults, memory: MemfdMapping) -> None:
    assert _copy(faults, memory, 2, 1) == PAGE_SIZE
    assert Touch(memory, 2 * PAGE_SIZE).result() == b"\1"
    assert faults.read() == []


def test_copy_fills_pages_and_lets_all_who_wait_go_on(faults: MissingFaults, memory: MemfdMapping) -> None:
    touches = [Touch(memory, page * PAGE_SIZE, PAGE_SIZE) for page in (2, 3, 3, 4)]
    assert {fault.thread for fault in _faults(faults, 4)} == {touch.thread for touch in touches}
    assert _copy(faults, memory, 2, 3) == 3 * PAGE_SIZE
    assert [touch.result() for touch in touches] == [bytes([number]) * PAGE_SIZE for number in (1, 2, 2, 3)]
    assert _present(memory) == [2, 3, 4]


def test_copy_ends_at_a_page_that_is_there(faults: MissingFaults, memory: MemfdMapping) -> None:  # EEXIST
    os.pwrite(memory.fd, b"x" * PAGE_SIZE, 3 * PAGE_SIZE)
    assert _copy(faults, memory, 2, 3) == PAGE_SIZE
    assert _copy(faults, memory, 3, 1) == 0
    assert _present(memory) == [2, 3]
    assert Touch(memory, 3 * PAGE_SIZE).result() == b"x"


def test_zero_fills_a_hole_and_lets_who_waits_go_on(faults: MissingFaults, memory: MemfdMapping) -> None:
    touch = Touch(memory, 5 * PAGE_SIZE, PAGE_SIZE)
    _faults(faults, 1)
    faults.zero(_page(memory, 4), 3 * PAGE_SIZE)
    assert touch.result() == bytes(PAGE_SIZE)
    assert _present(memory) == [4, 5, 6]


def test_zero_leaves_what_is_there_and_what_is_behind_it(faults: MissingFaults, memory: MemfdMapping) -> None:
    _copy(faults, memory, 3, 1)
    faults.zero(_page(memory, 2), 3 * PAGE_SIZE)
    assert _present(memory) == [2, 3]
    assert Touch(memory, 3 * PAGE_SIZE).result() == b"\1"


def test_zero_wakes_who_waits_for_a_page_that_came_otherwise(faults: MissingFaults, memory: MemfdMapping) -> None:
    touch = Touch(memory, 3 * PAGE_SIZE)
    _faults(faults, 1)
    os.pwrite(memory.fd, b"x" * PAGE_SIZE, 3 * PAGE_SIZE)
    faults.zero(_page(memory, 3), PAGE_SIZE)
    assert touch.result() == b"x"


@pytest.mark.parametrize("end", [lambda faults, at: faults.unregister(at, PAGE_SIZE), lambda faults, _: faults.close()])
def test_who_waits_finds_zeros_when_it_ends(
    faults: MissingFaults, memory: MemfdMapping, end: Callable[[MissingFaults, int], None]
) -> None:
    touch = Touch(memory, 1 * PAGE_SIZE)
    _faults(faults, 1)
    assert touch.waits
    end(faults, _page(memory, 1))
    assert touch.result() == b"\0"


def test_part_that_was_unregistered_has_no_more_faults(faults: MissingFaults, memory: MemfdMapping) -> None:
    faults.unregister(_page(memory, 4), 4 * PAGE_SIZE)
    assert Touch(memory, 5 * PAGE_SIZE).result() == b"\0"
    assert faults.read() == []
    touch = Touch(memory, 3 * PAGE_SIZE)
    assert [fault.address for fault in _faults(faults, 1)] == [_page(memory, 3)]
    faults.zero(_page(memory, 3), PAGE_SIZE)
    touch.result()


def test_kernel_waits_for_pages_as_threads_do(faults: MissingFaults, memory: MemfdMapping) -> None:
    require("userfaultfd-kernel", faults.of_kernel, "this process is not served the faults that the kernel takes")
    read, write = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        task = Task(lambda: os.write(write, memory.memory[PAGE_SIZE : PAGE_SIZE + 1]))
        assert [fault.address for fault in _faults(faults, 1)] == [_page(memory, 1)]
        assert task.running
        _copy(faults, memory, 1, 1)
        task.join()
        assert os.read(read, 1) == b"\1"


def test_access_for_user_mode_serves_no_faults_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        access = Access.USER_MODE

        def __init__(self, _: object) -> None:
            self.fd = -1

    monkeypatch.setattr(missing, "Userfaultfd", Opened)
    assert not MissingFaults().of_kernel


def test_memory_of_another_userfaultfd_is_refused(faults: MissingFaults, memory: MemfdMapping) -> None:
    with MissingFaults() as other, pytest.raises(AlreadyWatchedError):
        other.register(memory.address, PAGE_SIZE)


def test_memory_that_is_not_mapped_is_refused(faults: MissingFaults) -> None:
    with pytest.raises(UntrackableError):
        faults.register(PAGE_SIZE, PAGE_SIZE)


@pytest.mark.parametrize("fill", ["copy", "zero"])
def test_filling_what_is_not_registered_is_an_error(faults: MissingFaults, memory: MemfdMapping, fill: str) -> None:
    faults.unregister(memory.address, memory.size)
    with pytest.raises(KernelError) as caught:
        _copy(faults, memory, 0, 1) if fill == "copy" else faults.zero(memory.address, PAGE_SIZE)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("fill", ["copy", "zero"])
def test_filling_goes_on_where_the_kernel_was_interrupted(
    faults: MissingFaults, memory: MemfdMapping, fill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, interrupted = ioctl.ioctl, [-errno.EAGAIN, PAGE_SIZE, 2 * PAGE_SIZE]

    def call(fd: int, request: ioctl.Request, argument: Any = 0) -> int:
        """Fill as much as the list says and be interrupted then, until the list is empty."""
        if request is missing.UFFDIO_WAKE or not interrupted:
            return real(fd, request, argument)
        done = interrupted.pop(0)
        if done > 0 and fill == "copy":
            real(fd, request, missing._CopyArgument(argument.dst, argument.src, done))
        elif done > 0:
            real(fd, request, missing._ZeroArgument(userfaultfd.RangeArgument(argument.range.start, done)))
        setattr(argument, "copy" if fill == "copy" else "zeropage", done)
        raise ioctl.kernel_error(request.name, OSError(errno.EAGAIN, "Resource temporarily unavailable"))

    monkeypatch.setattr(missing, "ioctl", call)
    if fill == "copy":
        assert _copy(faults, memory, 1, 5) == 5 * PAGE_SIZE
    else:
        faults.zero(_page(memory, 1), 5 * PAGE_SIZE)
    assert not interrupted
    assert _present(memory) == [1, 2, 3, 4, 5]
    expected = bytes(range(1, 6)) if fill == "copy" else bytes(5)
    assert memory.array[PAGE_SIZE : 6 * PAGE_SIZE : PAGE_SIZE].tobytes() == expected


def test_descriptor_is_readable_while_there_are_faults(faults: MissingFaults, memory: MemfdMapping) -> None:
    touch = Touch(memory, 0 * PAGE_SIZE)
    wait_until(lambda: select.select([faults], [], [], 0)[0], "there is a fault")
    _faults(faults, 1)
    assert select.select([faults], [], [], 0)[0] == []
    faults.zero(memory.address, PAGE_SIZE)
    touch.result()


def test_closed_is_refused_and_closes_again(faults: MissingFaults, memory: MemfdMapping) -> None:
    faults.close()
    faults.close()
    with pytest.raises(ClosedError):
        faults.register(memory.address, memory.size)
    with pytest.raises(HostError, match="page faults cannot be read any more"):
        faults.read()

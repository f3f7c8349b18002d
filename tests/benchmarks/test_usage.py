import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.waiting import wait_until

from benchmarks.support.usage import (
    CPUTime,
    ResidentMemory,
    busiest_thread,
    parse_stolen,
    resident_guest_ram,
    stolen,
    thread_times,
)
from dirtylog.units import KIB, MIB

STATUS = """Name:\tx
VmHWM:\t  700 kB
VmRSS:\t  650 kB
RssAnon:\t  100 kB
RssFile:\t   50 kB
RssShmem:\t  500 kB
Threads:\t3
"""


def mapping(low: int, size: int, resident: int, rights: str = "rw-s") -> str:
    return f"{low:x}-{low + size:x} {rights} 00000000 00:01 7 /x\nSize: {size // KIB} kB\nRss: {resident} kB\n"


def test_cpu_time_is_read_behind_a_name_with_spaces_and_parentheses() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"17 (a) b (c) S {' '.join(['1'] * 10)} {3 * ticks} {ticks} 0 0\n"
    assert CPUTime.parse(stat) == CPUTime(3.0, 1.0)
    assert CPUTime.parse(stat).total == 4.0


def test_cpu_time_in_between_is_a_difference() -> None:
    assert CPUTime(3.0, 1.5).since(CPUTime(1.0, 1.0)) == CPUTime(2.0, 0.5)


def test_cpu_time_of_this_process_is_what_the_kernel_counts() -> None:
    seen = CPUTime.of(os.getpid())
    assert seen.total <= sum(os.times()[:2]) + 0.05


def test_thread_that_works_is_the_busiest() -> None:
    before, done = thread_times(os.getpid()), threading.Event()

    def work() -> int:
        while not done.is_set():
            pass
        return threading.get_native_id()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            (thread,) = (thread for thread in thread_times(os.getpid()) if thread not in before)
            wait_until(lambda: thread_times(os.getpid())[thread] > 0.05, "the thread has worked")
            assert busiest_thread(before, thread_times(os.getpid())) == thread
        finally:
            done.set()
        assert working.result() == thread


def test_process_without_threads_has_no_busiest() -> None:
    assert busiest_thread({}, {}) is None


@pytest.mark.parametrize(
    ("stat", "ticks"),
    [
        ("cpu  1 2 3 4 5 6 7 80 9 10\ncpu0 1 2 3 4 5 6 7 40 9 10\n", 80),
        ("cpu  1 2 3 4 5 6 7 80\n", 80),
        ("cpu  1 2 3 4 5 6 7\ncpu0 1 2 3 4 5 6 7 8 9 10\n", 0),
        ("", 0),
    ],
    ids=["all", "last", "none", "nothing"],
)
def test_steal_is_the_eighth_number_of_the_first_line_or_0(stat: str, ticks: int) -> None:
    assert parse_stolen(stat) == ticks / os.sysconf("SC_CLK_TCK")


def test_steal_of_this_host_never_shrinks() -> None:
    before = stolen()
    assert 0 <= before <= stolen()


def test_memory_beyond_the_guest_is_the_peak_without_guest_ram() -> None:
    memory = ResidentMemory.parse(STATUS, mapping(0, 4 * MIB, 500), 4 * MIB)
    assert memory == ResidentMemory(700 * KIB, 100 * KIB, 50 * KIB, 500 * KIB, 500 * KIB)
    assert memory.beyond_guest(memory) == 200 * KIB


def test_memory_beyond_the_guest_is_the_peak_without_the_most_that_guest_ram_was() -> None:
    earlier, now = (ResidentMemory.parse(STATUS, mapping(0, 4 * MIB, size), 4 * MIB) for size in (600, 500))
    assert now.beyond_guest(earlier) == 100 * KIB
    assert earlier.beyond_guest(now) == 100 * KIB


def test_memory_beyond_the_guest_is_unknown_without_a_mapping_of_its_size() -> None:
    unknown, known = (ResidentMemory.parse(STATUS, mapping(0, size, 500), 4 * MIB) for size in (MIB, 4 * MIB))
    assert unknown.beyond_guest(known) is None
    assert known.beyond_guest(unknown) is None


@pytest.mark.parametrize(
    ("smaps", "expected"),
    [
        (mapping(0, 64 * MIB, 8), 8 * KIB),
        (mapping(0, 64 * MIB, 8) + mapping(1 << 40, MIB, 4), 8 * KIB),
        (mapping(0, 64 * MIB + 8 * KIB, 8), 8 * KIB),
        (mapping(0, 128 * MIB, 8), None),
        (mapping(0, 64 * MIB, 8) + mapping(1 << 40, 65 * MIB, 8), None),
        (mapping(0, 64 * MIB, 8, "rw-p"), 8 * KIB),
        (mapping(0, 64 * MIB, 4, "rw-p") + mapping(1 << 40, 64 * MIB, 8), 8 * KIB),
        (mapping(0, 64 * MIB, 4, "---p") + mapping(1 << 40, 64 * MIB, 8, "rw-p"), 8 * KIB),
        ("", None),
    ],
    ids=[
        "alone",
        "among others",
        "joined with a neighbour",
        "too large",
        "ambiguous",
        "private",
        "shared before private",
        "reserved only",
        "none",
    ],
)
def test_guest_ram_is_the_one_mapping_of_its_size(smaps: str, expected: int | None) -> None:
    assert resident_guest_ram(smaps, 64 * MIB) == expected


def test_resident_guest_ram_is_what_was_touched() -> None:
    size = 333 * MIB
    with mmap.mmap(-1, size) as ram:
        ram[: 5 * MIB] = bytes([1]) * (5 * MIB)
        assert resident_guest_ram(Path("/proc/self/smaps").read_text(), size) == 5 * MIB

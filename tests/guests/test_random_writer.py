import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.closed_form import distinct_pages
from support.waiting import wait_until

from dirtylog.errors import UsageError
from dirtylog.guests import random_writer
from dirtylog.machine import KVMMachine, UnicornMachine, boot_sector
from dirtylog.units import MIB, PAGE_SIZE

SHIPPED: Final = Path(__file__).parents[2] / "src/dirtylog/guests/random_writer.img"
FIRST, LAST = 1 * MIB, 3 * MIB + 5 * PAGE_SIZE


def slow_page_numbers(pages: int, count: int, seed: int) -> list[int]:
    """As the guest computes them, one after the other."""
    found = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        found.append(seed * pages >> 32)
    return found


@given(
    pages=st.integers(1, 1 << 20),
    first=st.integers(0, 300),
    count=st.integers(0, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_page_numbers_are_those_the_guest_computes(pages: int, first: int, count: int, seed: int) -> None:
    found = random_writer.page_numbers(pages, first, count, seed=seed)
    assert found.tolist() == slow_page_numbers(pages, first + count, seed)[first:]


def test_long_rows_of_page_numbers_are_continued() -> None:
    whole = random_writer.page_numbers(1000, 0, 200_000)
    assert whole[:70_000].tolist() == slow_page_numbers(1000, 70_000, random_writer.DEFAULT_SEED)
    assert (random_writer.page_numbers(1000, 150_000, 50_000) == whole[150_000:]).all()


def test_numbers_come_again_after_two_to_the_32() -> None:
    early = random_writer.page_numbers(1 << 20, 0, 100)
    assert (random_writer.page_numbers(1 << 20, 1 << 32, 100) == early).all()
    assert not (random_writer.page_numbers(1 << 20, 1 << 31, 100) == early).all()


@pytest.mark.parametrize("pages", [256, 5000, 25_344])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0])
def test_distinct_pages_are_as_many_as_the_closed_form_says(pages: int, ratio: float) -> None:
    writes = int(pages * ratio)
    expected = distinct_pages(pages, writes)
    numbers = random_writer.page_numbers(pages, 0, 50 * writes).reshape(50, writes)
    off = [(len(np.unique(row)) - expected.mean) / expected.deviation for row in numbers]
    assert max(map(abs, off)) < 4
    assert abs(sum(off)) / 50**0.5 < 4


def test_range_and_seed_are_patched_and_nothing_else() -> None:
    image, shipped = random_writer.build(2 * MIB, 8 * MIB, seed=0xDEADBEEF, rate=4096e3), SHIPPED.read_bytes()
    assert struct.unpack_from("<4sIIII", image, 4) == (b"DLR2", 2 * MIB, 8 * MIB, 0xDEADBEEF, 1_000_000)
    assert image[:8] == shipped[:8]
    assert image[24:] == shipped[24:]


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seed_that_does_not_fit_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="does not have 32 bits"):
        random_writer.build(1 * MIB, 2 * MIB, seed=seed)


@pytest.mark.parametrize("rate", [-1, 40_959, 4096e9 + 1, float("nan")])
def test_rate_that_no_interval_makes_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="cannot dirty"):
        random_writer.build(1 * MIB, 2 * MIB, rate=rate)


def written(pages: int, writes: int, seed: int = random_writer.DEFAULT_SEED) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.bincount(slow_page_numbers(pages, writes, seed), minlength=pages).astype(np.uint8)


def test_pages_that_the_writes_explain_are_good() -> None:
    assert random_writer.check_pages(written(10, 5000), 5000) is None
    assert random_writer.check_pages(written(10, 5001), 5000) is None
    assert random_writer.check_pages(written(10, 50, seed=3), 50, seed=3) is None


@pytest.mark.parametrize("writes", [4998, 5001])
def test_pages_that_the_writes_do_not_explain_are_told(writes: int) -> None:
    problem = random_writer.check_pages(written(10, 5000), writes)
    assert problem is not None
    assert f"which {writes} writes do not explain" in problem


@pytest.mark.parametrize("pages", [np.zeros(0, np.uint8), np.zeros(4, np.int64), np.zeros((2, 2), np.uint8)])
def test_pages_that_are_no_row_of_bytes_are_refused(pages: Any) -> None:
    with pytest.raises(UsageError, match="a row of bytes"):
        random_writer.check_pages(pages, 0)


@pytest.fixture
def guest(kvm: object) -> Iterator[KVMMachine]:
    guest = KVMMachine(4 * MIB)
    boot_sector(guest, random_writer.build(FIRST, LAST, seed=7))
    yield guest
    guest.close()


def writes(guest: KVMMachine) -> int:
    return int.from_bytes(guest.system.read(random_writer.COUNTER_ADDRESS, 8), "little")


def test_promise_holds_whenever_kvm_stops_the_guest(guest: KVMMachine) -> None:
    for _ in range(5):
        before = writes(guest)
        guest.resume()
        wait_until(lambda before=before: writes(guest) > before + 500, "the guest wrote on")  # type: ignore[misc]
        guest.pause()
        assert guest.system.read(random_writer.STARTED_ADDRESS, 4) == random_writer.STARTED
        memory = np.frombuffer(guest.system.read(0, 4 * MIB), np.uint8)
        assert random_writer.check_pages(memory[FIRST:LAST:PAGE_SIZE], writes(guest), seed=7) is None
        assert not memory[LAST:].any()


@pytest.mark.parametrize("rate", [4096e3, 8192e3])
def test_guest_with_a_rate_holds_it(kvm: object, rate: float) -> None:
    with closing(KVMMachine(4 * MIB)) as guest:
        boot_sector(guest, random_writer.build(FIRST, LAST, rate=rate))
        guest.resume()
        wait_until(lambda: writes(guest) > 100, "the guest began to write")
        first, began = writes(guest), time.monotonic()
        wait_until(lambda: writes(guest) > first + rate / PAGE_SIZE / 2, "the guest wrote for half a second")
        made, taken = writes(guest) - first, time.monotonic() - began
        guest.pause()
        # A busy host may keep it from writing; what it makes up for, and how late we look, are milliseconds.
        assert made <= rate / PAGE_SIZE * (taken + 0.6)
        assert guest.system.read(random_writer.STARTED_ADDRESS, 4) == random_writer.STARTED
        memory = np.frombuffer(guest.system.read(0, 4 * MIB), np.uint8)
        assert random_writer.check_pages(memory[FIRST:LAST:PAGE_SIZE], writes(guest)) is None


def test_guest_with_a_rate_says_so_and_halts_where_nobody_tells_the_time() -> None:
    said: list[bytes] = []
    with closing(UnicornMachine(4 * MIB, transmit=said.append)) as guest:
        boot_sector(guest, random_writer.build(FIRST, LAST, rate=4096e3))
        guest.resume()
        wait_until(lambda: said, "the guest said something")
        guest.pause()
        assert said == [b"?"]
        assert guest.system.read(random_writer.STARTED_ADDRESS, 4) != random_writer.STARTED

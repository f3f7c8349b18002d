"""What those who keep translations hear of the host's writes."""

from collections.abc import Iterator

import numpy as np
import pytest

from dirtylog.memory import Client, Memory, MemoryRegion, TrackingReason
from dirtylog.units import PAGE_SIZE

Told = list[tuple[MemoryRegion, int, int]]


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def note(memory: Memory) -> Told:
    told: Told = []
    memory.code_written = lambda region, first, count: told.append((region, first, count))
    return told


def test_host_writes_are_told_with_their_pages(memory: Memory) -> None:
    ram = memory.ram("ram", 8 * PAGE_SIZE)
    root = memory.container("root")
    root.add(ram, PAGE_SIZE)
    space = memory.address_space("space", root)
    memory.set_code_client(True)
    told = note(memory)
    space.write(PAGE_SIZE + 10, b"x")
    space.write(3 * PAGE_SIZE - 1, b"xx")
    assert told == [(ram, 0, 1), (ram, 1, 2)]


def test_bytes_and_bits_are_in_place_when_it_is_told(memory: Memory) -> None:  # D12
    ram = memory.ram("ram", PAGE_SIZE)
    space = memory.address_space("space", ram)
    memory.set_code_client(True)
    ram.test_and_clear_dirty(0, PAGE_SIZE, Client.CODE)
    seen: list[tuple[bytes, bool]] = []
    memory.code_written = lambda region, *_: seen.append((space.read(0, 1), region.is_dirty(0, 1, Client.CODE)))
    space.write(0, b"x")
    assert seen == [(b"x", True)]


def test_without_the_code_client_nobody_is_told(memory: Memory) -> None:
    ram = memory.ram("ram", PAGE_SIZE)
    told = note(memory)
    memory.start_logging(TrackingReason.MIGRATION)
    ram.set_dirty(0, 1)
    memory.set_code_client(True)
    memory.code_written = None
    ram.set_dirty(0, 1)
    assert told == []


def test_what_trackers_find_is_not_told(memory: Memory) -> None:
    ram = memory.ram("ram", PAGE_SIZE)
    memory.set_code_client(True)
    told = note(memory)
    ram.merge_dirty(np.ones(1, np.uint64), 0, 1)
    assert told == []

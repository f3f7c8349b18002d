from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.benchmark_runs import require_assembler

from benchmarks.support.guest import Guest
from benchmarks.support.workloads import (
    CONTENTS_ADDRESS,
    Idle,
    Pulses,
    RandomWrites,
    Rounds,
    Workload,
    random_slabs,
    write_files,
)
from dirtylog.guests import dirtier, random_writer
from dirtylog.guests.sector import LOAD_ADDRESS
from dirtylog.units import MIB

ALL: list[Workload] = [Rounds(MIB, 3 * MIB), Idle(40 * MIB), RandomWrites(MIB, 3 * MIB, 90e6, 5 * MIB)]


class Told:
    """A guest that says what tests tell it to."""

    def __init__(self, rounds: int | None, memory: bytes = b"") -> None:
        self.count = rounds
        self.memory = memory
        self.qmp = self

    def execute(self, command: str) -> None:
        assert command == "stop"

    def rounds(self) -> int | None:
        return self.count

    def reach(self, rounds: int) -> int:
        return rounds

    def read(self, address: int, size: int) -> bytes:
        return self.memory[address - CONTENTS_ADDRESS :][:size]

    def first_bytes(self, first: int, last: int) -> Any:
        return np.zeros((last - first) // 4096, np.uint8)


def check(workload: Workload, guest: Told, before: int) -> str | None:
    return workload.check(cast("Guest", guest), before)


@pytest.mark.parametrize("workload", ALL, ids=str)
def test_files_are_what_both_peers_need(workload: Workload, tmp_path: Path) -> None:
    files = write_files(workload, tmp_path)
    image = files.image.read_bytes()
    assert len(image) == 512
    assert image.endswith(b"\x55\xaa")
    if workload.contents:
        assert files.contents is not None
        assert files.flat is not None
        contents, flat = files.contents.read_bytes(), files.flat.read_bytes()
        assert contents == b"".join(slab for _, slab in random_slabs(workload.contents))
        assert len(contents) == workload.contents
        assert flat[:512] == image
        assert flat[CONTENTS_ADDRESS - LOAD_ADDRESS :] == contents
        assert not any(flat[512 : CONTENTS_ADDRESS - LOAD_ADDRESS])
    files.discard()
    assert not list(tmp_path.iterdir())


def test_sectors_are_those_of_the_guests() -> None:
    assert Rounds(MIB, 2 * MIB).image() == dirtier.build(MIB, 2 * MIB)
    assert RandomWrites(MIB, 2 * MIB, 90e6, 0).image() == random_writer.build(MIB, 2 * MIB, rate=90e6)


def test_pulses_are_a_sector_with_the_range_of_the_dirtier() -> None:
    require_assembler()
    image, dirtier_image = Pulses(2 * MIB, 3 * MIB).image(), dirtier.build(2 * MIB, 3 * MIB)
    assert len(image) == 512
    assert image.endswith(b"\x55\xaa")
    assert image[8:16] == dirtier_image[8:16]
    assert image[4:8] != dirtier_image[4:8]
    assert Pulses(1 * MIB, 2 * MIB).image() != image


def test_pulses_are_told_from_rounds_and_checked_as_they_are() -> None:
    workload = Pulses(MIB, 3 * MIB)
    assert str(workload) == "writes 1..3 MiB and sends a character every 32 pages"
    assert workload.pulses
    assert not any(other.pulses for other in ALL)
    assert check(workload, Told(6), 7) == check(Rounds(MIB, 3 * MIB), Told(6), 7)


def test_end_is_that_of_what_is_written_and_of_what_has_contents() -> None:
    assert [workload.end for workload in ALL] == [3 * MIB, 41 * MIB, 6 * MIB]
    assert RandomWrites(MIB, 8 * MIB, 90e6, 5 * MIB).end == 8 * MIB


def test_what_a_guest_does_is_told() -> None:
    assert [str(workload) for workload in ALL] == [
        "writes 1..3 MiB",
        "is idle and has 40.0 MiB of random contents",
        "writes 1..3 MiB at random, 85.8 MiB/s",
    ]


@pytest.mark.parametrize("workload", ALL[::2], ids=str)
def test_guest_that_fell_back_is_damaged(workload: Workload) -> None:
    for count in (None, 6):
        assert f"and {count} after it was migrated" in str(check(workload, Told(count), 7))


def test_idle_guest_is_whole_with_its_contents_and_its_marker_only() -> None:
    memory = b"".join(slab for _, slab in random_slabs(40 * MIB))
    assert check(Idle(40 * MIB), Told(0, memory), 0) is None
    assert check(Idle(40 * MIB), Told(None, memory), 0) == "what it wrote is not there"
    broken = memory[: 35 * MIB] + bytes([memory[35 * MIB] ^ 1]) + memory[35 * MIB + 1 :]
    assert "from 0x2000000 on" in str(check(Idle(40 * MIB), Told(0, broken), 0))


def test_writer_whose_pages_are_others_is_damaged() -> None:
    assert "writes do not explain" in str(check(RandomWrites(MIB, 3 * MIB, 90e6, 0), Told(700), 600))

"""Disks that are full, and limits of files, wherever a migration to a file comes to them."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from support.dirtier_runs import MEMORY, RANGE, Place
from support.fake_machine import FakeMachine
from support.guests import contents
from support.processes import dirtylog
from support.small_disk import small_disk
from support.streams import fake_machine
from support.waiting import wait_until

from dirtylog.errors import HostError, UsageError
from dirtylog.machine import RunState
from dirtylog.migration import IncomingFile, OutgoingMigration, Parameters, Status
from dirtylog.migration.address import FileAddress
from dirtylog.migration.agreement import block_infos
from dirtylog.migration.file import Layout
from dirtylog.migration.messages import State
from dirtylog.units import PAGE_SIZE

_FACTS: Final = 3
"""Pages that the file takes besides memory: its head, the description and the state."""


@pytest.fixture
def guest() -> Iterator[FakeMachine]:
    """Runs."""
    with fake_machine() as guest:
        guest.resume()
        yield guest


def _data_pages(guest: FakeMachine) -> int:
    """Those that are not zero."""
    blocks = guest.memory.blocks.values()
    return sum(int(block.array.reshape(-1, PAGE_SIZE).any(axis=1).sum()) for block in blocks)


def _check_fails(guest: FakeMachine, path: Path, cause: str) -> None:
    """The error names the file and what to do; the guest runs on, and nothing is left behind."""
    outgoing = OutgoingMigration(guest, FileAddress(str(path)), Parameters(verify=True))
    with pytest.raises(HostError) as caught:
        outgoing.run()
    assert caught.value.cause == f"the machine cannot be written to {path}: {cause}"
    assert caught.value.remedy is not None
    assert "whether there is room" in caught.value.remedy
    assert "ulimit -f" in caught.value.remedy
    assert (outgoing.status, guest.state) == (Status.FAILED, RunState.RUNNING)


def _check_goes_on(guest: FakeMachine, path: Path) -> None:
    """It can be migrated to a file after all, and is all there."""
    guest.pause()
    before = contents(guest)
    guest.resume()
    OutgoingMigration(guest, FileAddress(str(path)), Parameters(verify=True)).run()
    with fake_machine(boot=False) as other:
        IncomingFile(other, str(path)).run()
        assert other.state is RunState.RUNNING
        other.pause()
        assert all(np.array_equal(array, before[name]) for name, array in contents(other).items())


_ROOM: Final[dict[str, Callable[[int], int]]] = {
    "for a page": lambda _: 1,
    "for half of memory": lambda data: data // 2,
    "for memory but not the state": lambda data: data,
    "for the state but not the description": lambda data: data + 1,
    "for all but the head": lambda data: data + _FACTS - 1,
}


@pytest.mark.parametrize("room", _ROOM)
@pytest.mark.parametrize("replaces", [False, True], ids=["", "replaces"])
def test_full_disk_leaves_the_guest_running_and_no_half_of_a_file(  # M2
    guest: FakeMachine, tmp_path: Path, room: str, replaces: bool
) -> None:
    data = _data_pages(guest)
    kept = data + _FACTS if replaces else 0
    with small_disk(tmp_path, kept + _ROOM[room](data)) as directory:
        path = directory / "saved"
        if replaces:
            _check_goes_on(guest, path)
            guest.resume()  # as the operator may
            before = path.read_bytes()
        _check_fails(guest, path, "No space left on device")
        assert os.listdir(directory) == (["saved"] if replaces else [])
        if replaces:
            assert path.read_bytes() == before
        else:
            with pytest.raises(UsageError, match="there is no machine in"):
                IncomingFile(guest, str(path))
        assert os.statvfs(directory).f_bfree == _ROOM[room](data)
    _check_goes_on(guest, tmp_path / "saved")


def test_disk_with_just_enough_room_is_enough(guest: FakeMachine, tmp_path: Path) -> None:
    with small_disk(tmp_path, _data_pages(guest) + _FACTS) as directory:
        _check_goes_on(guest, directory / "saved")


def test_disk_that_takes_no_more_files_leaves_the_guest_running(guest: FakeMachine, tmp_path: Path) -> None:  # M2
    with small_disk(tmp_path, 1000, files=0) as directory:
        _check_fails(guest, directory / "saved", "No space left on device")
    _check_goes_on(guest, tmp_path / "saved")


@contextmanager
def _no_file_longer_than(size: int) -> Iterator[None]:
    """For this process; Python ignores the signal that would come with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("beyond", [-1, 0, 7], ids=["in-memory", "before-the-state", "in-the-state"])
def test_file_longer_than_may_be_leaves_the_guest_running(  # M2
    guest: FakeMachine, tmp_path: Path, beyond: int
) -> None:
    path = tmp_path / "saved"
    with _no_file_longer_than(Layout(block_infos(guest)).end + beyond):
        _check_fails(guest, path, "File too large")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="there is no machine in"):
        IncomingFile(guest, str(path))
    _check_goes_on(guest, path)


def test_file_that_is_just_as_long_as_may_be_is_whole(guest: FakeMachine, tmp_path: Path) -> None:
    guest.pause()
    state = len(msgspec.msgpack.encode(State(True, guest.save_state())))
    guest.resume()
    with _no_file_longer_than(Layout(block_infos(guest)).end + state):
        OutgoingMigration(guest, FileAddress(str(tmp_path / "saved")), Parameters()).run()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("accel", ["kvm", "unicorn"])
def test_real_guest_runs_on_when_the_disk_is_full_and_is_saved_elsewhere(  # D1, M2
    request: pytest.FixtureRequest, tmp_path: Path, accel: str
) -> None:
    if accel == "kvm":
        request.getfixturevalue("kvm")
    place = Place(tmp_path)
    full, good, qmp = tmp_path / "full", place.path("saved"), place.path("source.qmp")
    full.mkdir()
    pages = (RANGE[1] - RANGE[0]) // PAGE_SIZE
    with place.source("--accel", accel) as source, small_disk(full, pages // 2) as directory:
        place.wait_for_round(source)
        path = directory / "saved"
        with dirtylog("migrate", qmp, f"file:{path}") as migration:
            assert migration.wait() == 5, migration.err
            assert f"the machine cannot be written to {path}: No space left on device" in migration.err
            assert "see whether there is room" in migration.err
        assert os.listdir(directory) == []
        place.check_runs_on(source)
        with dirtylog("run", "--accel", accel, "--memory", MEMORY, "--incoming", f"file:{path}") as run:
            assert run.wait() == 2
            assert f"there is no machine in {path}" in run.err
        with dirtylog("migrate", qmp, f"file:{good}", "--verify") as migration:
            assert migration.wait() == 0, migration.err
    with place.destination(f"file:{good}", "--accel", accel) as destination:
        wait_until(lambda: destination.state == "running", "it runs from the file")
        place.check_runs_on(destination)

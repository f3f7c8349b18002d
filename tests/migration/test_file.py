import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.fake_machine import FakeMachine

from dirtylog.errors import CancelledError, DirtylogError, HostError, KernelError, ProtocolError, UsageError
from dirtylog.linux import files
from dirtylog.machine import RunState
from dirtylog.memory import RAMBlock
from dirtylog.migration import file as file_module
from dirtylog.migration.address import FileAddress
from dirtylog.migration.file import FileOutlet, Layout, MachineFile
from dirtylog.migration.incoming_file import IncomingFile
from dirtylog.migration.messages import (
    MAX_BODY,
    MAX_NAMES,
    BlockInfo,
    EncodedPages,
    Handover,
    Hello,
    Joined,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    State,
    Taken,
    Welcome,
    ZeroPages,
)
from dirtylog.migration.outgoing import OutgoingMigration
from dirtylog.migration.parameters import Compression, Parameters
from dirtylog.migration.statistics import Status
from dirtylog.units import MIB, PAGE_SIZE

_PAGES = 700
_BLOCKS = (BlockInfo("ram", _PAGES * PAGE_SIZE, PAGE_SIZE), BlockInfo("rom", 3 * PAGE_SIZE, PAGE_SIZE))
_STATE = State(True, {"cpu0": {"regs": b"1234"}})


def _runs(*runs: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array(runs, np.int64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "machine"


@pytest.fixture
def blocks() -> Iterator[list[RAMBlock]]:
    blocks = [RAMBlock(info.name, info.size) for info in _BLOCKS]
    yield blocks
    for block in blocks:
        block.close()


def _begin(path: Path) -> FileOutlet:
    outlet = FileOutlet(str(path))
    outlet.send(Hello("toy", _BLOCKS, False, 1, bytes(16), False, False))
    outlet.expect(Welcome)
    return outlet


def _write(path: Path, number: int = 7) -> None:
    """A whole machine, in two passes."""
    with closing(_begin(path)) as outlet:
        contents = bytes([number]) * PAGE_SIZE
        outlet.send(Pages(0, _runs((3, 2), (600, 1))), [memoryview(contents * 2), memoryview(contents)])
        outlet.send(ZeroPages(0, _runs((0, 3), (5, 595), (601, 99))))
        outlet.send(Pages(1, _runs((2, 1))), [memoryview(contents)])
        outlet.send(PassEnd(1))
        assert outlet.expect(PassDone).number == 1
        outlet.send(ZeroPages(0, _runs((4, 1))))
        outlet.send(Pages(0, _runs((699, 1))), [memoryview(contents)])
        outlet.send(PassEnd(2))
        outlet.send(_STATE)
        outlet.expect(Ready)
        outlet.send(Handover())
        outlet.expect(Taken)


def _numbers(block: RAMBlock) -> dict[int, int]:
    rows = block.array.reshape(-1, PAGE_SIZE)
    return {int(page): int(rows[page, 0]) for page in np.flatnonzero(rows.any(axis=1))}


def test_what_was_written_is_read_again(path: Path, blocks: list[RAMBlock]) -> None:
    _write(path)
    for _ in range(2):
        with closing(MachineFile(str(path))) as machine:
            assert (machine.description.machine, machine.description.blocks) == ("toy", _BLOCKS)
            assert machine.state == _STATE
            assert sum(machine.fill(blocks)) >= 4 * PAGE_SIZE
        assert _numbers(blocks[0]) == {3: 7, 600: 7, 699: 7}
        assert _numbers(blocks[1]) == {2: 7}


def test_file_has_a_place_for_each_page_and_room_for_what_is_not_zero(path: Path) -> None:
    _write(path)
    layout = Layout(_BLOCKS)
    assert path.stat().st_size == layout.end + len(msgspec.msgpack.encode(_STATE))
    assert path.stat().st_blocks * 512 < MIB
    assert [start % (2 * MIB) for start in (*layout.starts, layout.end)] == [0, 0, 0]


def test_whole_machine_takes_the_place_of_the_one_before(path: Path, blocks: list[RAMBlock]) -> None:
    for number in (1, 2):
        _write(path, number)
    with closing(MachineFile(str(path))) as machine:
        list(machine.fill(blocks))
    assert _numbers(blocks[0]) == {3: 2, 600: 2, 699: 2}
    assert os.listdir(path.parent) == ["machine"]


def test_file_is_in_its_place_once_it_is_complete(path: Path) -> None:
    with closing(_begin(path)) as outlet:
        outlet.send(PassEnd(1))
        outlet.send(_STATE)
        assert not path.exists()
        outlet.send(Handover())
        assert path.exists()


def test_what_is_not_complete_leaves_nothing_and_what_was_there_before(path: Path) -> None:
    _write(path)
    before = path.read_bytes()
    outlet = _begin(path)
    outlet.send(Pages(0, _runs((0, 1))), [memoryview(bytes(PAGE_SIZE))])
    for _ in range(2):
        outlet.close()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["machine"]


def test_rest_of_one_who_was_killed_is_in_nobodys_way(path: Path, blocks: list[RAMBlock]) -> None:
    path.with_name("machine.partial").write_bytes(b"\1" * 10 * MIB)
    _write(path)
    with closing(MachineFile(str(path))) as machine:
        list(machine.fill(blocks))
    assert _numbers(blocks[0]) == {3: 7, 600: 7, 699: 7}


def test_two_who_write_to_one_place_are_refused(path: Path) -> None:
    with closing(_begin(path)), pytest.raises(UsageError, match="somebody else writes"):
        FileOutlet(str(path))
    _write(path)


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda path: path.mkdir(), UsageError, "is no file"),
        (lambda path: path.parent.chmod(0o500), HostError, "cannot be written"),
    ],
    ids=["directory", "no permission"],
)
def test_place_where_nothing_can_be_written_is_refused(
    path: Path, make: Callable[[Path], object], error: type[DirtylogError], reason: str
) -> None:
    if error is HostError and os.geteuid() == 0:
        path = path / "missing" / "machine"
    else:
        make(path)
    with pytest.raises(error, match=reason):
        FileOutlet(str(path))


def test_disk_that_is_full_is_an_error_and_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlet = _begin(path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="No space left on device"):
        outlet.send(Pages(0, _runs((0, 1))), [memoryview(bytes(PAGE_SIZE))])
    monkeypatch.undo()
    outlet.close()
    assert os.listdir(path.parent) == []


def test_short_writes_are_gone_on_with(path: Path, blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, memoryview(data)[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:1000]], at))
    _write(path)
    with closing(MachineFile(str(path))) as machine:
        list(machine.fill(blocks))
    assert _numbers(blocks[0]) == {3: 7, 600: 7, 699: 7}


def test_where_no_holes_can_be_punched_zeros_are_written(
    path: Path, blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "punch_hole", lambda *_: False)
    _write(path)
    with closing(MachineFile(str(path))) as machine:
        list(machine.fill(blocks))
    assert _numbers(blocks[0]) == {3: 7, 600: 7, 699: 7}


def test_abort_ends_the_writing(path: Path) -> None:
    with closing(_begin(path)) as outlet:
        outlet.abort()
        with pytest.raises(CancelledError):
            outlet.send(PassEnd(1))


@pytest.mark.parametrize(
    "state", [{"cpu0": {"regs": bytes(MAX_BODY)}}, {"cpu0": {f"r{n}": b"" for n in range(MAX_NAMES + 1)}}]
)
def test_state_that_nobody_could_read_again_is_refused_and_leaves_nothing(  # M2
    path: Path, state: dict[str, dict[str, bytes]]
) -> None:
    with closing(_begin(path)) as outlet, pytest.raises(ProtocolError, match=r"State message of|state may have"):
        outlet.send(State(True, state))
    assert list(path.parent.iterdir()) == []


def test_what_a_file_cannot_hold_or_say_is_refused(path: Path) -> None:
    with closing(_begin(path)) as outlet:
        with pytest.raises(ProtocolError, match="EncodedPages cannot be written"):
            outlet.send(EncodedPages(0, _runs((0, 1)), size=10, difference=False), [memoryview(bytes(10))])
        with pytest.raises(ProtocolError, match="does not say Joined"):
            outlet.expect(Joined)


def _damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "ends too early"),
        (lambda path: path.write_bytes(b"x" * 5000), "no machine in a file"),
        (lambda path: _damage(path, 8, b"\2"), "version 2"),
        (lambda path: _damage(path, 12, b"\xff\xff\xff\xff"), "impossible lengths"),
        (lambda path: _damage(path, 16, b"\xff" * 8), "impossible lengths"),
        (lambda path: _damage(path, 16, bytes(8)), "impossible lengths"),
        (lambda path: _damage(path, 4100, b"\xff"), "damaged"),
        (lambda path: _damage(path, Layout(_BLOCKS).end + 3, b"\xff"), "changed"),
        (lambda path: _damage(path, 24, b"\xff"), "changed"),
        (lambda path: os.truncate(path, Layout(_BLOCKS).end), "shorter or longer"),
        (lambda path: os.truncate(path, 1 << 40), "shorter or longer"),
    ],
)
def test_damaged_file_is_refused(path: Path, damage: Callable[[Path], object], reason: str) -> None:
    _write(path)
    damage(path)
    with pytest.raises(ProtocolError, match=reason):
        MachineFile(str(path))


def test_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        MachineFile(str(path))


def _machine() -> FakeMachine:
    machine = FakeMachine()
    machine.boot()
    return machine


def test_guest_that_runs_is_saved_and_runs_from_the_file_as_often_as_one_likes(path: Path) -> None:
    with closing(_machine()) as source:
        source.resume()
        outgoing = OutgoingMigration(source, FileAddress(str(path)), Parameters(verify=True, downtime_limit=1.0))
        outgoing.run()
        assert (outgoing.status, source.state) == (Status.COMPLETED, RunState.POSTMIGRATE)
        saved = {name: block.array.copy() for name, block in source.memory.blocks.items()}
    for _ in range(2):
        with closing(FakeMachine(writes=False)) as destination:
            IncomingFile(destination, str(path)).run()
            assert destination.state is RunState.RUNNING
            for name, block in destination.memory.blocks.items():
                assert np.array_equal(block.array, saved[name])


def test_disk_that_fills_up_leaves_the_guest_running(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(_machine()) as source:
        source.resume()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(HostError, match="see whether there is room"):
                OutgoingMigration(source, FileAddress(str(path)), Parameters()).run()
        assert source.state is RunState.RUNNING
        assert os.listdir(path.parent) == []
        OutgoingMigration(source, FileAddress(str(path)), Parameters(downtime_limit=1.0)).run()
        assert path.exists()


@pytest.mark.parametrize("call", ["os.pwrite", "file.punch_hole"])
def test_filesystem_that_fails_for_good_is_the_error_and_leaves_the_guest_running(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The file cannot even be removed then."""

    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(*_: object) -> bool:
        raise KernelError("fallocate", errno.EROFS, os.strerror(errno.EROFS))

    with closing(_machine()) as source:
        source.resume()
        if call == "os.pwrite":
            monkeypatch.setattr(os, "pwrite", fail)
        else:
            monkeypatch.setattr(file_module, "punch_hole", refuse)
        monkeypatch.setattr(Path, "unlink", fail)
        with pytest.raises(HostError, match=r"cannot be written to .*machine: .*Read-only file system"):
            OutgoingMigration(source, FileAddress(str(path)), Parameters()).run()
        assert source.state is RunState.RUNNING


def test_disk_that_fails_in_the_last_moment_leaves_the_guest_running(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(_machine()) as source:
        source.resume()
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(HostError, match="Input/output error"):
            OutgoingMigration(source, FileAddress(str(path)), Parameters(downtime_limit=1.0)).run()
        assert source.state is RunState.RUNNING
        assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    "parameters",
    [Parameters(channels=2), Parameters(share_memory=True)],
    ids=["channels", "shared"],
)
def test_what_a_file_does_not_allow_is_refused_before_anything_starts(path: Path, parameters: Parameters) -> None:
    with closing(_machine()) as source, pytest.raises(UsageError):
        OutgoingMigration(source, FileAddress(str(path)), parameters)


def test_contents_are_never_encoded_in_a_file(path: Path) -> None:
    with closing(_machine()) as source:
        parameters = Parameters(compression=Compression.AUTO, delta_cache=MIB, downtime_limit=1.0)
        OutgoingMigration(source, FileAddress(str(path)), parameters).run()
        saved = source.memory.blocks["ram"].array.copy()
    with closing(FakeMachine(writes=False)) as destination:
        IncomingFile(destination, str(path)).run()
        assert np.array_equal(destination.memory.blocks["ram"].array, saved)


def test_file_of_another_machine_is_refused_and_this_one_stays_free(path: Path) -> None:
    _write(path)
    with closing(FakeMachine()) as machine:
        with pytest.raises(UsageError, match="kind 'toy'"):
            IncomingFile(machine, str(path))
        assert machine.state is RunState.PRELAUNCH


def test_memory_that_changed_in_the_file_is_noticed_if_it_was_verified(path: Path) -> None:
    with closing(_machine()) as source:
        OutgoingMigration(source, FileAddress(str(path)), Parameters(verify=True, downtime_limit=1.0)).run()
    (data, _), *_ = files.extents(os.open(path, os.O_RDONLY), Layout(()).end, path.stat().st_size)
    _damage(path, data, b"\xee")
    with closing(FakeMachine(writes=False)) as destination:
        incoming = IncomingFile(destination, str(path))
        with pytest.raises(ProtocolError, match="not what was saved"):
            incoming.run()
        assert destination.state is RunState.INMIGRATE


def test_abort_ends_the_reading(path: Path) -> None:
    with closing(_machine()) as source:
        OutgoingMigration(source, FileAddress(str(path)), Parameters(downtime_limit=1.0)).run()
    with closing(FakeMachine(writes=False)) as destination:
        incoming = IncomingFile(destination, str(path))
        incoming.abort()
        with pytest.raises(CancelledError):
            incoming.run()
        assert destination.state is RunState.INMIGRATE

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from support.descriptors import same_file
from support.kvm import open_descriptors
from support.require import require
from support.worlds import HostWorld

from dirtylog.errors import HostError, ProtocolError, UsageError
from dirtylog.linux import mapping as mapping_module
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.memory import Client, Memory
from dirtylog.migration import sharing
from dirtylog.migration.address import TCPAddress, UnixAddress
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import MAX_FILES, Hello, Shared, State, Welcome
from dirtylog.migration.protocol import Role
from dirtylog.testing.mechanisms import MECHANISMS
from dirtylog.units import PAGE_SIZE

_UNIX = UnixAddress("/x")
_SIZES = (3 * PAGE_SIZE, PAGE_SIZE)

Channels = tuple[Channel, Channel]


def _memory(value: int) -> Memory:
    memory = Memory()
    for number, size in enumerate(_SIZES):
        memory.ram(f"b{number}", size)
        memory.blocks[f"b{number}"].array[:] = value + number
    return memory


@pytest.fixture
def given() -> Iterator[Memory]:
    """The source's: 1 in all bytes of the first block, 2 in those of the second."""
    with closing(_memory(1)) as memory:
        yield memory


@pytest.fixture
def own() -> Iterator[Memory]:
    """The destination's: 101 and 102."""
    with closing(_memory(101)) as memory:
        yield memory


def _files(memory: Memory) -> list[int]:
    return [block.mapping.fd for block in memory.blocks.values() if isinstance(block.mapping, MemfdMapping)]


@pytest.fixture
def replaced() -> Iterator[ExitStack]:
    """What the destination had."""
    with ExitStack() as replaced:
        yield replaced


@pytest.fixture
def channels() -> Iterator[Channels]:
    one, other = socket.socketpair()
    with Channel(one, Role.SOURCE) as source, Channel(other, Role.DESTINATION) as destination:
        source.send(Hello("fake", (), False, 1, bytes(16), True, False))
        destination.expect(Hello)
        destination.send(Welcome("boot", 1, 1))
        source.expect(Welcome)
        yield source, destination


def _values(memory: Memory) -> list[set[int]]:
    return [set(block.array.tolist()) for block in memory.blocks.values()]


def test_memory_is_the_same_on_both_sides_once_taken(
    channels: Channels, given: Memory, own: Memory, replaced: ExitStack
) -> None:
    source, destination = channels
    before = open_descriptors()
    arrays = [block.array for block in own.blocks.values()]
    sharing.offer(source, given)
    sharing.take(destination, own, replaced)
    assert _values(own) == [{1}, {2}]
    replaced.close()
    arrays[1][5] = 9
    assert given.blocks["b1"].array[5] == 9
    assert len(open_descriptors()) == len(before)
    source.send(State(True, {}))
    assert destination.expect(State) == State(True, {})


def test_memory_that_was_there_goes_when_there_is_time(
    channels: Channels, given: Memory, own: Memory, replaced: ExitStack
) -> None:
    files = _files(own)
    sharing.offer(channels[0], given)
    sharing.take(channels[1], own, replaced)
    assert [os.pread(file, 1, 0) for file in files] == [b"\x65", b"\x66"]
    replaced.close()
    assert not open_descriptors().keys() & {str(file) for file in files}


@pytest.mark.parametrize("leaver", ["source", "destination"])
def test_who_lets_go_has_empty_memory_and_the_other_keeps_it(
    channels: Channels, given: Memory, own: Memory, leaver: str, replaced: ExitStack
) -> None:
    sharing.offer(channels[0], given)
    sharing.take(channels[1], own, replaced)
    left, kept = (given, own) if leaver == "source" else (own, given)
    sharing.let_go(left)
    assert _values(left) == [{0}, {0}]
    assert _values(kept) == [{1}, {2}]
    left.blocks["b0"].array[:] = 5
    assert _values(kept) == [{1}, {2}]


@pytest.mark.parametrize("number", [1, 3, MAX_FILES])
def test_another_number_of_blocks_is_refused_before_any_file_is_taken(
    channels: Channels, own: Memory, number: int, replaced: ExitStack
) -> None:  # M5
    channels[0].send(Shared(number))
    with pytest.raises(ProtocolError, match="the source shares the memory of another number of blocks than it has"):
        sharing.take(channels[1], own, replaced)
    assert _values(own) == [{101}, {102}]


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("kind", ["size", "unsealed"])
def test_memory_that_cannot_be_used_is_refused_and_all_files_closed(
    channels: Channels, given: Memory, own: Memory, wrong: int, kind: str, replaced: ExitStack
) -> None:  # M5
    files = _files(given)
    odd = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(odd, _SIZES[wrong] + (PAGE_SIZE if kind == "size" else 0))
    files[wrong] = odd
    before = open_descriptors()
    channels[0].send(Shared(2))
    channels[0].send_files(files)
    with pytest.raises(ProtocolError, match="the source shares memory that cannot be used: the memfd of"):
        sharing.take(channels[1], own, replaced)
    replaced.close()
    assert len(open_descriptors()) == len(before)
    os.close(odd)
    sharing.let_go(own)
    assert _values(own) == [{0}, {0}]
    assert _values(given) == [{1}, {2}]


def test_host_that_cannot_map_what_came_is_told_apart_from_the_source(
    channels: Channels, given: Memory, own: Memory, monkeypatch: pytest.MonkeyPatch, replaced: ExitStack
) -> None:
    def refuse(address: int, size: int, fd: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = open_descriptors()
    sharing.offer(channels[0], given)
    with monkeypatch.context() as patch:
        patch.setattr(mapping_module, "_map_at", refuse)
        with pytest.raises(HostError, match="cannot map"):
            sharing.take(channels[1], own, replaced)
    assert open_descriptors() == before
    assert _values(own) == [{101}, {102}]


def test_blocks_that_are_files_can_be_shared_over_a_unix_socket(given: Memory) -> None:
    sharing.check(given, _UNIX, 1)


def test_network_address_is_refused(given: Memory) -> None:
    with pytest.raises(UsageError, match="memory cannot be shared over tcp:host:1") as caught:
        sharing.check(given, TCPAddress("host", 1), 1)
    assert caught.value.remedy == "use unix:PATH, with both sides on this host"


def test_further_channels_are_refused(given: Memory) -> None:
    with pytest.raises(UsageError, match="memory that is shared needs no further channels"):
        sharing.check(given, _UNIX, 2)


def test_memory_of_the_callers_is_refused(given: Memory) -> None:
    given.ram("own", PAGE_SIZE, buffer=memoryview(mmap.mmap(-1, PAGE_SIZE)))
    with pytest.raises(UsageError, match="of 3 blocks of memory 2 can be shared by descriptor") as caught:
        sharing.check(given, _UNIX, 1)
    assert caught.value.remedy == (
        f"migrate it by copying; else it takes 1 to {MAX_FILES} blocks whose memory is allocated here"
    )


def _many(count: int) -> Memory:
    memory = Memory()
    for number in range(count):
        memory.ram(f"m{number}", PAGE_SIZE)
    return memory


@pytest.mark.parametrize("count", [0, MAX_FILES + 1])
def test_no_blocks_and_too_many_are_refused(count: int) -> None:
    with (
        closing(_many(count)) as memory,
        pytest.raises(UsageError, match=f"of {count} blocks of memory {count} can be shared by descriptor"),
    ):
        sharing.check(memory, _UNIX, 1)


def test_as_many_blocks_as_one_message_carries_are_shared(channels: Channels, replaced: ExitStack) -> None:
    with closing(_many(MAX_FILES)) as given, closing(_many(MAX_FILES)) as own:
        sharing.check(given, _UNIX, 1)
        sharing.offer(channels[0], given)
        sharing.take(channels[1], own, replaced)
        assert all(same_file(one, other) for one, other in zip(_files(given), _files(own), strict=True))


@pytest.mark.parametrize("mechanism", ["write-watch", "comparison"])
def test_memory_that_is_watched_is_watched_on_when_it_is_taken_and_let_go(  # D1
    channels: Channels, mechanism: str, replaced: ExitStack
) -> None:
    failure = MECHANISMS[mechanism].failure()
    require(MECHANISMS[mechanism].needs, failure is None, str(failure))
    with closing(HostWorld(mechanism, 8)) as given, closing(HostWorld(mechanism, 8)) as own:
        for world in (given, own):
            world.root.add(world.ram, 0)
            world.ram.start_logging_display()
        given.write([0, PAGE_SIZE])
        sharing.offer(channels[0], given.memory)
        sharing.take(channels[1], own.memory, replaced)
        sharing.let_go(given.memory)
        for world in (own, given):
            world.ram.snapshot_and_clear_dirty(0, world.ram.size, Client.DISPLAY)
            world.write([3 * PAGE_SIZE])
            world.memory.sync_dirty_log()
            assert _dirty(world) == [3]
            world.ram.stop_logging_display()


def _dirty(world: HostWorld) -> list[int]:
    return [page for page in range(8) if world.ram.is_dirty(page * PAGE_SIZE, PAGE_SIZE, Client.DISPLAY)]


def test_listeners_hear_nothing_of_memory_that_nobody_watches(
    channels: Channels, given: Memory, own: Memory, replaced: ExitStack
) -> None:
    root = own.container("root")
    root.add(own.ram_regions[0], 0)
    space = own.address_space("system", root)
    view = space.view
    sharing.offer(channels[0], given)
    sharing.take(channels[1], own, replaced)
    sharing.let_go(own)
    assert space.view is view

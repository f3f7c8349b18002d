"""Memory that changes hands on one host without being copied: its files' descriptors are sent, and mapped there.

Both sides map the same memory then, and only one of them may use it. The destination has a machine that never ran, and
does not touch it before it is handed over; if that fails, it lets go of it. The source lets go of it once the
destination has said that it starts the guest. Whoever lets go has empty memory in its place.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from dirtylog.errors import DirtylogError, ProtocolError, UsageError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.machine import Machine, RunState
from dirtylog.memory import Memory, MemoryRegion
from dirtylog.migration.address import Address, UnixAddress
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import MAX_FILES, Shared
from dirtylog.migration.outlet import Outlet


def check(memory: Memory, address: Address, channels: int) -> None:
    """Find out whether memory can be shared with who waits at an address.

    Raises:
        UsageError: there are too many blocks, or none, or some are not files; or it is no Unix socket's address; or
            there are to be several channels.
    """
    if channels > 1:
        raise UsageError("memory that is shared needs no further channels", remedy="leave one of the two out")
    if not isinstance(address, UnixAddress):
        raise UsageError(
            f"memory cannot be shared over {address}", remedy="use unix:PATH, with both sides on this host"
        )
    _mappings(memory)


def offer(channel: Outlet, memory: Memory) -> None:
    """Send memory, as the source.

    Raises:
        UsageError: see `check`.
    """
    mappings = _mappings(memory)
    if not isinstance(channel, Channel):
        raise UsageError("memory can be shared with a process only")
    channel.send(Shared(len(mappings)))
    channel.send_files([mapping.fd for mapping in mappings])


def take(channel: Channel, memory: Memory, replaced: contextlib.ExitStack) -> None:
    """Receive memory, as the destination, in place of what there is.

    Args:
        channel: where it comes from.
        memory: where it belongs.
        replaced: to be closed when there is time: what was there goes then, and that takes milliseconds a GiB.

    Raises:
        ProtocolError: something else came. What was taken until then is the caller's to `let_go`.
    """
    mappings = _mappings(memory)
    if channel.expect(Shared).files != len(mappings):
        raise ProtocolError("the source shares the memory of another number of blocks than it has")
    files = channel.receive_files(len(mappings))
    try:
        with _replacing(memory):
            for mapping in mappings:
                own = mapping.adopt(files[0])
                files.pop(0)
                replaced.callback(_close, own)
    except UsageError as error:
        raise ProtocolError(f"the source shares memory that cannot be used: {error}") from error
    finally:
        for file in files:
            os.close(file)


def let_go(memory: Memory) -> None:
    """Have empty memory in place of what others have now."""
    with _replacing(memory):
        for mapping in _mappings(memory):
            mapping.renew()


def release(machine: Machine) -> None:
    """Let go of a machine that is held, and of its memory first: nobody is to run it on the memory of others.

    Takes the longer the more memory there is. If it fails, the machine has ended.

    Raises:
        HostError, KernelError: the host cannot map other memory.
    """
    try:
        let_go(machine.memory)
    except DirtylogError as error:
        machine.release(RunState.INTERNAL_ERROR, error)
        raise
    machine.release(RunState.POSTMIGRATE)


def _close(file: int) -> None:
    if file >= 0:
        os.close(file)


@contextlib.contextmanager
def _replacing(memory: Memory) -> Iterator[None]:
    """Take memory out of sight while it is replaced, if it is watched: what watches a mapping ends with it.

    Slots of memory that nobody watches can stay: KVM follows what is mapped where they are.
    """
    watched = [region for region in memory.ram_regions if region.logging and region.enabled]
    _show(memory, watched, False)
    try:
        yield
    finally:
        _show(memory, watched, True)


def _show(memory: Memory, regions: Sequence[MemoryRegion], shown: bool) -> None:
    if regions:
        with memory.transaction():
            for region in regions:
                region.set_enabled(shown)


def _mappings(memory: Memory) -> list[MemfdMapping]:
    blocks = tuple(memory.blocks.values())
    mappings = [block.mapping for block in blocks if isinstance(block.mapping, MemfdMapping)]
    if len(mappings) < len(blocks) or not 0 < len(mappings) <= MAX_FILES:
        raise UsageError(
            f"of {len(blocks)} blocks of memory {len(mappings)} can be shared by descriptor",
            remedy=f"migrate it by copying; else it takes 1 to {MAX_FILES} blocks whose memory is allocated here",
        )
    return mappings

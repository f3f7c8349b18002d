"""What a source announces, and whether a machine can take that over."""

from collections.abc import Iterable

from dirtylog.errors import UsageError
from dirtylog.linux.process import ProcessName
from dirtylog.machine import Machine
from dirtylog.migration.messages import BlockInfo, Hello, Welcome
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.parameters import Parameters
from dirtylog.units import PAGE_SIZE, format_size


def block_infos(machine: Machine) -> tuple[BlockInfo, ...]:
    """A machine's blocks, as they are announced."""
    return tuple(BlockInfo(block.name, block.size, PAGE_SIZE) for block in machine.memory.blocks.values())


def greet(channel: Outlet, machine: Machine, parameters: Parameters, session: bytes) -> ProcessName:
    """Announce a machine and how it is to be moved; the destination's process, which has let it in."""
    channel.send(
        Hello(
            machine.kind,
            block_infos(machine),
            parameters.verify,
            parameters.channels,
            session,
            parameters.share_memory,
            parameters.postcopy,
        )
    )
    welcome = channel.expect(Welcome)
    return ProcessName(welcome.boot_id, welcome.pid, welcome.start_time)


def check_fits(machine: Machine, kind: str, blocks: tuple[BlockInfo, ...]) -> None:
    """Refuse what is of another kind or size.

    Raises:
        UsageError: it is, with what would fit.
    """
    if kind != machine.kind:
        raise UsageError(
            f"the source is a machine of kind {kind!r}, this one of kind {machine.kind!r}",
            remedy="use the same --accel on both sides",
        )
    own = block_infos(machine)
    if blocks != own:
        raise UsageError(
            f"the source's memory is {_describe(blocks)}, this machine's is {_describe(own)}",
            remedy="start both sides with the same --memory",
        )


def _describe(blocks: Iterable[BlockInfo]) -> str:
    return ", ".join(
        f"{block.name} of {format_size(block.size)}"
        + (f" in pages of {format_size(block.page_size)}" if block.page_size != PAGE_SIZE else "")
        for block in blocks
    )

"""What a guest is besides its memory, sent once it stands still."""

import time
from typing import Final

from dirtylog.errors import RefusedError
from dirtylog.machine import Machine
from dirtylog.migration.channel import STALL_TIMEOUT
from dirtylog.migration.digest import block_digest
from dirtylog.migration.messages import Digests, Ready, State
from dirtylog.migration.outlet import Outlet
from dirtylog.migration.statistics import Statistics
from dirtylog.units import MIB

_SLOW_DIGEST: Final = 200 * MIB
"""Bytes a second that a destination computes digests at, at the very least."""


def send_state(channel: Outlet, machine: Machine, statistics: Statistics, *, running: bool, verify: bool) -> None:
    """Send a machine's state, and wait until the destination has loaded everything.

    Args:
        channel: the main one.
        machine: which is held.
        statistics: told the digests, and how long they took.
        running: whether the machine ran.
        verify: whether memory is compared before.

    Raises:
        RefusedError: the memory differs.
    """
    blocks = machine.memory.blocks.values()
    digests: tuple[bytes, ...] = ()
    asked = 0.0
    if verify:
        began = time.monotonic()
        digests = tuple(block_digest(block) for block in blocks)
        asked = time.monotonic()
        statistics.verify_seconds = asked - began
        channel.send(Digests(digests))
        channel.set_timeout(STALL_TIMEOUT + statistics.total_bytes / _SLOW_DIGEST)
    channel.send(State(running, machine.save_state()))
    ready = channel.expect(Ready)
    if ready.digests != digests:
        raise RefusedError("the destination's memory differs from the source's at the switchover")
    if verify:  # the destination cannot have compared for longer than we waited, whatever it says
        statistics.verify_seconds += min(ready.verify_ns / 1e9, time.monotonic() - asked)
    statistics.digests = dict(zip((block.name for block in blocks), digests, strict=False))

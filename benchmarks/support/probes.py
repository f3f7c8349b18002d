"""A guest that notes how long its writes take, and what it noted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.assembler import assemble_sector
from benchmarks.support.guest import Guest
from benchmarks.support.workloads import RandomWrites, range_text
from dirtylog.guests import random_writer
from dirtylog.linux.kvm import KVM

_PROBE: Final = Path(__file__).with_name("probe.S")
_PARAMETERS: Final = slice(8, 20)
"""Where the range and the seed are."""
_LOG: Final = 0x10000
_MOST: Final = 0x1A000


@dataclass(frozen=True, slots=True)
class Probes(RandomWrites):
    """Writes pages of a range at random, as fast as it can, and notes how long those writes take that take long."""

    rate: float = 0
    contents: int = 0

    def __str__(self) -> str:
        return f"writes {range_text(self.first, self.last)} at random"

    def image(self) -> bytes:
        """See `Workload`."""
        sector = bytearray(assemble_sector(_PROBE))
        sector[_PARAMETERS] = random_writer.build(self.first, self.last)[_PARAMETERS]
        return bytes(sector)


def noted(guest: Guest) -> int:
    """How many writes took long."""
    return min(int.from_bytes(guest.read(_LOG, 4), "little"), _MOST)


def long_writes(guest: Guest, first: int) -> NDArray[np.float64]:
    """How many seconds each write took that took long, from the one with a number on."""
    count = noted(guest) - first
    ticks = np.frombuffer(guest.read(_LOG + 4 + 4 * first, 4 * count), "<u4") if count > 0 else np.empty(0, "<u4")
    return ticks / (_tick_rate() * 1e3)


def _tick_rate() -> int:
    """Of a guest's time stamp counter, in kHz."""
    with KVM() as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        try:
            return vcpu.tsc_khz
        finally:
            vcpu.close()

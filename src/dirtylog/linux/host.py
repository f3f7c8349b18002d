"""Facts about the host as a whole."""

from pathlib import Path

from dirtylog.errors import HostError
from dirtylog.units import KIB

MEMINFO = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that can be had without swapping: MemAvailable of proc(5).

    Raises:
        HostError: the kernel does not tell.
    """
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * KIB
    raise HostError(f"{MEMINFO} does not tell how much memory is free")

"""Facts about the host as a whole."""

from collections.abc import Iterator
from pathlib import Path

from dirtylog.errors import HostError
from dirtylog.units import KIB

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_GROUP_ROOT = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this process can have without swapping, and within the limits of its control groups.

    MemAvailable of proc(5); memory.max of Documentation/admin-guide/cgroup-v2.rst, and its counterpart in version 1.

    Raises:
        HostError: the kernel does not tell.
    """
    for line in _MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return min((int(rest.split()[0]) * KIB, *_left_in_groups()))
    raise HostError(f"{_MEMINFO} does not tell how much memory is free")


def _left_in_groups() -> Iterator[int]:
    """What each control group still allows, from the own one upwards."""
    for line in _GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage = _GROUP_ROOT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = _GROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            left = _left(folder / limit, folder / usage)
            if left is not None:
                yield left
            if folder == root:
                break


def _left(limit: Path, usage: Path) -> int | None:
    """None where there is no limit, as in a root group, or no such group can be seen, as in a container."""
    try:
        text = limit.read_text().strip()
        return None if text == "max" else max(0, int(text) - int(usage.read_text()))
    except OSError:
        return None

"""What a process has used of CPU and memory, and what the host withheld, from /proc (proc(5))."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from dirtylog.units import KIB, MIB

_STAT_USER_TIME: Final = 11  # field 14 of /proc/PID/stat, counted after the command's closing parenthesis
_STAT_STEAL: Final = 8  # in the first line of /proc/stat, counted after its name
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SLACK: Final = 16 * MIB
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (?:rw.(.)|\S+) ")


class CPUTime(Struct, frozen=True):
    """Seconds of CPU of all threads, ended ones too; the kernel tells them in ticks, of 10 ms as a rule."""

    user: float
    system: float

    @classmethod
    def of(cls, pid: int) -> "CPUTime":
        """What a process has used since it began."""
        return cls.parse(Path(f"/proc/{pid}/stat").read_text())

    @classmethod
    def parse(cls, stat: str) -> "CPUTime":
        """From the text of /proc/PID/stat."""
        fields = stat.rpartition(")")[2].split()
        user, system = (int(field) / _TICKS for field in fields[_STAT_USER_TIME : _STAT_USER_TIME + 2])
        return cls(user, system)

    @property
    def total(self) -> float:
        """Both together."""
        return self.user + self.system

    def since(self, earlier: "CPUTime") -> "CPUTime":
        """What was used in between."""
        return CPUTime(self.user - earlier.user, self.system - earlier.system)


def busiest_thread(before: Mapping[int, float], after: Mapping[int, float]) -> int | None:
    """The thread that ran most between two looks at `thread_times`: that of the vCPU, if the guest never rests."""
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0.0), default=None)


def thread_times(pid: int) -> dict[int, float]:
    """Seconds of CPU that each thread of a process has had, to the nanosecond (/proc/PID/task/TID/schedstat)."""
    times = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            times[int(path.parent.name)] = int(path.read_text().split()[0]) / 1e9
    return times


def stolen() -> float:
    """Seconds since boot that this host's CPUs had work, but the hypervisor under it ran others."""
    return parse_stolen(Path("/proc/stat").read_text())


def parse_stolen(stat: str) -> float:
    """From the text of /proc/stat: of all CPUs together, told in ticks; 0 where the kernel shows none."""
    fields = stat.partition("\n")[0].split()[1:]
    return int(fields[_STAT_STEAL - 1]) / _TICKS if len(fields) >= _STAT_STEAL else 0.0


class ResidentMemory(Struct, frozen=True):
    """Bytes that a process has in RAM, now unless it says otherwise.

    Attributes:
        peak: of all together, in the life of the process (VmHWM).
        anonymous: RssAnon.
        file: RssFile.
        shared: RssShmem, which has what is in memfds.
        guest: of the guest's RAM, or None if it cannot be told apart.
    """

    peak: int
    anonymous: int
    file: int
    shared: int
    guest: int | None

    @classmethod
    def of(cls, pid: int, memory: int) -> "ResidentMemory":
        """Look at a process whose guest has that many bytes of RAM."""
        process = Path(f"/proc/{pid}")
        return cls.parse((process / "status").read_text(), (process / "smaps").read_text(), memory)

    @classmethod
    def parse(cls, status: str, smaps: str, memory: int) -> "ResidentMemory":
        """From the texts of /proc/PID/status and /proc/PID/smaps."""
        values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
        peak, anonymous, file, shared = (
            int(values[name]) * KIB for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")
        )
        return cls(peak, anonymous, file, shared, resident_guest_ram(smaps, memory))

    def beyond_guest(self, earlier: "ResidentMemory") -> int | None:
        """The peak without the guest's RAM: exact if that was never larger than it is now, or was earlier.

        A destination that makes memory ready while it waits has most of it before, and less after zero pages came.
        """
        if self.guest is None or earlier.guest is None:
            return None
        return self.peak - max(self.guest, earlier.guest)


def resident_guest_ram(smaps: str, memory: int) -> int | None:
    """How much of the guest's RAM is resident: of the one writable mapping that has its size, or is a little larger.

    Programs map RAM at one go; the kernel may join it with a neighbour, hence the slack. A shared mapping goes before
    private ones, which a program has for other ends too. None if no mapping fits, or several do.
    """
    found: dict[str, list[int]] = {"s": [], "p": []}
    sharing = ""
    for line in smaps.splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None:
            size = int(mapping[2], 16) - int(mapping[1], 16)
            sharing = (mapping[3] or "") if memory <= size <= memory + _SLACK else ""
        elif sharing and line.startswith("Rss:"):
            found[sharing].append(int(line.split()[1]) * KIB)
    fitting = found["s"] or found["p"]
    return fitting[0] if len(fitting) == 1 else None

"""Processes seen from outside, and threads' share of the CPU."""

import os
import select
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dirtylog.errors import ForkedError

_STAT_START_TIME = 19  # field 22 of /proc/PID/stat, counted after the command's closing parenthesis (proc(5))


@dataclass(frozen=True, slots=True)
class ProcessName:
    """Names one process among all that ever ran: the boot and PID namespace, the PID, the start time in clock ticks."""

    boot_id: str
    pid: int
    start_time: int

    @classmethod
    def own(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(_boot_id(), pid, _start_time(pid))

    def is_gone(self, timeout: float = 0.0) -> bool:
        """Whether it is certain, within ``timeout`` seconds, that the process has ended.

        False if it lives, or could live out of sight. A killed process closes its sockets a moment before it counts as
        ended, so whoever asks because a connection broke should allow for some time.
        """
        try:
            if self.boot_id != _boot_id():
                return False
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:  # no descriptor left, say: nothing is certain then
            return False
        try:
            # Asked while the descriptor pins the PID: it cannot be reused in between.
            if self._is_another():
                return True
            poll = select.poll()
            poll.register(fd, select.POLLIN)  # readable once the process is a zombie or gone
            return bool(poll.poll(timeout * 1000))
        finally:
            os.close(fd)

    def _is_another(self) -> bool:
        """Whether the PID belongs to another process by now. Not certain where /proc hides it, or it has just ended."""
        try:
            return _start_time(self.pid) != self.start_time
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The process that made an object which means nothing in another, such as one about its memory."""

    pid: int = field(default_factory=os.getpid)

    @property
    def is_this(self) -> bool:
        """Whether the caller is still that process."""
        return os.getpid() == self.pid

    def check(self, what: str) -> None:
        """Refuse other processes.

        Raises:
            ForkedError: this is a child of the process that made ``what``.
        """
        if not self.is_this:
            raise ForkedError(
                f"{what} was made by process {self.pid} and tells of its memory, not of this child's",
                remedy="make a new one in the child",
            )


def _boot_id() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[_STAT_START_TIME])


def thread_starved_ns(thread: int | None = None) -> int:
    """For how long a thread, in its life, was ready to run but had no CPU, in nanoseconds.

    The second field of schedstat (Documentation/scheduler/sched-stats.rst); 0 where the kernel keeps none.

    Args:
        thread: the native ID of one of this process; the calling one unless given.
    """
    name = "thread-self" if thread is None else f"self/task/{thread}"
    try:
        return int(Path(f"/proc/{name}/schedstat").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0

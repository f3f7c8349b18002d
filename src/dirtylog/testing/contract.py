"""What a tracker is tested with: memory, somebody who writes it, and how the tracker differs from the plainest one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from dirtylog.memory import Numbers
from dirtylog.trackers import Tracker
from dirtylog.units import PAGE_SIZE

Bytes = npt.NDArray[np.uint8]


class ContractError(AssertionError):
    """A tracker, or who uses it, did what the contract of trackers forbids."""


class Writing(Enum):
    """Who writes the memory that a tracker watches."""

    THREADS = "threads"
    PROCESSES = "processes"
    KVM = "kvm"
    UNICORN = "unicorn"


@dataclass(frozen=True)
class Differences:
    """How a tracker differs from one that reports just what was written, from `arm` on, until it is cleared.

    Each says in a sentence why it is so, and is tested: whoever declares one must have it. An empty one is none.

    Attributes:
        clears_on_collect: what is collected is cleared; `clear` does nothing.
        starts_all_set: the first collect reports every page.
        reports_everything: every collect reports every page.
        reports_more: at times a collect reports pages that were not written, such as those near others.
        reports_changes_only: a page rewritten with the bytes that it holds is not reported.
        held_before_collecting: its writers have to stand still for a moment before each collect.
        held_while_collecting: its writers have to stand still during each collect.
        blind_to: whose writes it does not see. `Writing.PROCESSES` stands for every way but through this mapping.
    """

    clears_on_collect: str = ""
    starts_all_set: str = ""
    reports_everything: str = ""
    reports_more: str = ""
    reports_changes_only: str = ""
    held_before_collecting: str = ""
    held_while_collecting: str = ""
    blind_to: Mapping[Writing, str] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether no page is reported that was not written."""
        return not (self.reports_everything or self.reports_more)


class Case:
    """Memory and its tracker, which is not armed. This process writes; subclasses have others do it.

    Args:
        tracker: of all pages.
        memory: the bytes, shape (size,): whole pages, zeros.
        fd: a descriptor of the shared memory that this is a mapping of, if it is.

    Attributes:
        stores_at_once: how many stamps a thread stores in one call. While numpy is at it, other threads run: so many
            stores meet what these do.
    """

    stores_at_once = 1 << 12

    def __init__(self, tracker: Tracker, memory: Bytes, *, fd: int | None = None) -> None:
        self.tracker = tracker
        self.memory = memory
        self.fd = fd

    @property
    def pages(self) -> int:
        """The length of the memory."""
        return self.memory.size // PAGE_SIZE

    @property
    def address(self) -> int:
        """Where the memory is in this process."""
        return int(self.memory.ctypes.data)

    def write(self, pages: Iterable[int], offset: int = 0) -> None:
        """Add 1 to a byte of each page, one after the other."""
        for page in pages:
            place = page * PAGE_SIZE + offset
            self.memory[place] = (int(self.memory[place]) + 1) % 256

    def stamp(self, pages: Numbers, place: int, stamps: Numbers) -> None:
        """Store numbers as 32 bits at an index of pages, one after the other. Called by several threads at once."""
        self.memory.view("<u4")[pages * (PAGE_SIZE // 4) + place] = stamps

    def close(self) -> None:
        """Give up what the case holds; the tracker is disarmed. Idempotent."""


def check(held: object, complaint: str) -> None:
    """Say what is wrong unless a condition held.

    Raises:
        ContractError: it did not.
    """
    if not held:
        raise ContractError(complaint)

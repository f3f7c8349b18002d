"""Every tracker of this package: how it is made, how it differs, and who can write. A new one is a row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import numpy as np

from dirtylog.errors import HostError
from dirtylog.linux.kvm_ring import MIN_RING_ENTRIES
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.testing.contract import Bytes, Case, Differences, Writing
from dirtylog.testing.kvm import KVMCase
from dirtylog.trackers import KVMLogMode, Tracker
from dirtylog.trackers.kvm_ring import DEFAULT_RING_ENTRIES
from dirtylog.trackers.watch import TRACKERS, zeros
from dirtylog.trackers.write_watch import WriteWatchTracker
from dirtylog.units import PAGE_SIZE

_KVM_ONLY: Final = "KVM notes what its guest writes"
_PAGE_TABLES: Final = "the log is of this process's page tables"


@dataclass(frozen=True)
class Mechanism:
    """One way to tell which pages were written.

    Attributes:
        name: its name.
        make: makes a case of so many pages.
        differences: see there.
        writers: who can write the memory of a case. It may be blind to some.
        needs: what of the host it needs, by the name that `linux.probe` and tests have for it; nothing if empty.
    """

    name: str
    make: Callable[[int], Case]
    differences: Differences = field(default_factory=Differences)
    writers: tuple[Writing, ...] = tuple(Writing)
    needs: str = ""

    def failure(self) -> HostError | None:
        """Why it does not work on this host, if it does not; found by trying."""
        try:
            case = self.make(1)
        except HostError as error:
            return error
        try:
            case.tracker.arm()
            case.tracker.disarm()
        except HostError as error:
            return error
        finally:
            case.close()
        return None


class SharedCase(Case):
    """Memory of this process that others can map.

    Args:
        make: makes the tracker of the bytes.
        pages: how many.
    """

    def __init__(self, make: Callable[[Bytes], Tracker], pages: int) -> None:
        self._mapping = MemfdMapping("dirtylog-case", pages * PAGE_SIZE)
        super().__init__(make(self._mapping.array), self._mapping.array, fd=self._mapping.fd)

    def close(self) -> None:
        """Give the memory up; idempotent."""
        self._mapping.close()


def _private(make: Callable[[Bytes], Tracker], pages: int) -> Case:
    memory = zeros(pages * PAGE_SIZE, np.uint8)
    return Case(make(memory), memory)


def _initially_set(memory: Bytes) -> Tracker:
    return WriteWatchTracker(memory.ctypes.data, memory.size // PAGE_SIZE, initially_set=True)


def _shared(name: str) -> Callable[[int], Case]:
    return partial(SharedCase, TRACKERS[name])


def _kvm(
    mode: KVMLogMode, differences: Differences, *, name: str = "", entries: int = DEFAULT_RING_ENTRIES
) -> Mechanism:
    blind = dict.fromkeys(set(Writing) - {Writing.KVM}, _KVM_ONLY)
    return Mechanism(
        name or f"kvm-{mode.value}",
        partial(KVMCase, log=mode, ring_entries=entries),
        replace(differences, blind_to=blind),
        needs="kvm",
    )


_OWN_MAPPING: Final = {Writing.PROCESSES: _PAGE_TABLES}
_ALONE: Final = tuple(kind for kind in Writing if kind is not Writing.PROCESSES)

_RING: Final = Differences(
    clears_on_collect="what is taken from a ring is protected before it is shown",
    held_before_collecting="processors note pages for themselves, and KVM learns of it when they leave the guest",
)

MECHANISMS: Final[Mapping[str, Mechanism]] = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("write-watch", _shared("write-watch"), Differences(blind_to=_OWN_MAPPING), needs="write-watch"),
        Mechanism(
            "write-watch-private", partial(_private, TRACKERS["write-watch"]), writers=_ALONE, needs="write-watch"
        ),
        Mechanism(
            "write-watch-initially-set",
            partial(SharedCase, _initially_set),
            Differences(
                starts_all_set="pages that were never protected count as written",
                blind_to=_OWN_MAPPING,
            ),
            needs="write-watch",
        ),
        Mechanism(
            "soft-dirty",
            _shared("soft-dirty"),
            Differences(
                clears_on_collect="the bits are cleared for the whole process at once",
                held_while_collecting="the kernel has no lock between the reading of the bits and their clearing",
                blind_to=_OWN_MAPPING,
            ),
            needs="soft-dirty",
        ),
        Mechanism(
            "comparison", _shared("comparison"), Differences(reports_changes_only="contents are all that is looked at")
        ),
        Mechanism(
            "hashes",
            _shared("hashes"),
            Differences(reports_changes_only="hashes of contents are all that is looked at"),
        ),
        Mechanism("null", _shared("null"), Differences(reports_everything="it does not look")),
        _kvm(KVMLogMode.LEGACY, Differences(clears_on_collect="KVM_GET_DIRTY_LOG cleans what it reads")),
        _kvm(KVMLogMode.MANUAL, Differences()),
        _kvm(KVMLogMode.INITIALLY_SET, Differences(starts_all_set="KVM_DIRTY_LOG_INITIALLY_SET asks for that")),
        _kvm(KVMLogMode.RING, _RING),
        _kvm(
            KVMLogMode.RING,
            replace(_RING, reports_more="where a ring overflowed, every page is reported"),
            name="kvm-ring-smallest",
            entries=MIN_RING_ENTRIES,
        ),
    )
}
"""All of them, by name."""

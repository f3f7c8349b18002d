"""Trackers, each measured where few and many pages are written, in turn with the program in C."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct

from benchmarks.support.timing import Samples
from benchmarks.support.tracker_sides import PROGRAM_ADDRESS, GuestMemory, Ours, OwnMemory, Raw, Side
from dirtylog.errors import PeerError, UsageError
from dirtylog.memory.bitmap import Numbers
from dirtylog.trackers import KVMLogMode
from dirtylog.trackers.watch import TRACKERS
from dirtylog.trackers.write_watch import WriteWatchTracker
from dirtylog.units import MIB, PAGE_SIZE, format_size

CHUNK_PAGES: Final = 128 * MIB // PAGE_SIZE
RUN_PAGES: Final = 64
SCATTERED: Final = "scattered"
IN_RUNS: Final = "in runs"
ARM: Final = "arm"
FIRST_WRITE: Final = "first write"
COLLECT: Final = "collect"
CLEAR: Final = "clear"
CLEAR_CHUNKS: Final = "clear in chunks"
DISARM: Final = "disarm"
STEPS: Final = (ARM, FIRST_WRITE, COLLECT, CLEAR, CLEAR_CHUNKS, DISARM)


class Case(Struct, frozen=True):
    """Which pages are written.

    Attributes:
        percent: how many of all.
        layout: where; empty for none and for all.
    """

    percent: int
    layout: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.percent} % {self.layout}".rstrip()

    def pages(self, total: int) -> Numbers:
        """The pages, ascending, the same ones each time."""
        unit = RUN_PAGES if self.layout == IN_RUNS else 1
        count = max(total * self.percent // 100 // unit, 1) if self.percent else 0
        places = np.random.default_rng(0).choice(total // unit, count, replace=False)
        return (np.sort(places)[:, np.newaxis] * unit + np.arange(unit)).reshape(-1)


CASES: Final = (
    Case(0),
    *(Case(percent, layout) for percent in (1, 10, 50) for layout in (SCATTERED, IN_RUNS)),
    Case(100),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A tracker that can be measured.

    Attributes:
        open: makes memory of a size, tracked.
        has_raw: whether it does anything that C could do beside it.
        has_calls: whether that is system calls.
        all_first: whether the first collect reports everything, to be cleared before writes are noted.
        largest: the most bytes that it can have here, or None.
    """

    open: Callable[[int], Ours]
    has_raw: bool = True
    has_calls: bool = True
    all_first: bool = False
    largest: int | None = None


def _watch(*, initially_set: bool, shared: bool) -> Subject:
    return Subject(
        lambda size: OwnMemory(
            size,
            lambda memory: WriteWatchTracker(memory.ctypes.data, memory.size // PAGE_SIZE, initially_set=initially_set),
            shared=shared,
        ),
        all_first=initially_set,
    )


def _own(name: str, *, has_raw: bool = True, has_calls: bool = False) -> Subject:
    opener = partial(OwnMemory, make=TRACKERS[name], shared=False)
    return Subject(opener, has_raw=has_raw, has_calls=has_calls)


def _guest(mode: KVMLogMode) -> Subject:
    all_first = mode is KVMLogMode.INITIALLY_SET
    return Subject(partial(GuestMemory, mode=mode), all_first=all_first, largest=PROGRAM_ADDRESS)


SUBJECTS: Final = {
    "write-watch": _watch(initially_set=False, shared=False),
    "write-watch-memfd": _watch(initially_set=False, shared=True),
    "write-watch-initially-set": _watch(initially_set=True, shared=False),
    "write-watch-memfd-initially-set": _watch(initially_set=True, shared=True),
    "soft-dirty": _own("soft-dirty", has_calls=True),
    "comparison": _own("comparison"),
    "hashes": _own("hashes"),
    "null": _own("null", has_raw=False),
    **{f"kvm-{mode.value}": _guest(mode) for mode in KVMLogMode},
}
"""By the names that the program in C has for them, too."""


class Measurement(Struct, frozen=True):
    """One tracker in one case. Times in seconds: of one page for `FIRST_WRITE`, of all memory for other steps.

    Attributes:
        tracker: its name.
        case: what was written.
        size: bytes of memory.
        pages: how many were written.
        ours: the times of each step of dirtylog.
        raw: of the program in C; empty if there is nothing for it to do.
    """

    tracker: str
    case: Case
    size: int
    pages: int
    ours: dict[str, Samples]
    raw: dict[str, Samples]


def measure(name: str, size: int, cases: Sequence[Case], runs: int, program: Path) -> Iterator[Measurement]:
    """Measure one tracker in each case.

    Raises:
        UsageError: it cannot have that much memory.
        HostError: the host does not offer it.
        PeerError: it, or the program in C, missed a written page.
    """
    subject = SUBJECTS[name]
    if subject.largest is not None and size > subject.largest:
        most = format_size(subject.largest)
        raise UsageError(f"{name} cannot be measured on more than {most}", remedy="give a smaller --size")
    with ExitStack() as stack:
        sides: list[Side] = [subject.open(size)]
        stack.callback(sides[0].close)
        if subject.has_raw:
            sides.append(Raw(program, name, size))
            stack.callback(sides[1].close)
        pair = _Pair(sides, size // PAGE_SIZE, all_first=subject.all_first)
        for case in cases:
            written = case.pages(size // PAGE_SIZE)
            ours, *raw = pair.measure(written, runs)
            yield Measurement(name, case, size, written.size, ours, raw[0] if raw else {})


class _Pair:
    """Both sides, or one alone, in turn: one goes through all steps, as users do, and then the other.

    Who goes first alternates, so that whatever else the host does strikes both.
    """

    def __init__(self, sides: Sequence[Side], pages: int, *, all_first: bool) -> None:
        self._sides = sides
        self._pages = pages
        self._all_first = all_first
        self._written = 0

    def measure(self, written: Numbers, runs: int) -> list[dict[str, Samples]]:
        """The times of each side, after once for warming up."""
        self._written = written.size
        samples: list[dict[str, Samples]] = [{step: [] for step in STEPS} for _ in self._sides]
        turns = list(zip(self._sides, samples, strict=True))
        for side in self._sides:
            side.choose(written)
            self._run(side)
        for _ in range(runs):
            for side, kept in turns:
                for step, seconds in self._run(side).items():
                    kept[step].append(seconds)
            turns.reverse()
        return samples

    def _run(self, side: Side) -> dict[str, float]:
        taken = {}
        side.write()  # pages that were protected become writable
        untracked = side.write()
        taken[ARM] = side.arm()
        if self._all_first:
            self._collect(side)
            side.clear(self._pages)
        tracked = side.write()
        self._collect(side)
        taken[CLEAR_CHUNKS] = side.clear(CHUNK_PAGES)
        side.write()
        taken[COLLECT] = self._collect(side)
        taken[CLEAR] = side.clear(self._pages)
        taken[DISARM] = side.disarm()
        if self._written:
            taken[FIRST_WRITE] = (tracked - untracked) / self._written
        return taken

    def _collect(self, side: Side) -> float:
        seconds, found = side.collect()
        if found < self._written:
            raise PeerError(f"{type(side).__name__} found {found} pages where {self._written} were written")
        return seconds

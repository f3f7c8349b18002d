"""How fast memory is written: measured once, for a while, in one of three ways, as QEMU does (migration/dirtyrate.c).

Each is wrong in its own way. Page sampling looks at a few pages before and after, and costs the guest nothing; writes
that leave a page as it was are not seen, and rates are lower the longer it takes, since a page counts once. The dirty
bitmap counts each page once, too, but all of them. Rings tell vCPUs apart, and count a page each time it was protected
in between.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import numpy as np
import xxhash

from dirtylog.display.sampler import WriteSampler
from dirtylog.errors import DirtylogError, HostError, UsageError
from dirtylog.machine import Machine
from dirtylog.memory import RAMBlock
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

SHORTEST, LONGEST = 0.05, 60.0
"""Seconds."""
FEWEST_SAMPLES, MOST_SAMPLES, DEFAULT_SAMPLES = 128, 16384, 512
"""Pages in each GiB."""
_SMALLEST_BLOCK: Final = 128 * KIB
"""Blocks that are smaller are not sampled."""
_END_TIMEOUT: Final = 15.0
_ZEROS: Final = bytes(PAGE_SIZE)


class RateMode(Enum):
    """How a dirty rate is measured, in QEMU's words."""

    PAGE_SAMPLING = "page-sampling"
    DIRTY_RING = "dirty-ring"
    DIRTY_BITMAP = "dirty-bitmap"


class RateStatus(Enum):
    """How far it is, in QEMU's words."""

    UNSTARTED = "unstarted"
    MEASURING = "measuring"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """A measurement, perhaps of nothing yet.

    Attributes:
        status: how far it is.
        mode: how it is measured.
        seconds: how long.
        sample_pages: in each GiB, where pages are sampled; else 0.
        began: by the wall clock, in seconds.
        rate: MiB a second; -1 if it could not be told, None before it was.
        vcpus: the same for each vCPU, where they are told apart.
        error: what kept it from being told.
    """

    status: RateStatus = RateStatus.UNSTARTED
    mode: RateMode = RateMode.PAGE_SAMPLING
    seconds: float = 0.0
    sample_pages: int = 0
    began: float = 0.0
    rate: int | None = None
    vcpus: tuple[int, ...] = ()
    error: DirtylogError | None = None


class DirtyRateMeter:
    """Measures the dirty rate of one machine, one measurement at a time.

    Args:
        machine: whose.
        sampler: the one that serves its memory.

    Attributes:
        last: the last measurement, or the one under way.
    """

    def __init__(self, machine: Machine, sampler: WriteSampler) -> None:
        self.last = DirtyRate()
        self._machine = machine
        self._sampler = sampler
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, mode: RateMode, seconds: float, sample_pages: int | None = None) -> None:
        """Begin a measurement.

        Raises:
            UsageError: one is under way, a value is out of range, or this machine cannot be measured in this way.
        """
        self._check(mode, seconds, sample_pages)
        with self._lock:
            if self._over.is_set():
                raise UsageError("nothing is measured any more", remedy="start a new machine")
            if self.last.status is RateStatus.MEASURING:
                raise UsageError("the dirty rate is being measured already", remedy="wait for the result")
            samples = (sample_pages or DEFAULT_SAMPLES) if mode is RateMode.PAGE_SAMPLING else 0
            self.last = DirtyRate(RateStatus.MEASURING, mode, seconds, samples, time.time())
            self._thread = threading.Thread(target=self._main, args=(self.last,), name="dirty-rate", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a measurement under way; idempotent."""
        with self._lock:
            self._over.set()
            thread = self._thread
        if thread is not None:
            thread.join(_END_TIMEOUT)
            if thread.is_alive():
                raise HostError(f"{thread.name} did not end within {_END_TIMEOUT:.0f} s")

    def _check(self, mode: RateMode, seconds: float, sample_pages: int | None) -> None:
        if not SHORTEST <= seconds <= LONGEST:
            raise UsageError(f"a dirty rate cannot be measured in {seconds:g} s", remedy="it may take 50 ms to 60 s")
        if sample_pages is not None and mode is not RateMode.PAGE_SAMPLING:
            raise UsageError(f"mode {mode.value} takes no sample pages", remedy="leave their number out")
        if sample_pages is not None and not FEWEST_SAMPLES <= sample_pages <= MOST_SAMPLES:
            raise UsageError(
                f"{sample_pages} sample pages in each GiB", remedy=f"take {FEWEST_SAMPLES} to {MOST_SAMPLES}"
            )
        self._machine.memory.check_complete()
        if mode is RateMode.DIRTY_RING:
            self._machine.dirty_pages()  # refuses where there are no rings
        elif mode is RateMode.DIRTY_BITMAP and self._machine.has_dirty_rings:
            raise UsageError("a machine with dirty rings has no dirty bitmap", remedy="use mode dirty-ring")

    def _main(self, begun: DirtyRate) -> None:
        measures: dict[RateMode, Callable[[DirtyRate], tuple[int, ...]]] = {
            RateMode.PAGE_SAMPLING: self._sample_pages,
            RateMode.DIRTY_BITMAP: self._count_bitmap,
            RateMode.DIRTY_RING: self._count_rings,
        }
        try:
            rates = measures[begun.mode](begun)
        except DirtylogError as error:
            done = replace(begun, rate=-1, error=error)
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            failure = DirtylogError(f"a defect in dirtylog kept the dirty rate from being measured: {error!r}")
            failure.__cause__ = error
            done = replace(begun, rate=-1, error=failure)
        else:
            vcpus = rates if begun.mode is RateMode.DIRTY_RING else ()
            done = replace(begun, rate=sum(rates), vcpus=vcpus)
        self.last = replace(done, status=RateStatus.MEASURED)

    def _wait(self, seconds: float) -> int:
        """Wait; for how many milliseconds that was, on the whole."""
        began = time.monotonic()
        self._over.wait(seconds)
        return max(1, round((time.monotonic() - began) * 1000))

    def _sample_pages(self, begun: DirtyRate) -> tuple[int, ...]:
        chance = np.random.default_rng()
        before = choose_pages(tuple(self._machine.memory.blocks.values()), begun.sample_pages, chance)
        milliseconds = self._wait(begun.seconds)
        return (sampled_rate(before, self._machine.memory.blocks, milliseconds),)

    def _count_bitmap(self, begun: DirtyRate) -> tuple[int, ...]:
        with self._sampler.watch() as watcher:
            milliseconds = self._wait(begun.seconds)
            return (counted_rate(watcher.sample().pages, milliseconds),)

    def _count_rings(self, begun: DirtyRate) -> tuple[int, ...]:
        with self._sampler.watch():
            before = self._machine.dirty_pages()
            milliseconds = self._wait(begun.seconds)
            after = self._machine.dirty_pages()
        return tuple(counted_rate(now - then, milliseconds) for then, now in zip(before, after, strict=True))


@dataclass(frozen=True, slots=True)
class SampledBlock:
    """Pages of a block, and what was in them."""

    block: RAMBlock
    numbers: Sequence[int]
    hashes: Sequence[int]


def choose_pages(blocks: Sequence[RAMBlock], per_gib: int, chance: np.random.Generator) -> list[SampledBlock]:
    """Draw the pages to be looked at, and look at them. As in QEMU, a block's last page is never drawn."""
    found = []
    for block in blocks:
        if block.size >= _SMALLEST_BLOCK:
            count = block.size * per_gib // GIB
            numbers = chance.integers(0, block.pages - 1, count).tolist()
            found.append(SampledBlock(block, numbers, [_hash(block, number) for number in numbers]))
    return found


def sampled_rate(before: Sequence[SampledBlock], blocks: Mapping[str, RAMBlock], milliseconds: int) -> int:
    """MiB a second by the pages that are not what they were; -1 if there were none to look at.

    Blocks that are no more, or have another size, count for nothing.
    """
    same = [one for one in before if blocks.get(one.block.name) is one.block]
    samples = sum(len(one.numbers) for one in same)
    if not samples:
        return -1
    dirty = sum(
        _hash(one.block, number) != known for one in same for number, known in zip(one.numbers, one.hashes, strict=True)
    )
    total = sum(one.block.size // MIB for one in same)
    return dirty * total * 1000 // (samples * milliseconds)


def counted_rate(pages: int, milliseconds: int) -> int:
    """MiB a second of pages that were written."""
    return pages * 1000 * PAGE_SIZE // MIB // milliseconds


def _hash(block: RAMBlock, number: int) -> int:
    start, end = number * PAGE_SIZE, (number + 1) * PAGE_SIZE
    hole = block.mapping.next_data(start, end) == end
    return xxhash.xxh3_64_intdigest(_ZEROS if hole else block.memory[start:end])

"""Which pages of some memory of this process were written: the trackers, for people without a machine."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from operator import index
from typing import Any, Final, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog.errors import ClosedError, HostError, UntrackableError, UsageError
from dirtylog.linux.process import MadeBy
from dirtylog.memory import PageBitmap, RAMBlock
from dirtylog.trackers.comparison import Bytes, CopyTracker, HashTracker
from dirtylog.trackers.null import NullTracker
from dirtylog.trackers.soft_dirty import SoftDirtyTracker
from dirtylog.trackers.tracked import TrackedRange
from dirtylog.trackers.tracker import Tracker
from dirtylog.trackers.write_watch import WriteWatchTracker
from dirtylog.units import PAGE_SIZE, align_up, page_span

AUTO: Final = "auto"


def _write_watch(memory: Bytes) -> Tracker:
    return WriteWatchTracker(memory.ctypes.data, page_span(0, memory.size)[1])


def _soft_dirty(memory: Bytes) -> Tracker:
    return SoftDirtyTracker(memory.ctypes.data, page_span(0, memory.size)[1])


def _null(memory: Bytes) -> Tracker:
    return NullTracker(page_span(0, memory.size)[1])


TRACKERS: Final[dict[str, Callable[[Bytes], Tracker]]] = {
    "write-watch": _write_watch,
    "soft-dirty": _soft_dirty,
    "comparison": CopyTracker,
    "hashes": HashTracker,
    "null": _null,
}
"""The mechanisms that work on this process's own memory, by the names that `watch` takes."""

_AUTOMATIC: Final = ("write-watch", "comparison")
"""What `AUTO` tries. Not soft-dirty, which forgets what other threads write while it collects."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Written:
    """The pages that one collect found, in the form that suits. True if there are any.

    Attributes:
        pages: a bit a page, bit 0 the buffer's first.
        size: bytes of the buffer.
        stride: bytes of one element of the buffer's first axis.
    """

    pages: PageBitmap
    size: int
    stride: int

    def __bool__(self) -> bool:
        return self.pages.any()

    def __repr__(self) -> str:
        return f"<Written: {self.pages.count()} of {self.pages.pages} pages>"

    def runs(self) -> npt.NDArray[np.int64]:
        """The maximal runs of pages, ascending: shape (n, 2), columns first page and length."""
        return self.pages.runs()

    def byte_ranges(self) -> list[tuple[int, int]]:
        """The same as [start, end) of bytes in the buffer; the last ends with the buffer."""
        starts, ends = self._bytes()
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def slices(self) -> list[slice]:
        """Slices of the buffer's first axis that have every byte written, ascending, with gaps between.

        For an array these are elements or rows: ``array[piece]`` for each piece is all that changed, and what shares a
        page or a row with it.
        """
        starts, ends = self._bytes()
        first, last = starts // self.stride, -(-ends // self.stride)
        apart = first[1:] > last[:-1]
        starts = np.append(first[:1], first[1:][apart])
        ends = np.append(last[:-1][apart], last[-1:])
        return [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def _bytes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        runs = self.runs() * PAGE_SIZE
        return runs[:, 0], np.minimum(runs.sum(axis=1), self.size)


class Watch:
    """Watches a buffer until it is closed; see `watch`. Its methods may be called from any thread.

    While it is open it holds on to the buffer, so that nobody can free or resize it: ``mmap.close``, ``resize`` and
    their like raise BufferError. In a child of fork every method but `close` raises ForkedError.

    Attributes:
        tracker: the name of the mechanism that is used.
        size: bytes of the buffer.
        pages: how many it touches.
    """

    def __init__(self, memory: Bytes, stride: int, tracker: str) -> None:
        self.tracker = tracker
        self.size = memory.size
        self.pages = page_span(0, memory.size)[1]
        self._stride = stride
        self._made_by = MadeBy()
        self._lock = threading.Lock()
        self._memory: Bytes | None = memory
        self._returned = PageBitmap(self.pages)
        self._tracked: TrackedRange[Tracker] | None = TrackedRange(TRACKERS[tracker](memory))
        self._finalizer = weakref.finalize(self, self._tracked.disarm)
        self._tracked.arm()

    def __repr__(self) -> str:
        state = "closed" if self._tracked is None else f"by {self.tracker}"
        return f"<Watch of {self.pages} pages, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more, and let go of the buffer; idempotent."""
        # In a child a lock that another thread of the parent held at the fork is never let go.
        with self._lock if self._made_by.is_this else nullcontext():
            self._finalizer()
            self._tracked = self._memory = None

    def collect(self) -> Written:
        """The pages written since they were last cleared. They are reported again until they are cleared.

        Raises:
            LostMappingError: the memory was unmapped, moved or replaced behind the watch's back.
        """
        with self._open() as tracked:
            return self._collect(tracked)

    def clear(self, first: int = 0, count: int | None = None) -> None:
        """Have the next write to pages of [first, first + count) that were collected reported anew; to all by default.

        What was written since the last collect is not forgotten. If others write meanwhile, clear pages before you read
        them: what is written in between is reported the next time, and the other way round it would be lost.

        Raises:
            LostMappingError: as in `collect`.
            UsageError: the range is not in the buffer.
        """
        with self._open() as tracked:
            count = self.pages - first if count is None else count
            if first < 0 or count < 0 or first + count > self.pages:
                raise UsageError(f"pages [{first}, {first + count}) are not in a buffer of {self.pages}")
            self._clear(tracked, first, count)

    def harvest(self) -> Written:
        """Collect, and clear what was found: what was written since the last harvest, about to be read.

        If what is done with it fails, `put_back` it. What interrupts this call itself (Ctrl-C) may cost what it found.

        Raises:
            LostMappingError: as in `collect`.
        """
        with self._open() as tracked:
            found = self._collect(tracked)
            self._clear(tracked, 0, self.pages)
            return found

    def put_back(self, written: Written) -> None:
        """Have pages reported again, until they are cleared: what was harvested, and could not be saved or sent.

        Raises:
            UsageError: it is not of a buffer of this size.
        """
        with self._open():
            if written.pages.pages != self.pages:
                raise UsageError(f"these are pages of a buffer of {written.pages.pages}, not of {self.pages}")
            self._returned.merge(written.pages.words)

    def _collect(self, tracked: TrackedRange[Tracker]) -> Written:
        tracked.collect()
        pages = tracked.collected.copy()
        pages.merge(self._returned.words)
        return Written(pages, self.size, self._stride)

    def _clear(self, tracked: TrackedRange[Tracker], first: int, count: int) -> None:
        # What was put back is not the tracker's to clear: it may have been written since, and not collected.
        tracked.clear(first, count)
        self._returned.clear(first, count)

    @contextmanager
    def _open(self) -> Iterator[TrackedRange[Tracker]]:
        self._made_by.check("the watch")
        with self._lock:
            if self._tracked is None:
                raise ClosedError("the watch was closed")
            yield self._tracked


def watch(buffer: Any, tracker: str = AUTO) -> Watch:
    """Note what is written to memory of this process from here on.

    What this process writes is noted, by any of its threads. Only comparison notes what other processes write to memory
    that is shared with them, or what reaches a mapped file through ``write``: ask for it by name then.
    `linux.write_watch` lists what write-watch takes for a write.

    Args:
        buffer: a numpy array, an mmap, a ``multiprocessing.shared_memory`` block, a `RAMBlock`, or whatever else has
            the buffer protocol; writable, contiguous, starting on a page boundary (`zeros` makes such arrays).
        tracker: a name of `TRACKERS`; ``auto`` takes write-watch, and comparison, which costs as much memory again,
            where the kernel or the kind of memory does not allow that, or somebody watches it in this way already.
            `Watch.tracker` says which it is.

    Raises:
        UntrackableError: the buffer is empty, read-only, not contiguous, does not start on a page boundary, or is of a
            kind that the mechanism cannot watch.
        AlreadyWatchedError: the mechanism serves one watch only, and there is one.
        ClosedError: the block was closed.
        HostError: the kernel, or this user's permissions, do not offer the mechanism.
        UsageError: there is no such mechanism.
    """
    if tracker != AUTO and tracker not in TRACKERS:
        raise UsageError(f"there is no tracker {tracker!r}", remedy=f"use {AUTO}, {', '.join(TRACKERS)}")
    memory, stride = _memory(buffer)
    *preferred, last = _AUTOMATIC if tracker == AUTO else (tracker,)
    for name in preferred:
        try:
            return Watch(memory, stride, name)
        except (HostError, UntrackableError):
            continue
    return Watch(memory, stride, last)


def _memory(buffer: Any) -> tuple[Bytes, int]:
    """A buffer's bytes, and how many make an element of its first axis."""
    view = _view(buffer)
    if not view.nbytes:
        raise UntrackableError("the buffer is empty")
    if view.readonly:
        raise UntrackableError("the buffer is read-only: nobody can write it", remedy="watch what it is a view of")
    if not view.c_contiguous:
        raise UntrackableError(
            "the buffer is not contiguous", remedy="watch the array that it is a part of; transpose Fortran's order"
        )
    memory = np.frombuffer(view, np.uint8)
    if memory.ctypes.data % PAGE_SIZE:
        raise UntrackableError(
            f"the buffer starts at {memory.ctypes.data:#x}, within a page",
            remedy="allocate it with dirtylog.zeros, mmap or shared_memory, which start on a page",
        )
    return memory, view.nbytes // view.shape[0] if view.shape else view.nbytes


def _view(buffer: Any) -> memoryview:
    if isinstance(buffer, RAMBlock):
        return buffer.memory
    try:
        if isinstance(buffer, np.ndarray):  # as raw bytes of the same shape: not all types of numpy's make a memoryview
            return np.asarray(buffer).view(f"V{buffer.itemsize}").data
        return memoryview(getattr(buffer, "buf", buffer))  # which shared_memory.SharedMemory has instead
    except (TypeError, ValueError, BufferError) as error:
        raise UntrackableError(
            f"a {type(buffer).__name__} offers no memory to watch ({error})",
            remedy="give an array of numbers, an open mmap or shared memory, or a RAMBlock",
        ) from error


def zeros(shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array of zeros in pages of its own, so that it can be watched. Takes memory as it is written.

    Raises:
        UsageError: the shape is not of positive numbers, or the type is none or has objects in it.
        HostError: the host cannot map that much.
    """
    try:
        kind = np.dtype(dtype)
        sides = (*(map(index, shape) if isinstance(shape, Sequence) else (index(shape),)), *kind.shape)
    except TypeError as error:
        raise UsageError(f"there is no array of shape {shape!r} and type {dtype!r} ({error})") from error
    kind = kind.base
    size = prod(sides) * kind.itemsize
    if kind.hasobject or size <= 0 or min(sides, default=1) < 0:
        raise UsageError(f"an array of shape {sides} and type {kind} has no bytes to watch")
    try:
        pages = mmap(-1, align_up(size, PAGE_SIZE), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise HostError(f"the host cannot map {size} bytes of memory ({error})", remedy="ask for less") from error
    return np.frombuffer(pages, kind, prod(sides)).reshape(sides)

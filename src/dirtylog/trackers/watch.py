"""Which pages of some memory of this process were written: the trackers, for people without a machine."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, Final, Self

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


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """The pages that one collect found, in the form that suits.

    Attributes:
        pages: a bit a page, bit 0 the buffer's first.
        size: bytes of the buffer.
        stride: bytes of one element of the buffer's first axis.
    """

    pages: PageBitmap
    size: int
    stride: int

    def __bool__(self) -> bool:
        """Whether any page was written."""
        return self.pages.any()

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

    def __init__(self, buffer: memoryview, tracker: str, tracked: TrackedRange[Tracker]) -> None:
        self.tracker = tracker
        self.size = buffer.nbytes
        self.pages = tracked.pages
        self._stride = buffer.strides[0] if buffer.strides else buffer.nbytes
        self._tracked = tracked
        self._made_by = MadeBy()
        self._lock = threading.Lock()
        self._buffer: memoryview | None = buffer
        self._finalizer = weakref.finalize(self, tracked.disarm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more, and let go of the buffer; idempotent."""
        with self._lock:
            self._finalizer()
            self._buffer = None

    def collect(self) -> Written:
        """The pages written since they were last cleared. They are reported again until they are cleared.

        Mechanisms that can only collect and clear at once (soft-dirty) report each write once.

        Raises:
            LostMappingError: the memory was unmapped, moved or replaced behind the watch's back.
        """
        with self._lock:
            self._check()
            return Written(self._tracked.collect(), self.size, self._stride)

    def clear(self, first: int = 0, count: int | None = None) -> None:
        """Have the next write to pages of [first, first + count) that were collected reported anew; to all by default.

        What was written since the last collect is not forgotten. Clear pages before you read them: what is written in
        between is reported the next time, and the other way round it would be lost.

        Raises:
            UsageError: the range is not in the buffer.
        """
        with self._lock:
            self._check()
            count = self.pages - first if count is None else count
            if first < 0 or count < 0 or first + count > self.pages:
                raise UsageError(f"pages [{first}, {first + count}) are not in a buffer of {self.pages}")
            self._tracked.clear(first, count)

    def harvest(self) -> Written:
        """Collect, and clear what was found: what was written since the last harvest, about to be read."""
        with self._lock:
            self._check()
            found = Written(self._tracked.collect(), self.size, self._stride)
            self._tracked.clear(0, self.pages)
            return found

    def _check(self) -> None:
        if self._buffer is None:
            raise ClosedError("the watch was closed")
        self._made_by.check("the watch")


def watch(buffer: Any, tracker: str = AUTO) -> Watch:
    """Note what is written to memory of this process from here on.

    Args:
        buffer: a numpy array, an mmap, a ``multiprocessing.shared_memory`` block, a `RAMBlock`, or whatever else has
            the buffer protocol; writable, contiguous, starting on a page boundary (`zeros` makes such arrays).
        tracker: a name of `TRACKERS`; ``auto`` takes write-watch, and comparison, which costs as much memory again,
            where the kernel or the kind of memory does not allow that. `Watch.tracker` says which it is.

    Raises:
        UntrackableError: the buffer is empty, read-only, not contiguous, does not start on a page boundary, or is of a
            kind that the mechanism cannot watch.
        AlreadyWatchedError: the mechanism serves one watch only, and there is one.
        HostError: the kernel, or this user's permissions, do not offer the mechanism.
        UsageError: there is no such mechanism.
    """
    if tracker != AUTO and tracker not in TRACKERS:
        raise UsageError(f"there is no tracker {tracker!r}", remedy=f"use {AUTO}, {', '.join(TRACKERS)}")
    view = _view(buffer)
    memory = np.frombuffer(view.cast("B"), np.uint8)
    *preferred, last = _AUTOMATIC if tracker == AUTO else (tracker,)
    for name in preferred:
        try:
            return _armed(view, memory, name)
        except (HostError, UntrackableError):
            continue
    return _armed(view, memory, last)


def _armed(view: memoryview, memory: Bytes, name: str) -> Watch:
    tracked = TrackedRange(TRACKERS[name](memory))
    tracked.arm()
    return Watch(view, name, tracked)


def _view(buffer: Any) -> memoryview:
    if isinstance(buffer, RAMBlock):
        return buffer.memory
    try:
        view = memoryview(
            getattr(buffer, "buf", buffer)
        )  # shared_memory.SharedMemory has no buffer protocol of its own
    except TypeError as error:
        raise UntrackableError(
            f"a {type(buffer).__name__} is not a buffer", remedy="give an array, an mmap, or shared memory"
        ) from error
    if not view.nbytes:
        raise UntrackableError("the buffer is empty")
    if view.readonly:
        raise UntrackableError("the buffer is read-only: nobody can write it")
    if not view.c_contiguous:
        raise UntrackableError(
            "the buffer is not contiguous", remedy="watch the array that it is a part of; transpose Fortran's order"
        )
    address = np.frombuffer(view.cast("B"), np.uint8).ctypes.data
    if address % PAGE_SIZE:
        raise UntrackableError(
            f"the buffer starts at {address:#x}, within a page",
            remedy="allocate it with dirtylog.zeros, mmap or shared_memory, which start on a page",
        )
    return view


def zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array of zeros in pages of its own, so that it can be watched. Takes memory as it is written.

    Raises:
        UsageError: the shape is not of positive numbers, or the type has objects in it.
        HostError: the host cannot map that much.
    """
    kind = np.dtype(dtype)
    sides = (shape,) if isinstance(shape, int) else tuple(shape)
    size = prod(sides) * kind.itemsize
    if kind.hasobject or size <= 0 or min(sides, default=1) < 0:
        raise UsageError(f"an array of shape {sides} and type {kind} has no bytes to watch")
    try:
        pages = mmap(-1, align_up(size, PAGE_SIZE), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise HostError(f"the host cannot map {size} bytes of memory ({error})", remedy="ask for less") from error
    return np.frombuffer(pages, kind, prod(sides)).reshape(sides)

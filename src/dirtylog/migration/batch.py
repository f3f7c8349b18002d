"""Pages on their way from memory to a channel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dirtylog.linux.mapping import Contents
from dirtylog.memory import Numbers, RAMBlock
from dirtylog.migration.messages import Pages, Runs, ZeroPages
from dirtylog.units import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Batch:
    """Some pages of a block: contents to send, as `pages` announces and `contents` holds them; and zero pages."""

    pages: Pages | None
    contents: Sequence[Contents]
    zeros: ZeroPages | None


def batch_of(index: int, block: RAMBlock, pages: Numbers) -> Batch:
    """Pages with something in them as they are, and the others as zero."""
    filled = _filled(block, pages)
    zeros, runs = pages[~filled], runs_of(pages[filled])
    return Batch(
        Pages(index, runs) if len(runs) else None,
        page_parts(block, runs),
        ZeroPages(index, runs_of(zeros)) if len(zeros) else None,
    )


def zero_batch(index: int, runs: Runs) -> Batch:
    """Pages that are known to be zero."""
    return Batch(None, [], ZeroPages(index, runs))


def _filled(block: RAMBlock, pages: Numbers) -> npt.NDArray[np.bool_]:
    """Which pages are not all zero. Most show it in their first word; only the others are read whole."""
    words = block.page_words
    filled: npt.NDArray[np.bool_] = words[pages, 0] != 0
    unsure = pages[~filled]
    if len(unsure):
        first, last = int(unsure[0]), int(unsure[-1])
        rows = words[first : last + 1] if last - first + 1 == len(unsure) else words[unsure]
        filled[~filled] = rows.any(axis=1)
    return filled


def runs_of(pages: Numbers) -> Runs:
    """Ascending page numbers as runs."""
    if not len(pages):
        return np.empty((0, 2), np.int64)
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(pages))
    return np.stack((pages[starts], lengths), axis=1)


def page_parts(block: RAMBlock, runs: Runs) -> list[Contents]:
    """The contents of each run, to be sent."""
    return [block.mapping.part(start, end) for start, end in (runs.cumsum(axis=1) * PAGE_SIZE).tolist()]

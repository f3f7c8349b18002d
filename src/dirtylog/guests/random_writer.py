"""The random writer: a boot sector that adds 1 to byte 0 of a random page of a range, for ever.

``guests/random_writer.S`` is its source and says how it works; ``docs/guests.md`` how to use it. The numbers here are
the ones there.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dirtylog.errors import UsageError
from dirtylog.guests import sector
from dirtylog.units import PAGE_SIZE

COUNTER_ADDRESS: Final = sector.COUNTER_ADDRESS
"""Where the guest counts its writes: a little-endian 64-bit word."""

STARTED_ADDRESS: Final = sector.STARTED_ADDRESS
STARTED: Final = sector.STARTED
"""What stands at ``STARTED_ADDRESS`` from the moment when `check_pages` and the counter hold."""

DEFAULT_RANGE: Final = sector.DEFAULT_RANGE
DEFAULT_SEED: Final = 1
"""What the shipped image is set to."""

LONGEST_INTERVAL: Final = 100_000_000
"""The most nanoseconds from one write to the next."""

_MULTIPLIER: Final = 1664525
_INCREMENT: Final = 1013904223
_MODULUS: Final = 1 << 32
_BLOCK: Final = 1 << 16
"""How many numbers are computed at a time."""


def build(first: int, last: int, *, seed: int = DEFAULT_SEED, rate: float = 0) -> bytes:
    """The boot sector, set to write to pages of ``[first, last)``.

    Args:
        first: address of the first page; the guest's own code and counter lie below 64 KiB.
        last: address after the last page; at most 3 GiB, where a PC's memory makes room for its devices.
        seed: what its random numbers start from, 32 bits.
        rate: bytes a second that it is to dirty, a page a write, as long as it gets the processor's time; as many as it
            can if 0. Under KVM only: it asks for KVM's clock, and never starts if there is none.
    """
    if not 0 <= seed < _MODULUS:
        raise UsageError(f"the seed {seed} does not have 32 bits", remedy="use one from 0 to 2**32 - 1")
    return sector.build("random_writer.img", b"DLR2", first, last, seed, _interval(rate) if rate else 0)


def _interval(rate: float) -> int:
    """Nanoseconds between writes."""
    if not PAGE_SIZE * 1e9 / LONGEST_INTERVAL <= rate <= PAGE_SIZE * 1e9:
        raise UsageError(
            f"the guest cannot dirty {rate:g} bytes a second", remedy="40960 are possible, ten pages, and more"
        )
    return round(PAGE_SIZE * 1e9 / rate)


def page_numbers(pages: int, first: int, count: int, *, seed: int = DEFAULT_SEED) -> NDArray[np.int64]:
    """Which page, of ``pages`` in the range, each of some writes goes to.

    Args:
        pages: how many the range has.
        first: the first of the writes, counted from 0: the counter before it.
        count: how many writes.
        seed: the one the guest was built with.
    """
    return np.concatenate([np.empty(0, np.int64), *_page_numbers(pages, first, count, seed)])


def check_pages(bytes_per_page: NDArray[np.uint8], writes: int, *, seed: int = DEFAULT_SEED) -> str | None:
    """What breaks the guest's promise, or None. It holds whenever the guest is stopped and its marker is set.

    Args:
        bytes_per_page: byte 0 of each page of the range, in ascending order.
        writes: the guest's counter, read at the same stop.
        seed: the one the guest was built with.
    """
    if bytes_per_page.dtype != np.uint8 or bytes_per_page.ndim != 1 or bytes_per_page.size == 0:
        raise UsageError(
            f"the promise is about a row of bytes, not {bytes_per_page.dtype} of shape {bytes_per_page.shape}",
            remedy=f"pass memory[first:last:{PAGE_SIZE}] of an uint8 array",
        )
    pages = bytes_per_page.size
    expected = np.zeros(pages, np.uint8)
    for numbers in _page_numbers(pages, 0, writes, seed):
        expected += np.bincount(numbers, minlength=pages).astype(np.uint8)
    wrong = np.flatnonzero(bytes_per_page != expected)
    if wrong.size:  # but for the write that is made and not counted yet
        (uncounted,) = page_numbers(pages, writes, 1, seed=seed)
        expected[uncounted] += 1
        wrong = np.flatnonzero(bytes_per_page != expected)
    if not wrong.size:
        return None
    page = int(wrong[0])
    return f"page {page} holds {bytes_per_page[page]}, which {writes} writes do not explain"


def _page_numbers(pages: int, first: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """What `page_numbers` gives, some at a time."""
    factors = np.multiply.accumulate(np.full(_BLOCK, _MULTIPLIER, np.uint32), dtype=np.uint32)
    sums = np.add.accumulate(np.concatenate((np.ones(1, np.uint32), factors[:-1])), dtype=np.uint32)
    offsets = sums * np.uint32(_INCREMENT)
    state = _state_after(first, seed)
    while count > 0:
        states = factors[:count] * np.uint32(state) + offsets[:count]
        yield (states.astype(np.uint64) * np.uint64(pages) >> np.uint64(32)).astype(np.int64)
        state = int(states[-1])
        count -= len(states)


def _state_after(writes: int, seed: int) -> int:
    """The generator's state after some writes: x -> factor * x + offset, squared and multiplied."""
    factor, offset = 1, 0
    step_factor, step_offset = _MULTIPLIER, _INCREMENT
    while writes:
        if writes & 1:
            factor, offset = factor * step_factor % _MODULUS, (offset * step_factor + step_offset) % _MODULUS
        step_factor, step_offset = (
            step_factor * step_factor % _MODULUS,
            (step_offset * step_factor + step_offset) % _MODULUS,
        )
        writes >>= 1
    return (factor * seed + offset) % _MODULUS

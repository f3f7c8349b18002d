"""What those who write stamps and the one who checks them tell each other, in memory that they share."""

from typing import Final

import numpy as np
import numpy.typing as npt

from dirtylog.linux.mapping import MemfdMapping
from dirtylog.units import PAGE_SIZE

STAMP_BITS: Final = 18
"""A stamp is the round's number, and so many bits that tell the stores of one round apart: each writer counts, and
stays at the last one. `programs.STAMP` knows that, too."""
LAST_COUNT: Final = (1 << STAMP_BITS) - 1
MOST_ROUNDS: Final = (1 << 32 - STAMP_BITS) - 1
MOST_WRITERS: Final = 16

LEAST: Final = 0
"""Where the least stamp of the round is. Here and below: the index of a little-endian 32-bit word. `programs.STAMP`
knows them."""
STILL: Final = 1
"""Not 0: writers are to stand still."""
FIRST: Final = 2
SPAN: Final = 3
PAGES: Final = 4
"""SPAN pages from FIRST on are to be written. After the last of all PAGES comes page 0, so that who reads one number of
before and one of after a change is not out of bounds either."""
STAMPED: Final = 16
"""From here on, in a cache line for each writer: the stamp that it stored last."""
STANDING: Final = STAMPED + 16 * MOST_WRITERS
"""In the same way, for those who have no other way to tell: 1 while the writer stands still."""


class Board:
    """The words above, in a memfd that processes and guests can map.

    Args:
        pages: how many there are to write.
    """

    def __init__(self, pages: int) -> None:
        self.mapping = MemfdMapping("dirtylog-board", PAGE_SIZE)
        self._words: npt.NDArray[np.uint32] = self.mapping.array.view("<u4")
        self._words[PAGES] = pages
        self.pages = pages

    def begin(self, number: int) -> None:
        """Begin a round. Numbers only grow."""
        self._words[LEAST] = number << STAMP_BITS

    @property
    def least(self) -> int:
        """The least stamp of the round."""
        return int(self._words[LEAST])

    @property
    def window(self) -> tuple[int, int]:
        """The first of the pages to write, and how many; page 0 comes after the last."""
        return int(self._words[FIRST]), int(self._words[SPAN])

    @window.setter
    def window(self, pages: tuple[int, int]) -> None:
        self._words[FIRST], self._words[SPAN] = pages

    @property
    def still(self) -> bool:
        """Whether writers are to stand still."""
        return bool(self._words[STILL])

    @still.setter
    def still(self, value: bool) -> None:
        self._words[STILL] = value

    def note(self, writer: int, stamp: int) -> None:
        """Tell what a writer has stored."""
        self._words[STAMPED + 16 * writer] = stamp

    def all_are_in(self, number: int, writers: int) -> bool:
        """Whether each of the first ``writers`` has stored a stamp of a round, or of a later one."""
        return bool((self._words[STAMPED:STANDING:16][:writers] >= number << STAMP_BITS).all())

    def standing(self, writers: int) -> int:
        """How many of the first ``writers`` have told that they stand still."""
        return int(self._words[STANDING::16][:writers].sum())

    def close(self) -> None:
        """Give the memory up; idempotent."""
        self._words = np.zeros(0, np.uint32)
        self.mapping.close()

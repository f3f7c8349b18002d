"""Writers that never rest, and what a tracker must tell of them: the idea of the kernel's own dirty_log_test.

Each page has a 32-bit word for each writer, its *stamps*. A writer goes on for ever: it takes the round's number from
the board, counts its stores in the low bits below that, stores the result as its stamp in pages, and notes on the board
that it has. Nothing ever stops a writer between taking the number and storing it, so rounds are long enough for all of
them to notice:

    round n:  the board says n;  wait until each writer has noted n or more;
              collect;  read the stamps of all pages;
              clear random ranges;  read the stamps of the pages that this cleared.

A writer that has noted n takes no smaller number any more. So **(a)** a store after the wait of round n has n or more,
and **(b)** a store between that and the end of round n has n exactly, as the board says n + 1 only then. Stamps only
grow.

For each page, let m be the round in which it was cleared last (by a clear that named it, or by a collect that clears),
and *known* the stamps read right after that. Then, in each round n:

1. **Nothing is lost.** A page that is not reported has the known stamps, but for some that are of round n now. Any
   other new stamp is of an earlier round, so by (a) it was stored before the wait ended and so before the collect, and
   it was stored after the clear. (D1, D3)
2. **Nothing is late.** A page that had such new stamps is reported in the next round: the store came before its
   collect, and no clear may name a page that was not collected. (D1, D2)
3. **Nothing is forgotten.** Where collecting does not clear, a page that was reported is reported until it is cleared.
4. **Nothing is invented**, where the tracker is exact. A page that is reported, and was cleared since it was last, has
   a stamp of round m or later, since it was stored after the clear, so by (a). With m = n - 1, that is "this round's or
   the last's". But a page fault notes a store before it lands: so each writer may have one page without such a stamp,
   which has it in the next round, as the writer has noted a number since.

Where the tracker is blind to the writers, nothing is reported, but for what is at first.

The order in which others see stores matters to (a). It is theirs on x86, and for threads of Python's everywhere.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from dirtylog.errors import UsageError
from dirtylog.memory import PageBitmap
from dirtylog.testing.board import MOST_ROUNDS, MOST_WRITERS, STAMP_BITS, Board
from dirtylog.testing.contract import Case, ContractError, Differences, Writing
from dirtylog.testing.emulated import UnicornGuest
from dirtylog.testing.kvm import KVMCase, KVMGuest
from dirtylog.testing.writers import WRITERS, WriterProcesses, Writers, WriterThreads, stores
from dirtylog.trackers import TrackedRange
from dirtylog.units import PAGE_SIZE

Bits = npt.NDArray[np.bool_]
Words32 = npt.NDArray[np.uint32]

_WORDS: Final = PAGE_SIZE // 4
_MOST_CLEARS: Final = 3
_SHOWN: Final = 8


@dataclass
class Tally:
    """What happened so far: a test in which nothing was left to chance proves little.

    Attributes:
        rounds: how many.
        reported: pages, summed over rounds.
        unreported: pages, summed over rounds.
        cleared: pages, summed over clears.
        raced: unreported pages that were written while they were collected, and were reported in the next round.
    """

    rounds: int = 0
    reported: int = 0
    unreported: int = 0
    cleared: int = 0
    raced: int = 0


class Stamps:
    """A case that writers stamp, armed, and what is known of its pages. The case stays its owner's.

    Args:
        case: not armed yet.
        differences: of its tracker.
        writing: who writes.
        seed: chooses what is cleared, and what is written.

    Attributes:
        tally: what happened so far.

    Raises:
        HostError: this host lacks something that the tracker or the writers need.
    """

    def __init__(self, case: Case, differences: Differences, writing: Writing, seed: int) -> None:
        self.tally = Tally()
        self._case = case
        self._differences = differences
        self._is_blind = writing in differences.blind_to
        self._choice = np.random.default_rng(seed)
        self._tracked = TrackedRange(case.tracker)
        self._board = Board(case.pages)
        try:
            place = int(self._choice.integers(_WORDS - MOST_WRITERS))
            self._writers = _make_writers(writing, case, self._board, place, seed)
            try:
                self._prepare(place)
                self._tracked.arm()
                self._board.window = self._choose_window()
                self._board.begin(1)
                self._writers.resume()
            except BaseException:
                self.close()
                raise
        except BaseException:
            self._board.close()
            raise

    def _prepare(self, place: int) -> None:
        pages = self._case.pages
        words: Words32 = self._case.memory.view("<u4").reshape(pages, _WORDS)
        self._stamps = words[:, place : place + self._writers.count]
        self._stamps[:] = 0
        self._known = self._stamps.copy()
        self._cleared_in: Words32 = np.full(pages, 0 if self._differences.starts_all_set else 1, np.uint32)
        self._expected: Words32 = np.zeros(pages, np.uint32)
        self._collected: Bits = np.zeros(pages, np.bool_)
        self._owed: Bits = np.zeros(pages, np.bool_)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the writers, and disarm the tracker; idempotent."""
        self._writers.close()
        self._tracked.disarm()
        self._board.close()

    def run(self, rounds: int) -> Tally:
        """Check some rounds.

        Raises:
            ContractError: the tracker broke its contract; the message names round and pages.
            UsageError: these are more rounds than stamps can tell apart.
        """
        if self.tally.rounds + rounds > MOST_ROUNDS:
            raise UsageError(f"{rounds} more rounds", remedy=f"begin anew after {MOST_ROUNDS} at most")
        for _ in range(rounds):
            self._round(self.tally.rounds + 1)
            self.tally.rounds += 1
        return self.tally

    def _round(self, number: int) -> None:
        self._board.begin(number)
        self._writers.wait_until(lambda: self._board.all_are_in(number, self._writers.count), f"come to round {number}")
        self._board.window = (
            self._choose_window()
        )  # so that the collect meets pages that were not written in this round
        found = self._collect()
        stamps = self._stamps.copy()
        if self._is_blind:
            fresh = found & ~self._collected & (number > 1 or not self._differences.starts_all_set)
            self._complain(number, fresh, "reported, though they are written where the tracker is blind")
        else:
            self._check(number, found, stamps)
        self.tally.reported += int(found.sum())
        self.tally.unreported += int((~found).sum())
        if self._differences.clears_on_collect:
            self._note_cleared(number, found, stamps)
        else:
            self._collected |= found
        for _ in range(self._choice.integers(_MOST_CLEARS, endpoint=True)):
            self._clear(number)

    def _choose_window(self) -> tuple[int, int]:
        """Sizes are as likely to be small as to be large, so that what is written and what is not are both some."""
        pages = self._case.pages
        return int(self._choice.integers(pages)), ceil((pages / 2) ** self._choice.random())

    def _collect(self) -> Bits:
        if self._differences.held_before_collecting:
            with self._writers.held():
                pass
        held: AbstractContextManager[None] = nullcontext()
        if self._differences.held_while_collecting:
            held = self._writers.held()
        with held:
            return _to_bits(self._tracked.collect())

    def _check(self, number: int, found: Bits, stamps: Words32) -> None:
        new = stamps != self._known
        earlier = (new & (stamps >> STAMP_BITS != number)).any(axis=1)
        self._complain(number, ~found & self._collected, "reported, never cleared, and not reported any more")
        self._complain(number, ~found & self._owed, "written while they were collected, and not reported then or now")
        self._complain(number, ~found & earlier, "written, and not reported")
        if self._differences.reports_everything:
            self._complain(number, ~found, "not reported, though the tracker reports everything")
        elif self._differences.is_exact:
            self._check_written(number, found & ~self._collected, stamps.max(axis=1) >> STAMP_BITS)
        self.tally.raced += int(self._owed.sum())
        self._owed = ~found & new.any(axis=1)

    def _check_written(self, number: int, fresh: Bits, newest: Words32) -> None:
        complaint = "reported, and not written since they were cleared"
        self._complain(number, newest < self._expected, complaint)
        early = fresh & (newest < self._cleared_in)
        if early.sum() > self._writers.count:
            self._complain(number, early, complaint)
        self._expected = np.where(early, self._cleared_in, 0)

    def _clear(self, number: int) -> None:
        pages = self._case.pages
        first = int(self._choice.integers(pages))
        count = int(self._choice.integers(1, pages - first, endpoint=True))
        self._tracked.clear(first, count)
        named = np.zeros(pages, np.bool_)
        named[first : first + count] = self._collected[first : first + count]
        self._note_cleared(number, named, self._stamps.copy())

    def _note_cleared(self, number: int, named: Bits, stamps: Words32) -> None:
        self._known[named] = stamps[named]
        self._cleared_in[named] = number
        self._collected[named] = False
        self.tally.cleared += int(named.sum())

    def _complain(self, number: int, wrong: Bits, how: str) -> None:
        if wrong.any():
            pages = np.flatnonzero(wrong)
            shown = ", ".join(str(page) for page in pages[:_SHOWN]) + (", ..." if pages.size > _SHOWN else "")
            raise ContractError(f"round {number}: pages {shown} of {self._case.pages} were {how}")


def _to_bits(bitmap: PageBitmap) -> Bits:
    octets = bitmap.words.astype("<u8").view(np.uint8)
    return np.unpackbits(octets, bitorder="little").view(np.bool_)[: bitmap.pages]


def _make_writers(writing: Writing, case: Case, board: Board, place: int, seed: int) -> Writers:
    if writing is Writing.THREADS:
        return WriterThreads(board, WRITERS, stores(case, board, place, seed))
    if writing is Writing.PROCESSES:
        if case.fd is None:
            raise UsageError("other processes do not have this memory", remedy="give the case a descriptor of it")
        return WriterProcesses(case.fd, board, place, seed)
    if writing is Writing.UNICORN:
        return UnicornGuest(case.address, case.pages).stamp(board, place, seed)
    if isinstance(case, KVMCase):
        return case.guest.stamp(board, place, seed)
    return KVMGuest(case.address, case.pages).stamp(board, place, seed, closes=True)

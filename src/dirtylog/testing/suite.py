"""The tests that every tracker passes: derive a class from `TrackerSuite`, say how a case is made, and run pytest."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final, NoReturn
from unittest import SkipTest

import numpy as np

from dirtylog.errors import HostError
from dirtylog.memory import PageBitmap
from dirtylog.testing.contract import Case, Differences, Writing, check
from dirtylog.testing.model import ModelTracker
from dirtylog.testing.stamps import Stamps
from dirtylog.trackers import TrackedRange
from dirtylog.units import PAGE_SIZE, WORD_BITS, word_count

if TYPE_CHECKING:
    import pytest

_JUNK: Final = np.uint64(0x5555_AAAA_5555_AAAA)
_SHOWN: Final = 8
_WINDOWS: Final = ((70, 10), (960, 40), (0, 65), (900, 100), (63, 66), (64, 64), (127, 1), (0, 1000))
_WINDOW_PAGES: Final = 1000
_SCHEDULE_PAGES: Final = 200
_STEPS: Final = 60


class Bench:
    """A case with its tracker armed, and what it has to report.

    Attributes:
        case: who writes.
        differences: of the tracker.
    """

    def __init__(self, case: Case, differences: Differences) -> None:
        self.case = case
        self.differences = differences
        self._tracked = TrackedRange(case.tracker)
        self._owed: set[int] = set()
        self._collected: set[int] = set()
        self.arm()

    def arm(self) -> None:
        """Start tracking; nothing is owed."""
        self._tracked.arm()
        self._owed, self._collected = set(), set()

    def disarm(self) -> None:
        """Stop tracking; idempotent."""
        self._tracked.disarm()

    def write(self, pages: Iterable[int], offset: int = 0) -> None:
        """Write pages, one after the other."""
        pages = list(pages)
        self.case.write(pages, offset)
        self._owed |= set(pages) - self._collected  # others were reported, and count as written until they are cleared

    def clear(self, first: int, count: int) -> None:
        """Clear what was collected of a range."""
        self._tracked.clear(first, count)
        self._collected -= set(range(first, first + count))

    def clear_all(self) -> None:
        """Clear all that was collected."""
        self.clear(0, self.case.pages)

    def collect(self) -> set[int]:
        """The pages that are reported."""
        return self._note(pages_of(self._tracked.collect()))

    def _note(self, found: set[int]) -> set[int]:
        self._owed = set()
        if not self.differences.clears_on_collect:
            self._collected |= found
        return found

    def expect(self, wanted: Collection[int], when: str) -> None:
        """Collect, and find the wanted pages.

        A tracker that reports more may have reported, and had cleared, what others report now. Of it nothing is wanted
        but what was written and never reported since, or reported and not cleared.
        """
        self.check(pages_of(self._tracked.collect()), wanted, when)

    def check(self, found: set[int], wanted: Collection[int], when: str) -> None:
        """See that the pages found are those wanted, as in `expect`."""
        wanted, most = set(wanted), set(wanted)
        if self.differences.reports_everything:
            wanted = most = set(range(self.case.pages))
        elif self.differences.reports_more:
            wanted, most = self._owed | self._collected, found
        missing, odd = sorted(wanted - found), sorted(found - most)
        check(not missing, f"{when}: pages {_show(missing)} were written and not reported")
        check(not odd, f"{when}: pages {_show(odd)} were reported and not written")
        self._note(found)


class TrackerSuite(ABC):
    """What a tracker must do; a subclass, named ``Test...``, is for one tracker.

    Needs pytest, or whoever else calls each method whose name begins with ``test``: `parameters` says with what.

    Attributes:
        differences: how this tracker differs from the plainest one.
        sizes: numbers of pages to try.
        writers: who can write, whether the tracker sees them or not.
        rounds: how many rounds of stamps to check for each.
    """

    differences: ClassVar[Differences] = Differences()
    sizes: ClassVar[Sequence[int]] = (1, 63, 64, 65, 100, 1000)
    writers: ClassVar[Sequence[Writing]] = (Writing.THREADS,)
    rounds: ClassVar[int] = 200

    @abstractmethod
    def make(self, pages: int) -> Case:
        """A new case of so many pages."""

    def lacking(self, what: str, error: HostError) -> NoReturn:
        """Called where the host lacks what a test needs; skips it."""
        raise SkipTest(f"{what}: {error}") from error

    def parameters(self) -> dict[str, Sequence[object]]:
        """The values that a test is called with for each of its arguments."""
        return {"pages": self.sizes, "writing": self.writers, "window": _WINDOWS, "seed": range(5)}

    def pytest_generate_tests(self, metafunc: "pytest.Metafunc") -> None:
        """How pytest learns of `parameters`."""
        for name, values in self.parameters().items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=_name)

    @contextmanager
    def bench(self, pages: int, *, clean: bool = True) -> Iterator[Bench]:
        """A new case, armed. Unless ``clean`` is false, nothing of it is reported any more, if that can be."""
        case = self._case(pages)
        try:
            bench = self._bench(case)
            try:
                if clean:
                    bench.collect()
                    bench.clear_all()
                yield bench
            finally:
                bench.disarm()
        finally:
            case.close()

    def _case(self, pages: int) -> Case:
        try:
            return self.make(pages)
        except HostError as error:
            self.lacking("this tracker", error)

    def _bench(self, case: Case) -> Bench:
        try:
            return Bench(case, self.differences)
        except HostError as error:
            self.lacking("this tracker", error)

    def test_length_is_that_of_the_memory(self, pages: int) -> None:
        """A tracker knows how many pages it watches."""
        with self.bench(pages) as bench:
            check(bench.case.tracker.pages == pages, f"a tracker of {bench.case.tracker.pages} pages, not {pages}")

    def test_first_collect_reports_nothing_or_everything(self, pages: int) -> None:
        """Everything where that is declared."""
        with self.bench(pages, clean=False) as bench:
            bench.expect(range(pages) if self.differences.starts_all_set else (), "at first")

    def test_collect_reports_the_written_pages_and_no_others(self, pages: int) -> None:
        """No write is lost, and none is invented."""
        with self.bench(pages) as bench:
            bench.expect((), "before a write")
            written = {0, pages // 2, pages - 1}
            bench.write([*written, *written])
            bench.expect(written, "after writes")

    def test_every_page_can_be_reported(self, pages: int) -> None:
        """All pages at once, and none past the end."""
        with self.bench(pages) as bench:
            bench.write(range(pages))
            bench.expect(range(pages), "after every page was written")

    def test_any_byte_of_a_page_counts(self) -> None:
        """The first and the last, too."""
        for offset in (0, 1, PAGE_SIZE // 2, PAGE_SIZE - 1):
            with self.bench(100) as bench:
                bench.write([7], offset)
                bench.expect({7}, f"after a write of byte {offset}")

    def test_collect_fills_its_words_and_no_others(self, pages: int) -> None:
        """What stood in them does not matter, and their neighbours are not touched."""
        with self.bench(pages) as bench:
            bench.write([pages - 1])
            room = np.full(word_count(pages) + 2, _JUNK)
            bench.case.tracker.collect(room[1:-1])
            check(room[0] == room[-1] == _JUNK, "words beside those given were written")
            found = pages_of(PageBitmap(pages, room[1:-1].copy()))
            bench.check(found, {pages - 1}, "in words that were not zero before")

    def test_page_is_reported_until_it_is_cleared(self) -> None:
        """Or once, where collecting clears."""
        with self.bench(100) as bench:
            bench.write([7])
            bench.expect({7}, "after a write")
            bench.write([99])
            bench.expect({99} if self.differences.clears_on_collect else {7, 99}, "after another")

    def test_write_after_the_clear_is_reported_anew(self, pages: int) -> None:
        """Clearing protects."""
        with self.bench(pages) as bench:
            for turn in range(3):
                bench.write([pages - 1])
                bench.expect({pages - 1}, f"after write {turn}")
                bench.clear_all()
                bench.expect((), f"after clear {turn}")

    def test_write_that_was_not_collected_survives_a_clear(self) -> None:
        """It was not in what the clear was for, wherever it is."""
        with self.bench(200) as bench:
            bench.write([5, 70])
            bench.expect({5, 70}, "after writes")
            bench.write([6, 69, 71, 199])
            bench.clear_all()
            bench.expect({6, 69, 71, 199}, "after a clear that was not for them")

    def test_second_clear_passes_on_nothing(self) -> None:
        """What is written after a clear survives the next one."""
        with self.bench(100) as bench:
            bench.write([5, 70])
            bench.expect({5, 70}, "after writes")
            bench.clear_all()
            bench.write([5, 70])
            bench.clear_all()
            bench.clear(64, 36)
            bench.expect({5, 70}, "after clears that were not for them")

    def test_clear_of_a_range_leaves_the_rest(self, window: tuple[int, int]) -> None:
        """Also in the words that the range shares with others."""
        first, count = window
        with self.bench(_WINDOW_PAGES) as bench:
            bench.write(range(_WINDOW_PAGES))
            bench.expect(range(_WINDOW_PAGES), "after every page was written")
            bench.clear(first, count)
            cleared = set(range(first, first + count))
            left = set() if self.differences.clears_on_collect else set(range(_WINDOW_PAGES)) - cleared
            bench.expect(left, f"after pages {first} to {first + count} were cleared")
            bench.write(sorted(cleared))
            bench.expect(left | cleared, "after they were written anew")

    def test_clear_of_scattered_pages_leaves_those_between(self) -> None:
        """Only what is named is cleared."""
        with self.bench(_WINDOW_PAGES) as bench:
            bench.write(range(0, _WINDOW_PAGES, 3))
            bench.expect(range(0, _WINDOW_PAGES, 3), "after every third page was written")
            bench.write(range(1, _WINDOW_PAGES, 3))
            bench.clear_all()
            bench.expect(range(1, _WINDOW_PAGES, 3), "after the others were cleared")

    def test_rewriting_the_same_bytes_is_a_write(self) -> None:
        """Unless it is declared that only changes are reported."""
        with self.bench(100) as bench:
            bench.write([7] * 256)
            bench.expect(() if self.differences.reports_changes_only else {7}, "after a byte went round to what it was")

    def test_arming_anew_forgets_what_was_before(self) -> None:
        """A range without a log reads as clean once it has one."""
        with self.bench(100) as bench:
            bench.write([1])
            bench.disarm()
            bench.write([2])
            bench.arm()
            if self.differences.starts_all_set:
                bench.expect(range(100), "at first")
                bench.clear_all()
            bench.write([3])
            bench.expect({3}, "after it was armed anew")

    def test_trackers_keep_apart(self) -> None:
        """Neither reports, nor loses, what was written to the other's memory."""
        with self.bench(100) as one, self.bench(65) as other:
            one.write([1])
            other.write([2, 64])
            one.expect({1}, "beside another")
            one.clear_all()
            other.expect({2, 64}, "beside another that was collected and cleared")

    def test_write_through_another_mapping(self) -> None:
        """By this process or another; seen unless it is declared otherwise. Not for memory that is not shared."""
        with self.bench(100) as bench:
            if bench.case.fd is None:
                return
            with mmap(bench.case.fd, 100 * PAGE_SIZE) as other:
                other[5 * PAGE_SIZE] = 1
            seen = Writing.PROCESSES not in self.differences.blind_to
            bench.expect({5} if seen else (), "after a write through another mapping")

    def test_any_order_of_calls_agrees_with_the_model(self, seed: int) -> None:
        """Random writes, collects, clears of ranges, and arming anew."""
        choice = Random(seed)  # noqa: S311 - the same in every run
        pages = _SCHEDULE_PAGES - choice.randrange(WORD_BITS)
        model = ModelTracker(
            pages,
            clears_on_collect=bool(self.differences.clears_on_collect),
            starts_all_set=bool(self.differences.starts_all_set),
        )
        oracle = TrackedRange(model)
        oracle.arm()
        with self.bench(pages, clean=False) as bench:
            for step in range(_STEPS):
                self._take_step(choice, bench, model, oracle, f"in step {step}")

    def _take_step(
        self, choice: Random, bench: Bench, model: ModelTracker, oracle: TrackedRange[ModelTracker], when: str
    ) -> None:
        pages = bench.case.pages
        step = choice.choices(["write", "collect", "clear", "arm"], [4, 3, 3, 0.2])[0]
        if step == "write":
            written = choice.sample(range(pages), choice.randint(1, 6))
            bench.write(written)
            for page in written:
                model.write(page)
        elif step == "collect":
            bench.expect(pages_of(oracle.collect()), when)
        elif step == "clear":
            first = choice.randrange(pages)
            count = choice.randint(1, pages - first)
            bench.clear(first, count)
            oracle.clear(first, count)
        else:
            for tracked in (bench, oracle):
                tracked.disarm()
                tracked.arm()

    def test_stamps_of_writers_that_never_rest(self, writing: Writing) -> None:
        """See `stamps`."""
        case = self._case(_WINDOW_PAGES - 1)
        try:
            with Stamps(case, self.differences, writing, seed=1) as stamps:
                stamps.run(self.rounds)
        except HostError as error:
            self.lacking(writing.value, error)
        finally:
            case.close()


def pages_of(bitmap: PageBitmap) -> set[int]:
    """The numbers of the pages whose bits are set."""
    return set(bitmap.indices().tolist())


def _name(value: object) -> str:
    return value.value if isinstance(value, Writing) else str(value)


def _show(pages: list[int]) -> str:
    return ", ".join(map(str, pages[:_SHOWN])) + (", ..." if len(pages) > _SHOWN else "")

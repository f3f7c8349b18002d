"""The suite must notice what it is there to notice: broken trackers of every kind fail it, and the model passes it."""

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from unittest import SkipTest

import numpy as np
import pytest

from dirtylog.errors import HostError
from dirtylog.memory import Words
from dirtylog.testing import Case, ContractError, Differences, ModelCase, ModelTracker, TrackerSuite, Writing
from dirtylog.testing.model import PageLog
from dirtylog.units import WORD_BITS

CLEARS = Differences(clears_on_collect="it is made so")
STARTS_SET = Differences(starts_all_set="it is made so")
EVERYTHING = Differences(reports_everything="it is made so")
SIZES = (1, 65, 130)


class TestModel(TrackerSuite):
    def make(self, pages: int) -> Case:
        return case_of(ModelTracker, pages)


class TestModelThatClearsOnCollect(TrackerSuite):
    differences = CLEARS

    def make(self, pages: int) -> Case:
        return case_of(ModelTracker, pages, clears_on_collect=True)


class TestModelThatStartsAllSet(TrackerSuite):
    differences = STARTS_SET

    def make(self, pages: int) -> Case:
        return case_of(ModelTracker, pages, starts_all_set=True)


class HugePages(ModelTracker):
    """Whose log knows of 64 pages together only."""

    def write(self, page: int) -> None:
        start = page - page % 64
        for near in range(start, min(start + 64, self.pages)):
            super().write(near)


class TestModelOfHugePages(TrackerSuite):
    differences = Differences(reports_more="it is made so")

    def make(self, pages: int) -> Case:
        return case_of(HugePages, pages)


def case_of(
    tracker: Callable[..., ModelTracker], pages: int, *, clears_on_collect: bool = False, starts_all_set: bool = False
) -> ModelCase:
    bus = threading.RLock()
    return ModelCase(tracker(pages, clears_on_collect=clears_on_collect, starts_all_set=starts_all_set, bus=bus), bus)


class LosesAPage(ModelTracker):
    def write(self, page: int) -> None:
        if page != self.pages - 1:
            super().write(page)


class LosesTheLastWord(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        if self.pages % WORD_BITS:
            words[-1] = 0


class InventsAPage(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        words[0] |= np.uint64(1)


class NeverClears(ModelTracker):
    def clear(self, first: int, count: int, words: Words) -> None:
        pass


class ClearsTheWholeWindow(ModelTracker):
    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        log[first : first + count] = [PageLog.PROTECTED] * count


class ClearsEverything(ModelTracker):
    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        log[:] = [PageLog.PROTECTED] * self.pages


class ClearsAsIfFromTheStart(ModelTracker):
    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        for page in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")):
            log[page] = PageLog.PROTECTED


class ClearsAtTheNextCollect(ModelTracker):
    """Late: what is written in between is lost."""

    def _clear(self, log: list[PageLog], first: int, count: int, words: Words) -> None:
        self.late = first, words.copy()

    def _collect(self, words: Words) -> None:
        first, named = getattr(self, "late", (0, np.zeros(0, np.uint64)))
        for page in np.flatnonzero(np.unpackbits(named.view(np.uint8), bitorder="little")):
            self._armed("collect")[first + page] = PageLog.PROTECTED
        self.late = 0, named[:0]
        super()._collect(words)


class ClearsWhenItCollects(ModelTracker):
    """And does not say so."""

    def _collect(self, words: Words) -> None:
        super()._collect(words)
        self._armed("collect")[:] = [PageLog.PROTECTED] * self.pages

    def clear(self, first: int, count: int, words: Words) -> None:
        pass


class AddsToTheWords(ModelTracker):
    def _collect(self, words: Words) -> None:
        before = words.copy()
        super()._collect(words)
        words |= before


class WritesPastTheWords(ModelTracker):
    def _collect(self, words: Words) -> None:
        super()._collect(words)
        if words.base is not None:
            words.base[-1] = 0


class KeepsItsLogWhenDisarmed(ModelTracker):
    def disarm(self) -> None:
        self.kept = self._armed("disarm")
        super().disarm()

    def arm(self) -> None:
        super().arm()
        self._log = getattr(self, "kept", self._log)


class StartsAllSet(ModelTracker):
    """And does not say so."""

    def arm(self) -> None:
        super().arm()
        self._log = [PageLog.WRITTEN] * self.pages


class SharesItsLog(ModelTracker):
    """With all of its kind."""

    shared: ModelTracker | None = None

    def write(self, page: int) -> None:
        super().write(page)
        if SharesItsLog.shared is not None and SharesItsLog.shared.armed and page < SharesItsLog.shared.pages:
            ModelTracker.write(SharesItsLog.shared, page)

    def arm(self) -> None:
        super().arm()
        SharesItsLog.shared = self


class KnowsAnotherLength(ModelTracker):
    @property
    def pages(self) -> int:
        return super().pages + 1


BROKEN: list[type[ModelTracker]] = [
    LosesAPage,
    LosesTheLastWord,
    InventsAPage,
    NeverClears,
    ClearsTheWholeWindow,
    ClearsEverything,
    ClearsAsIfFromTheStart,
    ClearsAtTheNextCollect,
    ClearsWhenItCollects,
    AddsToTheWords,
    WritesPastTheWords,
    KeepsItsLogWhenDisarmed,
    StartsAllSet,
    SharesItsLog,
    KnowsAnotherLength,
]


class Suite(TrackerSuite):
    """The suite, to be run by a test instead of pytest; small."""

    sizes = SIZES
    writers = ()

    def __init__(self, make: Callable[[int], Case], differences: Differences = Differences()) -> None:  # noqa: B008 - frozen
        self._make = make
        self.differences = differences  # type: ignore[misc]

    def make(self, pages: int) -> Case:
        return self._make(pages)

    def complaints(self) -> list[str]:
        """Why tests failed."""
        return [str(error) for test in self._tests() if (error := _failure_of(test)) is not None]

    def _tests(self) -> Iterator[Callable[[], None]]:
        for name, test in inspect.getmembers(self, inspect.ismethod):
            if name.startswith("test_"):
                values = [self.parameters()[argument] for argument in inspect.signature(test).parameters]
                yield from (partial(test, *arguments) for arguments in itertools.product(*values))


def _failure_of(test: Callable[[], None]) -> ContractError | None:
    try:
        test()
    except ContractError as failure:
        return failure
    return None


def test_model_has_no_complaints() -> None:
    assert Suite(partial(case_of, ModelTracker)).complaints() == []


@pytest.mark.parametrize("tracker", BROKEN)
def test_broken_tracker_is_found_out(tracker: type[ModelTracker]) -> None:
    SharesItsLog.shared = None
    assert Suite(partial(case_of, tracker)).complaints()


@pytest.mark.parametrize(
    "differences",
    [
        CLEARS,
        STARTS_SET,
        EVERYTHING,
        Differences(reports_changes_only="it is said"),
    ],
    ids=["clears on collect", "starts all set", "reports everything", "reports changes only"],
)
def test_difference_that_is_declared_and_not_there_is_found_out(differences: Differences) -> None:
    assert Suite(partial(case_of, ModelTracker), differences).complaints()


@pytest.mark.parametrize("tracker", [LosesAPage, ClearsEverything, ClearsWhenItCollects])
def test_loss_is_found_out_where_more_may_be_reported(tracker: type[ModelTracker]) -> None:
    assert Suite(partial(case_of, tracker), Differences(reports_more="it is said")).complaints()


def test_host_that_lacks_something_skips_the_test() -> None:
    class CannotBeArmed(ModelTracker):
        def arm(self) -> None:
            raise HostError("there is no such thing here")

    def cannot_be_made(pages: int) -> Case:
        raise HostError("there is no such thing here")

    for make in (cannot_be_made, partial(case_of, CannotBeArmed)):
        with pytest.raises(SkipTest, match="this tracker: there is no such thing here"):
            Suite(make).test_any_byte_of_a_page_counts()
        with pytest.raises(SkipTest, match="there is no such thing here"):
            Suite(make).test_stamps_of_writers_that_never_rest(Writing.THREADS)

import numpy as np
import pytest
from support.model_tracker import ModelTracker

from dirtylog.errors import KernelError, UsageError
from dirtylog.memory import PageBitmap
from dirtylog.trackers import JoinedTracker, KVMLogMode
from dirtylog.units import word_count


class Part:
    """A tracker that keeps what it is told."""

    def __init__(self, pages: int, written: list[int], *, broken: bool = False) -> None:
        self.pages = pages
        self.written = written
        self.broken = broken
        self.told: list[tuple[object, ...]] = []

    def arm(self) -> None:
        if self.broken:
            raise KernelError("ioctl", 12, "no memory")
        self.told.append(("arm",))

    def collect(self, words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
        assert len(words) == word_count(self.pages)
        bitmap = PageBitmap(self.pages)
        for page in self.written:
            bitmap.set(page, 1)
        words[:] = bitmap.words

    def clear(self, first: int, count: int, words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
        named = PageBitmap(count, words.copy()).indices() + first
        self.told.append(("clear", first, count, named.tolist()))

    def disarm(self) -> None:
        self.told.append(("disarm",))


def test_parts_are_collected_one_after_the_other() -> None:  # W1
    joined = JoinedTracker([Part(128, [0, 127]), Part(64, [5]), Part(10, [9])])
    words = np.zeros(word_count(joined.pages), np.uint64)
    joined.collect(words)
    assert PageBitmap(joined.pages, words).indices().tolist() == [0, 127, 133, 201]


@pytest.mark.parametrize(
    ("pages", "told"),
    [
        ([1, 130, 192 + 3], [[("clear", 0, 128, [1])], [("clear", 0, 64, [2])], [("clear", 0, 10, [3])]]),
        ([130], [[], [("clear", 0, 64, [2])], []]),
        ([], [[], [], []]),
    ],
)
def test_clear_reaches_only_the_parts_that_have_pages_named(pages: list[int], told: list[object]) -> None:  # D9 W2
    parts = [Part(128, []), Part(64, []), Part(10, [])]
    joined = JoinedTracker(parts)
    named = PageBitmap(joined.pages)
    for page in pages:
        named.set(page, 1)
    joined.clear(0, joined.pages, named.words)
    assert [part.told for part in parts] == told


def test_window_in_the_middle_is_cut_at_the_parts() -> None:  # D9 W2
    parts = [Part(128, []), Part(128, [])]
    named = PageBitmap(128)
    named.set()
    JoinedTracker(parts).clear(64, 128, named.words)
    assert parts[0].told == [("clear", 64, 64, list(range(64, 128)))]
    assert parts[1].told == [("clear", 0, 64, list(range(64)))]


def test_part_that_cannot_be_armed_leaves_none_armed() -> None:  # T13
    parts = [Part(64, []), Part(64, [], broken=True)]
    with pytest.raises(KernelError):
        JoinedTracker(parts).arm()
    assert parts[0].told == [("arm",), ("disarm",)]


@pytest.mark.parametrize("sizes", [[], [63, 64]])
def test_parts_that_would_share_a_word_are_refused(sizes: list[int]) -> None:
    with pytest.raises(UsageError, match="whole 64-page words"):
        JoinedTracker([ModelTracker(KVMLogMode.MANUAL, pages) for pages in sizes])

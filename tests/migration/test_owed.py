from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.errors import ProtocolError
from dirtylog.linux.mapping import memory_of
from dirtylog.memory import Memory, PageBitmap
from dirtylog.migration import owed as owed_module
from dirtylog.migration.batch import Batch
from dirtylog.migration.messages import Lacking
from dirtylog.migration.owed import _BATCH_PAGES, OwedPages, in_messages
from dirtylog.migration.ram import DirtyRAM
from dirtylog.units import KIB, PAGE_SIZE

_SIZES = (3 * 512 + 40, 70)
"""Pages of two blocks. The first one has room for chunks that are holes."""
_CHUNK = 256 * KIB
Place = tuple[int, int]
"""A block's number, and a page's."""


class Source:
    """Two blocks, some of whose pages hold data, and what is owed of them."""

    def __init__(self, memory: Memory, data: set[Place], zeros: set[Place], owed: set[Place]) -> None:
        self.blocks = []
        walked = []
        for index, pages in enumerate(_SIZES):
            region = memory.ram(f"ram{index}", pages * PAGE_SIZE)
            assert region.block is not None
            self.blocks.append(region.block)
            walked.append(DirtyRAM(index, region, region.block, _CHUNK))
        for block, page in data | zeros:
            value = 0 if (block, page) in zeros else 1 + page % 251
            self.blocks[block].array[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = value
        self.owed = OwedPages([ram.owed() for ram in walked])
        self.owed.replace(_lacking(owed))

    def check(self, batch: Batch) -> list[Place]:
        """The pages of a batch, which has what is in memory."""
        places: list[Place] = []
        if batch.zeros is not None:
            for page in batch.zeros.numbers.tolist():
                assert not self._contents(batch.zeros.block, page).any()
                places.append((batch.zeros.block, page))
        if batch.pages is not None:
            sent = b"".join(bytes(memory_of(part)) for part in batch.contents)
            expected = [self._contents(batch.pages.block, page).tobytes() for page in batch.pages.numbers.tolist()]
            assert sent == b"".join(expected)
            places += [(batch.pages.block, page) for page in batch.pages.numbers.tolist()]
        return places

    def take(self) -> list[Place]:
        batch = self.owed.take()
        if batch is None:
            return []
        assert batch.pages is None or batch.pages.pages <= _BATCH_PAGES
        return self.check(batch)

    def ask(self, place: Place) -> list[Place]:
        """The page, if it was owed; it is to be sent in any case."""
        contents = self.owed.contents(*place)
        assert np.array_equal(np.zeros(PAGE_SIZE) if contents is None else contents, self._contents(*place))
        return [place] if self.owed.answered(*place) else []

    def _contents(self, block: int, page: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return self.blocks[block].array[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


def _lacking(places: set[Place]) -> list[Lacking]:
    messages = []
    for index, pages in enumerate(_SIZES):
        bitmap = PageBitmap(pages)
        for block, page in places:
            if block == index:
                bitmap.set(page, 1)
        if bitmap.any():
            messages.append(Lacking(index, bitmap.runs()))
    return messages


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


_places = st.integers(0, 1).flatmap(lambda block: st.tuples(st.just(block), st.integers(0, _SIZES[block] - 1)))
_clusters = st.tuples(_places, st.integers(1, 100)).map(
    lambda drawn: {(drawn[0][0], page) for page in range(drawn[0][1], min(drawn[0][1] + drawn[1], _SIZES[drawn[0][0]]))}
)
_sets = st.lists(_clusters, max_size=6).map(lambda clusters: set().union(*clusters))
_everything = {(block, page) for block, pages in enumerate(_SIZES) for page in range(pages)}


def _first_after(cursor: Place, owed: set[Place]) -> Place:
    """The next one in order, which begins anew at the end."""
    return min((place for place in owed if place >= cursor), default=min(owed))


@given(
    data=_sets,
    zeros=_sets,
    owed=st.one_of(_sets, st.just(_everything)),
    steps=st.lists(st.one_of(st.none(), _places, _sets), max_size=30),
)
@example(data=set(), zeros=set(), owed=_everything, steps=[(0, 700), None, (0, 3), None])
@example(data=_everything, zeros=set(), owed=_everything, steps=[(1, 69), None, (0, _SIZES[0] - 1), None])
def test_each_page_is_sent_once_in_whatever_order_they_are_asked_for(  # D1, M4
    data: set[Place], zeros: set[Place], owed: set[Place], steps: list[Place | set[Place] | None]
) -> None:
    """A step takes what is next, asks for a page, or says what is lacking after the connection was lost."""
    memory = Memory()
    source, left, cursor = Source(memory, data, zeros, owed), set(owed), (0, 0)
    for step in [*steps, *[None] * len(_everything)]:
        assert source.owed.pages == len(left)
        if isinstance(step, set):
            source.owed.replace(_lacking(step))
            left = set(step)
        elif isinstance(step, tuple):
            assert source.ask(step) == ([step] if step in left else [])
            left.discard(step)
            cursor = step[0], step[1] + 1
        else:
            sent = source.take()
            assert len(set(sent)) == len(sent)
            assert set(sent) <= left
            if not left:
                assert sent == []
                break
            assert min(sent) == _first_after(cursor, left)
            left -= set(sent)
            cursor = sent[0][0], max(sent)[1] + 1
    assert not left
    memory.close()


def test_hole_is_sent_as_a_whole(memory: Memory) -> None:
    source = Source(memory, {(0, 1300)}, set(), _everything)
    assert source.take() == [(0, page) for page in range(1300)]
    assert source.take() == [(0, 1300)]
    assert source.take() == [(0, page) for page in range(1301, _SIZES[0])]


def test_data_are_sent_a_batch_at_a_time(memory: Memory) -> None:
    source = Source(memory, _everything, set(), _everything)
    assert source.take() == [(0, page) for page in range(_BATCH_PAGES)]
    assert source.take() == [(0, page) for page in range(_BATCH_PAGES, 2 * _BATCH_PAGES)]


def test_runs_of_a_hole_fit_one_message(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.migration.owed.MAX_RUNS", 4)
    odd = {(0, page) for page in range(1, 100, 2)}
    source = Source(memory, set(), set(), odd)
    sent: list[Place] = []
    while batch := source.owed.take():
        assert batch.zeros is not None
        assert len(batch.zeros.runs) <= 4
        sent += source.check(batch)
    assert sent == sorted(odd)


def test_order_goes_on_where_was_asked_last(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.migration.owed._BATCH_PAGES", 100)
    source = Source(memory, _everything, set(), _everything)
    assert source.ask((0, 500)) == [(0, 500)]
    assert source.take()[0] == (0, 501)
    assert source.ask((1, 60)) == [(1, 60)]
    assert source.take() == [(1, page) for page in range(61, 70)]
    assert source.take()[0] == (0, 0)
    assert source.ask((0, 500)) == []  # it was sent; what is next is near there all the same
    assert source.take()[0] == (0, 601)


def test_announcements_name_what_is_owed(memory: Memory) -> None:
    owed = {(0, 3), (0, 4), (0, 9), (1, 69)}
    messages = list(Source(memory, set(), set(), owed).owed.announcements())
    assert {(message.block, page) for message in messages for page in message.numbers.tolist()} == owed
    assert [message.runs.tolist() for message in messages] == [[[3, 2], [9, 1]], [[69, 1]]]


def test_long_tables_are_said_in_several_messages(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed_module, "MAX_RUNS", 2)
    source = Source(memory, set(), set(), {(0, page) for page in range(0, 10, 2)})
    assert [message.runs.tolist() for message in source.owed.announcements()] == [
        [[0, 1], [2, 1]],
        [[4, 1], [6, 1]],
        [[8, 1]],
    ]


def test_no_runs_make_no_message() -> None:
    assert list(in_messages(np.empty((0, 2), np.int64))) == []


@pytest.mark.parametrize(
    ("block", "page"), [(2, 0), (0, _SIZES[0]), (1, _SIZES[1]), ((1 << 63) - 1, 0), (0, (1 << 63) - 1)]
)
def test_page_that_is_not_there_cannot_be_asked_for(memory: Memory, block: int, page: int) -> None:  # M5
    source = Source(memory, set(), set(), _everything)
    with pytest.raises(ProtocolError, match=f"asks for page {page} of block {block}"):
        source.owed.contents(block, page)
    assert source.owed.pages == len(_everything)


@pytest.mark.parametrize(
    ("block", "runs"),
    [(2, [[0, 1]]), (0, [[_SIZES[0], 1]]), (1, [[0, 1], [69, 2]]), (1, [[(1 << 52) - 1, (1 << 52) - 1]])],
)
def test_page_that_is_not_there_cannot_be_lacking(  # M5
    memory: Memory, block: int, runs: Sequence[Sequence[int]]
) -> None:
    owed = {(0, 3)}
    source = Source(memory, set(), set(), owed)
    with pytest.raises(ProtocolError, match=f"pages of block {block} that are not there"):
        source.owed.replace([Lacking(0, np.array([[7, 1]])), Lacking(block, np.array(runs, np.int64))])
    assert source.owed.pages == 1
    assert source.ask((0, 3)) == [(0, 3)]

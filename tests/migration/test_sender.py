from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.economies import WAYS, Fickle, Fixed

from dirtylog.linux.mapping import Contents, memory_of
from dirtylog.memory import Numbers, RAMBlock
from dirtylog.migration.batch import Batch, page_parts, runs_of
from dirtylog.migration.channel import Channel
from dirtylog.migration.economy import TELLING, Economy, Way
from dirtylog.migration.encoding import Compressor, Rows, SentCopies
from dirtylog.migration.messages import EncodedPages, Message, Pages, ZeroPages, encode
from dirtylog.migration.ram import IncomingRAM
from dirtylog.migration.sender import Sender, Sent
from dirtylog.units import PAGE_SIZE

_PAGES = 96


class _Destination(Channel):
    """Puts what it is sent into a block of its own, and remembers the messages."""

    def __init__(self) -> None:
        self.block = RAMBlock("copy", _PAGES * PAGE_SIZE)
        self.heard: list[Message] = []
        self.bytes = 0
        self._ram = IncomingRAM([self.block])

    def send(self, message: Message, payload: Iterable[Contents] = ()) -> int:
        self.heard.append(message)
        data = b"".join(map(memory_of, payload))
        size = len(encode(message)) + len(data)
        self.bytes += size
        if isinstance(message, EncodedPages):
            assert len(data) == message.payload_size
            self._ram.decode(message, bytearray(data))
        elif isinstance(message, Pages):
            for place in self._ram.place(message):
                place[:], data = data[: len(place)], data[len(place) :]
            assert not data
        elif isinstance(message, ZeroPages):
            self._ram.zero(message)
        return size

    def ways(self) -> list[tuple[str, int]]:
        """Kind of what was sent since the last look, and its pages."""
        heard = [
            ("DELTA" if isinstance(message, EncodedPages) and message.difference else type(message).__name__, message)
            for message in self.heard
        ]
        self.heard.clear()
        return [
            (name, message.pages) for name, message in heard if isinstance(message, Pages | EncodedPages | ZeroPages)
        ]


@dataclass
class _Line:
    """A block, a sender, and a destination."""

    economy: Economy
    cache: int = _PAGES * PAGE_SIZE
    block: RAMBlock = field(default_factory=lambda: RAMBlock("ram", _PAGES * PAGE_SIZE))
    destination: _Destination = field(default_factory=_Destination)

    def __post_init__(self) -> None:
        copies = SentCopies([_PAGES], self.cache) if self.cache else None
        self.sender = Sender(self.destination, [self.block], self.economy, copies)

    def send(self, *pages: int) -> Sent:
        """Some pages, those that are zero as such."""
        numbers = np.array(sorted(pages), np.int64)
        filled = self.block.page_words[numbers].any(axis=1)
        contents, zeros = runs_of(numbers[filled]), runs_of(numbers[~filled])
        return self.sender.send(
            Batch(
                Pages(0, contents) if len(contents) else None,
                page_parts(self.block, contents),
                ZeroPages(0, zeros) if len(zeros) else None,
            )
        )

    def check(self) -> None:
        assert np.array_equal(self.block.array, self.destination.block.array)

    def close(self) -> None:
        self.block.close()
        self.destination.block.close()


@pytest.fixture
def line() -> Iterator[_Line]:
    line = _Line(Fixed(Way.FAST, Way.DELTA))
    line.block.page_words[:, 1] = np.arange(1, _PAGES + 1)
    yield line
    line.close()


def _fixed(line: _Line) -> Fixed:
    assert isinstance(line.economy, Fixed)
    return line.economy


def test_pages_with_a_copy_are_sent_as_differences_and_the_others_not(line: _Line) -> None:
    line.send(*range(10))
    line.block.page_words[5:15, 7] += 1
    sent = line.send(*range(5, 15))
    assert line.destination.ways() == [("EncodedPages", 10), ("DELTA", 5), ("EncodedPages", 5)]
    assert {way: pages for way, (pages, _) in sent.ways.items()} == {Way.DELTA: 5, Way.FAST: 5}
    assert (sent.found, sent.missed) == (5, 5)
    assert np.array_equal(line.block.array[: 15 * PAGE_SIZE], line.destination.block.array[: 15 * PAGE_SIZE])


def test_bytes_and_ways_are_those_on_the_wire(line: _Line) -> None:
    line.block.page_words[3] = 0
    sent = line.send(*range(20))
    sent.merge(line.send(*range(10, 30)))
    assert sent.bytes == line.destination.bytes
    zeros = len(encode(next(message for message in line.destination.heard if isinstance(message, ZeroPages))))
    assert sum(size for _, size in sent.ways.values()) == sent.bytes - zeros
    assert sum(pages for pages, _ in sent.ways.values()) == 39


def test_page_that_was_zero_is_not_sent_as_a_difference(line: _Line) -> None:
    line.send(4)
    line.block.page_words[4] = 0
    line.send(4)
    line.block.page_words[4, 0] = 9
    line.send(4)
    assert line.destination.ways() == [("EncodedPages", 1), ("ZeroPages", 1), ("EncodedPages", 1)]


def test_page_that_was_sent_in_place_is_not_sent_as_a_difference(line: _Line) -> None:
    """The guest may have written it while it was sent, so nobody knows what the destination has."""
    line.send(4, 5)
    line.sender._keeping = 1.0  # copies take too long, all of a sudden
    _fixed(line).fresh = _fixed(line).known = Way.PLAIN
    line.send(4)
    line.sender._keeping = 0.0
    _fixed(line).fresh, _fixed(line).known = Way.FAST, Way.DELTA
    line.send(4, 5)
    assert line.destination.ways() == [("EncodedPages", 2), ("Pages", 1), ("DELTA", 1), ("EncodedPages", 1)]


def test_plain_pages_are_copied_if_a_copy_is_kept(line: _Line) -> None:
    _fixed(line).fresh = Way.PLAIN
    line.send(4)
    line.send(4)
    assert line.destination.ways() == [("Pages", 1), ("DELTA", 1)]


def test_contents_that_do_not_get_smaller_are_sent_as_they_are(line: _Line) -> None:
    noise = np.random.default_rng(1)
    for _ in range(2):
        line.block.page_words[:8] = noise.integers(0, 1 << 64, (8, PAGE_SIZE // 8), np.uint64)
        sent = line.send(*range(8))
        assert line.destination.ways() == [("Pages", 8)]
        assert sent.ways.keys() == {Way.PLAIN}
    assert sent.overflowed == 8  # differences of noise are noise
    assert [way for way, *_ in _fixed(line).samples] == [Way.FAST, Way.DELTA]


def test_guest_that_writes_while_its_pages_are_encoded_gets_the_later_write_sent_later(
    line: _Line, monkeypatch: pytest.MonkeyPatch
) -> None:  # D3
    before = line.block.array.copy()
    compress = Compressor.compress

    def meddle(self: Compressor, rows: Rows) -> bytes:
        line.block.array[:: PAGE_SIZE // 2] += 1
        return compress(self, rows)

    line.send(*range(_PAGES))
    with monkeypatch.context() as patch:
        patch.setattr(Compressor, "compress", meddle)
        line.send(*range(_PAGES))
    assert np.array_equal(line.destination.block.array, before)
    line.send(*range(_PAGES))
    assert line.destination.ways()[-1] == ("DELTA", _PAGES)
    line.check()


def test_without_other_ways_pages_are_sent_from_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _Line(Economy(()), cache=0)
    line.block.array[:] = 7
    payloads: list[list[memoryview]] = []

    def send(_: Message, payload: Iterable[Contents]) -> int:
        payloads.append([memory_of(part) for part in payload])
        return 100

    monkeypatch.setattr(line.destination, "send", send)
    line.send(1, 2, 9)
    line.block.array[:] = 8
    assert {view[0] for view in payloads[0]} == {8}
    payloads.clear()
    line.close()


def test_sample_is_of_pages_all_over_the_batch_and_not_sent(line: _Line) -> None:
    _fixed(line).fresh = Way.PLAIN
    _fixed(line).sample = Way.FAST
    line.send(*range(_PAGES))
    assert line.destination.ways() == [("Pages", _PAGES)]
    ((way, memory, wire),) = _fixed(line).samples
    assert (way, memory) == (Way.FAST, _PAGES * PAGE_SIZE)
    assert 0 < wire < memory
    line.check()


def test_sample_of_differences_is_of_pages_with_a_copy() -> None:
    assert TELLING // PAGE_SIZE <= _PAGES
    line = _Line(Fixed(Way.PLAIN))
    line.block.page_words[:] = np.random.default_rng(1).integers(0, 1 << 64, (_PAGES, PAGE_SIZE // 8), np.uint64)
    line.send(*range(70))
    _fixed(line).sample = Way.DELTA
    line.send(*range(_PAGES))
    ((way, memory, wire),) = _fixed(line).samples
    assert (way, memory) == (Way.DELTA, 70 * PAGE_SIZE)
    assert wire < memory / 100  # nothing has changed
    line.close()


@pytest.mark.parametrize("left", [0, 69])
def test_sample_whose_copies_another_channel_replaces_meanwhile_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    line = _Line(Fixed(Way.PLAIN))
    line.block.page_words[:, 1] = np.arange(1, _PAGES + 1)
    line.send(*range(70))
    differences = SentCopies.differences

    def late(copies: SentCopies, block: int, pages: Numbers, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
        copies.forget(block, pages[left:])
        return differences(copies, block, pages, rows)

    monkeypatch.setattr(SentCopies, "differences", late)
    _fixed(line).sample = Way.DELTA
    line.send(*range(_PAGES))
    assert _fixed(line).samples == []
    line.check()
    line.close()


def test_small_batch_is_not_sampled(line: _Line) -> None:
    _fixed(line).sample = Way.FAST
    line.send(*range(TELLING // PAGE_SIZE - 1))
    assert _fixed(line).samples == []


_PASS = st.tuples(
    st.sets(st.integers(0, _PAGES - 1), min_size=1),
    st.sampled_from(["count", "noise", "zero", "nothing"]),
)


@given(st.lists(_PASS, min_size=1, max_size=8), st.sampled_from([0, 1, 7, _PAGES]), st.integers(0, 1 << 30))
@settings(deadline=None)
def test_whatever_is_chosen_the_destination_ends_with_the_same_memory(
    passes: list[tuple[set[int], str]], cache: int, seed: int
) -> None:
    line = _Line(Fickle(WAYS if cache else WAYS[:2], seed), cache * PAGE_SIZE)
    noise = np.random.default_rng(seed)
    line.block.page_words[:, 1] = 1
    line.send(*range(_PAGES))
    total = Sent()
    for pages, change in passes:
        chosen = sorted(pages)
        if change == "count":
            line.block.page_words[chosen, 3] += 1
        elif change == "noise":
            line.block.page_words[chosen] = noise.integers(0, 1 << 64, (len(chosen), PAGE_SIZE // 8), np.uint64)
        elif change == "zero":
            line.block.page_words[chosen] = 0
        total.merge(line.send(*chosen))
        line.check()
    assert sum(pages for pages, _ in total.ways.values()) <= sum(len(pages) for pages, _ in passes)
    line.close()

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import Task

from dirtylog.errors import ProtocolError
from dirtylog.memory import Numbers
from dirtylog.migration.economy import LEVELS
from dirtylog.migration.encoding import Compressor, Rows, SentCopies, decompress
from dirtylog.units import MIB, PAGE_SIZE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WORDS = PAGE_SIZE // 8


def _pages(*first_words: int) -> Rows:
    """Pages that differ in their first word only."""
    rows = np.zeros((len(first_words), _WORDS), np.uint64)
    rows[:, 0] = first_words
    return rows


def _noise(pages: int, seed: int = 1) -> Rows:
    return np.random.default_rng(seed).integers(0, 1 << 64, (pages, _WORDS), np.uint64)


def _numbers(*numbers: int) -> Numbers:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("level", sorted(set(LEVELS.values())))
@pytest.mark.parametrize("pages", [1, 3, 1024])
@pytest.mark.parametrize("contents", ["zeros", "noise", "both"])
def test_pages_survive_a_round_trip(level: int, pages: int, contents: str) -> None:
    rows = np.zeros((pages, _WORDS), np.uint64) if contents == "zeros" else _noise(pages)
    if contents == "both":
        rows[::2] = 0
    compressor = Compressor(level)
    for _ in range(2):  # one frame says nothing about the next
        assert np.array_equal(decompress(compressor.compress(rows), pages), rows)


def test_differences_of_pages_that_changed_little_take_next_to_nothing() -> None:
    old = _noise(256)
    new = old.copy()
    new[:, 7] += 1
    assert len(Compressor(1).compress(old ^ new)) < 256 * PAGE_SIZE // 100


_FRAME = Compressor(1).compress(_noise(1).repeat(2, axis=0))


def _bomb() -> bytes:
    compressor = zstd.ZstdCompressor(1)
    zeros = bytes(16 * MIB)
    return b"".join(compressor.compress(zeros) for _ in range(64)) + compressor.flush()


def _wide_window() -> bytes:
    """A frame that asks for a window of 128 MiB."""
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    return compressor.compress(bytes(2 * PAGE_SIZE)) + compressor.flush()


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"\0" * 20,
        lambda: _FRAME[:-1],
        lambda: _FRAME[: len(_FRAME) // 2],
        lambda: _FRAME + b"\0",
        lambda: _FRAME + _FRAME,
        lambda: Compressor(1).compress(_noise(1)),
        lambda: Compressor(1).compress(_noise(3)),
        lambda: zstd.compress(bytes(2 * PAGE_SIZE - 1)),
        lambda: zstd.compress(bytes(2 * PAGE_SIZE + 1)),
        lambda: zstd.compress(b""),
        _bomb,
        _wide_window,
    ],
    ids=[
        "nothing",
        "no-frame",
        "last-byte-missing",
        "half-missing",
        "byte-too-many",
        "two-frames",
        "page-missing",
        "page-too-many",
        "byte-of-a-page-missing",
        "byte-past-the-pages",
        "empty-frame",
        "bomb",
        "wide-window",
    ],
)
def test_frame_of_anything_but_the_pages_is_refused(make: Callable[[], bytes]) -> None:  # M5
    with pytest.raises(ProtocolError, match="the stream is corrupt"):
        decompress(make(), 2)


@given(st.integers(0, len(_FRAME) - 1), st.integers(1, 255))
def test_any_change_of_a_frame_gives_two_pages_or_a_protocol_error(place: int, change: int) -> None:  # M5
    frame = bytearray(_FRAME)
    frame[place] ^= change
    try:
        assert decompress(frame, 2).shape == (2, _WORDS)
    except ProtocolError:
        return


@given(st.binary(max_size=100), st.integers(1, 4))
def test_any_bytes_give_pages_or_a_protocol_error(data: bytes, pages: int) -> None:  # M5
    try:
        assert decompress(data, pages).shape == (pages, _WORDS)
    except ProtocolError:
        return


class TestSentCopies:
    def test_pages_are_unknown_at_first(self) -> None:
        assert not SentCopies([8, 4], 1 << 20).known(1, _numbers(0, 3)).any()

    def test_difference_is_between_what_was_kept_and_what_is_new(self) -> None:
        copies = SentCopies([8], 1 << 20)
        copies.keep(0, _numbers(1, 5), _pages(3, 9))
        known, differences = copies.differences(0, _numbers(1, 2, 5), _pages(2, 7, 9))
        assert known.tolist() == [True, False, True]
        assert np.array_equal(differences, _pages(1, 0))

    def test_blocks_do_not_share_pages(self) -> None:
        copies = SentCopies([8, 8], 1 << 20)
        copies.keep(0, _numbers(1), _pages(3))
        assert not copies.known(1, _numbers(1)).any()

    def test_forgotten_pages_are_unknown(self) -> None:
        copies = SentCopies([8], 1 << 20)
        copies.keep(0, _numbers(1, 2), _pages(3, 4))
        copies.forget(0, _numbers(1, 6))
        assert copies.known(0, _numbers(1, 2, 6)).tolist() == [False, True, False]

    def test_page_that_shares_a_place_drives_the_other_out(self) -> None:
        copies = SentCopies([8], 4 * PAGE_SIZE)
        copies.keep(0, _numbers(1), _pages(3))
        copies.forget(0, _numbers(5))  # is not there
        assert copies.known(0, _numbers(1, 5)).tolist() == [True, False]
        copies.keep(0, _numbers(5), _pages(4))
        assert copies.known(0, _numbers(1, 5)).tolist() == [False, True]

    @pytest.mark.parametrize("size", [PAGE_SIZE, 10 * PAGE_SIZE, 64 * PAGE_SIZE, 1 << 50])
    def test_copies_take_no_more_than_allowed_and_one_page_a_block(self, size: int) -> None:
        copies = SentCopies([48, 16], size)
        count = sum(places._rows.shape[0] for places in copies._places)
        assert 2 <= count <= max(2, min(64, size // PAGE_SIZE))

    @given(st.data())
    @settings(deadline=None)
    def test_it_knows_what_a_dictionary_would(self, data: st.DataObject) -> None:
        pages, places = 24, data.draw(st.integers(1, 24))
        copies = SentCopies([pages], places * PAGE_SIZE)
        oracle: dict[int, tuple[int, int]] = {}  # by place: page, first word
        for word in range(1, data.draw(st.integers(1, 12)) + 1):
            numbers = sorted(data.draw(st.sets(st.integers(0, pages - 1), min_size=1)))
            rows = _pages(*(word * 100 + page for page in numbers))
            if data.draw(st.booleans()):
                copies.keep(0, _numbers(*numbers), rows)
                oracle |= {page % places: (page, word * 100 + page) for page in numbers}
            else:
                copies.forget(0, _numbers(*numbers))
                for page in numbers:
                    if oracle.get(page % places, (None, 0))[0] == page:
                        del oracle[page % places]
            known, kept = copies.differences(0, np.arange(pages), np.zeros((pages, _WORDS), np.uint64))
            assert dict(zip(np.flatnonzero(known).tolist(), kept[:, 0].tolist(), strict=True)) == dict(oracle.values())

    def test_threads_that_share_places_see_no_mixture(self) -> None:
        """Each page holds its own number; the difference with it is zero, whoever had the place in between."""
        copies = SentCopies([64], 8 * PAGE_SIZE)
        start = threading.Barrier(3)

        def work(offset: int) -> None:
            numbers = np.arange(offset, 64, 3)
            rows = np.repeat(numbers.astype(np.uint64)[:, None], _WORDS, axis=1)
            start.wait()
            for _ in range(200):
                copies.keep(0, numbers, rows)
                _, differences = copies.differences(0, numbers, rows)
                assert not differences.any()
                copies.forget(0, numbers[::2])

        for task in [Task(lambda offset=offset: work(offset)) for offset in range(3)]:  # type: ignore[misc]
            task.join()

import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from support.waiting import wait_until

from dirtylog.errors import CancelledError, DisconnectedError, ProtocolError, RefusedError
from dirtylog.memory import RAMBlock
from dirtylog.migration.channel import Channel
from dirtylog.migration.encoding import Compressor, Rows
from dirtylog.migration.filler import Filler, SideFiller
from dirtylog.migration.messages import (
    EncodedPages,
    Failed,
    Join,
    Joined,
    Message,
    Pages,
    PassDone,
    PassEnd,
    Runs,
    ZeroPages,
)
from dirtylog.migration.protocol import Role
from dirtylog.migration.ram import IncomingRAM
from dirtylog.units import PAGE_SIZE

_RUNS: Runs = np.array([[1, 2], [5, 1]], np.int64)


def _rows(value: int) -> Rows:
    return np.full((3, PAGE_SIZE // 8), value, np.uint64)


@pytest.fixture
def block() -> Iterator[RAMBlock]:
    block = RAMBlock("ram", 8 * PAGE_SIZE)
    yield block
    block.close()


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """A further channel: the source's end and the destination's."""
    one, other = socket.socketpair()
    with Channel(one, Role.SOURCE) as source, Channel(other, Role.DESTINATION) as destination:
        source.send(Join(bytes(16)))
        destination.expect(Join)
        destination.send(Joined())
        source.expect(Joined)
        yield source, destination


def _encoded(rows: Rows, *, difference: bool) -> tuple[EncodedPages, list[memoryview]]:
    data = Compressor(1).compress(rows)
    return EncodedPages(0, _RUNS, size=len(data), difference=difference), [memoryview(data)]


def _take(ends: tuple[Channel, Channel], filler: Filler, message: Message, payload: list[memoryview]) -> None:
    ends[0].send(message, payload)
    filler.take(ends[1].receive())


def test_memory_becomes_what_messages_say(ends: tuple[Channel, Channel], block: RAMBlock) -> None:
    filler = Filler(ends[1], IncomingRAM([block]))
    block.array[:] = 0xEE  # must not show through  # M4
    words = block.page_words
    _take(ends, filler, Pages(0, _RUNS), [_rows(3).data.cast("B")])
    assert words[[1, 2, 5]].tolist() == _rows(3).tolist()
    _take(ends, filler, *_encoded(_rows(7), difference=True))
    assert words[[1, 2, 5]].tolist() == _rows(3 ^ 7).tolist()
    _take(ends, filler, *_encoded(_rows(9), difference=False))
    assert words[[1, 2, 5]].tolist() == _rows(9).tolist()
    _take(ends, filler, ZeroPages(0, _RUNS), [])
    assert not words[[1, 2, 5]].any()
    assert (words[[0, 3, 4, 6, 7]] == 0xEEEEEEEEEEEEEEEE).all()


def test_pass_is_answered_with_what_was_decoded_in_it(ends: tuple[Channel, Channel], block: RAMBlock) -> None:
    filler = Filler(ends[1], IncomingRAM([block]))
    for number, messages in ((1, 2), (2, 0), (3, 1)):
        for _ in range(messages):
            _take(ends, filler, *_encoded(_rows(7), difference=True))
        _take(ends, filler, PassEnd(number), [])
        done = ends[0].expect(PassDone)
        assert (done.number, done.decoded) == (number, messages * 3 * PAGE_SIZE)
        assert (done.decode_ns > 0) == (messages > 0)
        assert done.starved_ns >= 0


def test_source_that_gives_up_is_told_with_its_reason(ends: tuple[Channel, Channel], block: RAMBlock) -> None:
    with pytest.raises(RefusedError, match="the source gave up: out of paper"):
        _take(ends, Filler(ends[1], IncomingRAM([block])), Failed("out of paper"), [])


def test_message_that_is_not_about_memory_is_refused(ends: tuple[Channel, Channel], block: RAMBlock) -> None:  # M5
    with pytest.raises(ProtocolError, match="the source sent Join where only memory is expected"):
        Filler(ends[1], IncomingRAM([block])).take(Join(bytes(16)))


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize(
    ("runs", "data", "cause"),
    [
        (_RUNS, b"garbage", "7 bytes are no zstd frame"),
        (_RUNS, Compressor(1).compress(_rows(1)[:2]), "is not 3 pages"),
        (_RUNS, Compressor(1).compress(_rows(1)) + b"\0", "is not 3 pages"),
        (np.array([[6, 3]], np.int64), Compressor(1).compress(_rows(1)), "page 8 of block 'ram', which has 8"),
    ],
    ids=["no-frame", "too-short", "too-long", "past-the-block"],
)
def test_encoded_pages_that_are_not_are_refused_and_change_nothing(  # M5
    ends: tuple[Channel, Channel], block: RAMBlock, runs: Runs, data: bytes, cause: str, difference: bool
) -> None:
    message = EncodedPages(0, runs, size=len(data), difference=difference)
    with pytest.raises(ProtocolError, match=cause):
        _take(ends, Filler(ends[1], IncomingRAM([block])), message, [memoryview(data)])
    assert not block.array.any()


class TestSide:
    def test_memory_arrives_until_it_is_closed(self, ends: tuple[Channel, Channel], block: RAMBlock) -> None:
        failures: list[None] = []
        with closing(SideFiller(ends[1], IncomingRAM([block]), lambda: failures.append(None))) as side:
            ends[0].send(Pages(0, _RUNS), [_rows(3).data.cast("B")])
            ends[0].send(PassEnd(1))
            assert ends[0].expect(PassDone).number == 1
            side.close()
            assert not side._thread.is_alive()
            with pytest.raises(DisconnectedError):
                ends[0].send(Pages(0, _RUNS), [_rows(4).data.cast("B")])
            side.check()
        assert block.page_words[1, 0] == 3
        assert failures == []

    def test_what_ends_it_early_is_told_and_raised(self, ends: tuple[Channel, Channel], block: RAMBlock) -> None:
        failures: list[None] = []
        with closing(SideFiller(ends[1], IncomingRAM([block]), lambda: failures.append(None))) as side:
            side.check()
            ends[0].send(Pages(7, _RUNS), [_rows(3).data.cast("B")])
            wait_until(lambda: failures, "the failure was told")
            with pytest.raises(ProtocolError, match="pages of block 7 of 1"):
                side.check()
        with pytest.raises(ProtocolError):
            side.check()

    def test_defect_is_raised_and_not_lost_in_the_thread(
        self, ends: tuple[Channel, Channel], block: RAMBlock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(IncomingRAM, "zero", broken)
        failures: list[None] = []
        with closing(SideFiller(ends[1], IncomingRAM([block]), lambda: failures.append(None))) as side:
            ends[0].send(ZeroPages(0, _RUNS))
            wait_until(lambda: failures, "the failure was told")
            with pytest.raises(MemoryError):
                side.check()

    def test_abort_of_its_channel_ends_it(self, ends: tuple[Channel, Channel], block: RAMBlock) -> None:
        with closing(SideFiller(ends[1], IncomingRAM([block]), lambda: None)) as side:
            ends[1].abort()
            side._thread.join(30)
            with pytest.raises(CancelledError):
                side.check()

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.connected import Ends, connected
from support.waiting import Task, wait_until

from dirtylog.errors import DisconnectedError, ProtocolError
from dirtylog.migration.messages import (
    HEAD,
    PAGE_FRAME,
    Failed,
    Joined,
    Message,
    OnePage,
    Page,
    PassEnd,
    Request,
    ZeroPage,
    encode,
)
from dirtylog.migration.protocol import Role, Stage
from dirtylog.migration.urgent_channel import UrgentChannel
from dirtylog.units import PAGE_SIZE

_BIG = (1 << 64) - 1
_CONTENTS = {number: bytes([number]) * PAGE_SIZE for number in range(1, 10)}
_BODY = PAGE_FRAME.size - HEAD.size

Received = list[tuple[int, int, bytes | None]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with connected(Stage.SIDE) as ends:
        yield ends


def _received(side: UrgentChannel) -> Received:
    """What has arrived: numbers of block and page, and contents."""
    return [
        (block, page, ctypes.string_at(address, PAGE_SIZE) if address else None)
        for block, page, address in side.receive()
    ]


def _said(message: OnePage) -> bytes:
    return encode(message) + (_CONTENTS[message.page] if isinstance(message, Page) else b"")


def _heard(message: OnePage) -> tuple[int, int, bytes | None]:
    return message.block, message.page, _CONTENTS[message.page] if isinstance(message, Page) else None


@pytest.mark.parametrize("kind", [Request, Page, ZeroPage])
def test_what_is_sent_is_the_message_as_any_other(ends: Ends, kind: type[OnePage]) -> None:
    near, far = ends if kind is Request else ends[::-1]
    contents = memoryview(_CONTENTS[7]) if kind is Page else None
    size = UrgentChannel(far, Role.SOURCE).send(kind, 3, 7, contents)
    assert near.expect(kind) == kind(3, 7)
    if contents is not None:
        received = bytearray(PAGE_SIZE)
        near.receive_into([memoryview(received)])
        assert received == contents
    assert size == len(_said(kind(3, 7)))
    near.check_quiet()


def test_all_that_arrived_together_are_received_together(ends: Ends) -> None:
    requests = [Request(0, 3), Request(_BIG, _BIG), Request(1, 0)]
    for request in requests:
        ends.destination.send(request)
    assert _received(UrgentChannel(ends.source, Role.SOURCE)) == [_heard(request) for request in requests]


def test_nothing_is_received_where_nothing_arrived(ends: Ends) -> None:
    assert _received(UrgentChannel(ends.source, Role.SOURCE)) == []


@given(
    st.lists(
        st.one_of(
            st.builds(Page, st.integers(0, _BIG), st.integers(1, 9)), st.builds(ZeroPage, *[st.integers(1, 9)] * 2)
        ),
        max_size=9,
    ),
    st.lists(st.integers(1, 3 * PAGE_SIZE), min_size=1),
)
def test_pieces_in_which_messages_arrive_make_no_difference(messages: list[OnePage], sizes: list[int]) -> None:
    data = b"".join(map(_said, messages))
    with connected(Stage.SIDE) as ends:
        side = UrgentChannel(ends.destination, Role.DESTINATION)
        found: Received = []
        pieces = iter(sizes * (len(data) // min(sizes) + 1))
        while data:
            size = next(pieces)
            ends.source._socket.sendall(data[:size])
            data = data[size:]
            found += _received(side)
    assert found == [_heard(message) for message in messages]


def test_more_than_fits_into_the_buffer_is_received_all_the_same(ends: Ends) -> None:
    pages = [Page(0, number) for number in _CONTENTS]
    side = UrgentChannel(ends.destination, Role.DESTINATION)
    sending = Task(lambda: ends.source._socket.sendall(b"".join(map(_said, pages))))
    found: Received = []

    def has_all() -> bool:
        found.extend(_received(side))
        return len(found) == len(pages)

    wait_until(has_all, "all were received")
    sending.join()
    assert found == [_heard(page) for page in pages]


@pytest.mark.parametrize(
    ("role", "message", "reason"),
    [
        (Role.SOURCE, Failed("x"), "the destination sent Failed where only requests are expected"),
        (Role.SOURCE, Joined(), "the destination sent Joined where only requests are expected"),
        (Role.SOURCE, Page(0, 3), "the destination sent Page where only requests are expected"),
        (Role.DESTINATION, Failed("x" * 4000), "the source sent Failed where only pages are expected"),
        (Role.DESTINATION, Request(0, 3), "the source sent Request where only pages are expected"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_other_messages_are_refused(ends: Ends, role: Role, message: Message, reason: str, first: bool) -> None:  # M5
    near, far = ends if role is Role.SOURCE else ends[::-1]
    before = Request(0, 1) if role is Role.SOURCE else ZeroPage(0, 1)
    far._socket.sendall((b"" if first else encode(before)) + encode(message))
    with pytest.raises(ProtocolError, match=reason):
        _received(UrgentChannel(near, role))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ((99, 0, _BODY), "no message has the type 99"),
        ((Request.TYPE, 1, _BODY), "flags 1"),
        ((Request.TYPE, 0, _BODY + 1), "a Request message of 17 bytes"),
        ((Request.TYPE, 0, _BODY - 1), "a Request message of 15 bytes"),
    ],
)
def test_malformed_frame_is_refused(ends: Ends, head: tuple[int, int, int], reason: str) -> None:  # M5
    ends.destination._socket.sendall(HEAD.pack(*head) + bytes(_BODY))
    with pytest.raises(ProtocolError, match=f"the stream is corrupt: .*{reason}"):
        _received(UrgentChannel(ends.source, Role.SOURCE))


@pytest.mark.parametrize("head", [(Request.TYPE, 1, _BODY), (Request.TYPE, 0, 9999), (PassEnd.TYPE, 0, 2)])
def test_wrong_head_is_refused_before_the_rest_comes(ends: Ends, head: tuple[int, int, int]) -> None:  # M5
    ends.destination._socket.sendall(HEAD.pack(*head))
    with pytest.raises(ProtocolError):
        _received(UrgentChannel(ends.source, Role.SOURCE))


def test_end_is_told_after_what_came_before(ends: Ends) -> None:
    ends.destination.send(Request(0, 3))
    ends.destination.close()
    side = UrgentChannel(ends.source, Role.SOURCE)
    assert _received(side) == [(0, 3, None)]
    with pytest.raises(DisconnectedError):
        _received(side)

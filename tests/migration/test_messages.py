import struct

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.errors import ProtocolError
from dirtylog.migration import messages
from dirtylog.migration.messages import (
    HEAD,
    MAX_BATCH_PAGES,
    MAX_BODY,
    MAX_CHANNELS,
    MAX_FACTS_BODY,
    MAX_FILES,
    MAX_NAME,
    MAX_NAMES,
    MAX_PARTS,
    MAX_RUNS,
    MAX_SHORT_BODY,
    MESSAGES,
    BlockInfo,
    Digests,
    EncodedPages,
    Failed,
    Handover,
    Hello,
    Join,
    Joined,
    Lacking,
    Message,
    Owed,
    Page,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    Request,
    Resume,
    Resumed,
    Shared,
    State,
    Taken,
    Welcome,
    ZeroPage,
    ZeroPages,
    decode_body,
    decode_head,
    encode,
)
from dirtylog.migration.protocol import Protocol, Role, Stage
from dirtylog.units import PAGE_SIZE

_BIG = (1 << 63) - 1


def _runs(*runs: tuple[int, int]) -> messages.Runs:
    return np.array(runs, np.int64).reshape(-1, 2)


# Each message once, with the stage at which it may come, and its frame as docs/wire-format.md has it.
_TABLE: list[tuple[Stage, Message, str]] = [
    (
        Stage.OPENING,
        Hello("kvm-x86-pc", (BlockInfo("pc.ram", 1 << 30, 4096),), False, 1, bytes(16), False, False),
        "0100 0000 7e000000"
        "87 a7 6d616368696e65 aa 6b766d2d7838362d7063"  # machine: kvm-x86-pc
        "a6 626c6f636b73 91 83 a4 6e616d65 a6 70632e72616d"  # blocks: name: pc.ram
        "a4 73697a65 ce 40000000 a9 706167655f73697a65 cd 1000"  # size, page_size
        "a6 766572696679 c2"  # verify: false
        "a8 6368616e6e656c73 01"  # channels: 1
        "a7 73657373696f6e c4 10 00000000000000000000000000000000"  # session
        "a6 736861726564 c2"  # shared: false
        "a8 706f7374636f7079 c2",  # postcopy: false
    ),
    (
        Stage.OFFERED,
        Welcome("b/pid:[1]", 4242, 70000),
        "0200 0000 2a000000 83 a7 626f6f745f6964 a9 622f7069643a5b315d a3 706964 cd 1092"
        "aa 73746172745f74696d65 ce 00011170",
    ),
    (
        Stage.STREAMING,
        Pages(0, _runs((3, 1))),
        "0300 0000 18000000 00000000 01000000 0300000000000000 0100000000000000",
    ),
    (
        Stage.STREAMING,
        ZeroPages(1, _runs((0, 2), (16, 1 << 40))),
        "0400 0000 28000000 01000000 020000000000000000000000 0200000000000000 1000000000000000 0000000000010000",
    ),
    (Stage.STREAMING, PassEnd(1), "0500 0000 09000000 81 a6 6e756d626572 01"),
    (
        Stage.PASS_ENDED,
        PassDone(1, 200, 1 << 20, 7),
        "0600 0000 2e000000 84 a6 6e756d626572 01 aa 737461727665645f6e73 cc c8"
        "a7 6465636f646564 ce 00100000 a9 6465636f64655f6e73 07",
    ),
    (Stage.STREAMING, Digests((b"\x01" * 32,)), f"0700 0000 2b000000 81 a6 626c6f636b73 91 c4 20 {'01' * 32}"),
    (
        Stage.STREAMING,
        State(True, {"cpu0": {"regs": b"\x00"}}),
        "0800 0000 1f000000 82 a7 72756e6e696e67 c3 a5 7061727473 81 a4 63707530 81 a4 72656773 c4 01 00",
    ),
    (
        Stage.STATE_SENT,
        Ready((), 0),
        "0900 0000 15000000 82 a7 64696765737473 90 a9 7665726966795f6e73 00",
    ),
    (Stage.READY, Handover(), "0a00 0000 01000000 80"),
    (Stage.HANDED_OVER, Taken(), "0b00 0000 01000000 80"),
    (Stage.STREAMING, Failed("no"), "0c00 0000 0b000000 81 a6 726561736f6e a2 6e6f"),
    (
        Stage.SIDE,
        EncodedPages(0, _runs((3, 2)), size=300, difference=True),
        "0d00 0000 20000000 00000000 01000000 0300000000000000 0200000000000000 2c010000 01000000",
    ),
    (
        Stage.OPENING,
        Join(b"0123456789abcdef"),
        "0e00 0000 1b000000 81 a7 73657373696f6e c4 10 30313233343536373839616263646566",
    ),
    (Stage.JOINING, Joined(), "0f00 0000 01000000 80"),
    (Stage.STREAMING, Shared(2), "1000 0000 08000000 81 a5 66696c6573 02"),
    (
        Stage.STREAMING,
        Owed(1, _runs((0, 2), (16, 4))),
        "1100 0000 28000000 01000000 02000000 0000000000000000 0200000000000000 1000000000000000 0400000000000000",
    ),
    (Stage.SIDE, Request(1, 300), "1200 0000 10000000 0100000000000000 2c01000000000000"),
    (Stage.SIDE, Page(1, 300), "1600 0000 10000000 0100000000000000 2c01000000000000"),
    (Stage.SIDE, ZeroPage(1, 300), "1700 0000 10000000 0100000000000000 2c01000000000000"),
    (
        Stage.OPENING,
        Resume(b"0123456789abcdef"),
        "1300 0000 1b000000 81 a7 73657373696f6e c4 10 30313233343536373839616263646566",
    ),
    (
        Stage.RESUMING,
        Lacking(0, _runs((3, 1))),
        "1400 0000 18000000 00000000 01000000 0300000000000000 0100000000000000",
    ),
    (Stage.RESUMING, Resumed(), "1500 0000 01000000 80"),
]
_EACH = pytest.mark.parametrize(
    ("stage", "message", "frame"),
    [(stage, message, bytes.fromhex(text)) for stage, message, text in _TABLE],
    ids=[type(message).__name__ for _, message, _ in _TABLE],
)


def test_table_has_every_message() -> None:
    assert {type(message) for _, message, _ in _TABLE} == set(MESSAGES.values())
    assert {kind.TYPE: kind for kind in MESSAGES.values()} == MESSAGES


@_EACH
def test_message_has_the_documented_frame(stage: Stage, message: Message, frame: bytes) -> None:
    assert encode(message).hex(" ") == frame.hex(" ")


@_EACH
def test_frame_read_whole_gives_the_message(stage: Stage, message: Message, frame: bytes) -> None:
    kind, length = decode_head(frame[: HEAD.size])
    assert length == len(frame) - HEAD.size
    assert decode_body(kind, frame[HEAD.size :]) == message


def _conversation(role: Role, stage: Stage) -> Protocol:
    """A side's protocol at some stage, past the preambles."""
    protocol = Protocol(role)
    protocol.receive(Protocol.preamble())
    protocol.stage = stage
    return protocol


@_EACH
def test_frame_that_arrives_byte_by_byte_gives_the_message(stage: Stage, message: Message, frame: bytes) -> None:
    protocol = _conversation(Role.DESTINATION, stage)
    if isinstance(message, Welcome | PassDone | Ready | Taken | Joined | Request | Lacking | Resumed):
        protocol = _conversation(Role.SOURCE, stage)
    got, buffer = None, b""
    for number, byte in enumerate(frame):
        assert got is None, f"complete before byte {number}"
        buffer += bytes((byte,))
        if len(buffer) == protocol.wanted:
            got, buffer = protocol.receive(buffer), b""
    assert got == message


@_EACH
def test_body_with_trailing_bytes_is_refused(stage: Stage, message: Message, frame: bytes) -> None:  # M5
    kind, _ = decode_head(frame[: HEAD.size])
    with pytest.raises(ProtocolError, match="the stream is corrupt"):
        decode_body(kind, frame[HEAD.size :] + b"\0")


@_EACH
def test_body_cut_anywhere_is_refused(stage: Stage, message: Message, frame: bytes) -> None:  # M5
    kind, _ = decode_head(frame[: HEAD.size])
    for end in range(HEAD.size, len(frame)):
        with pytest.raises(ProtocolError, match="the stream is corrupt"):
            decode_body(kind, frame[HEAD.size : end])


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ((0, 0, 0), "no message has the type 0"),
        ((24, 0, 0), "no message has the type 24"),
        ((0xFFFF, 0, 0), "no message has the type 65535"),
        ((1, 1, 0), "no message has the type 1 and flags 1"),
        ((8, 0, MAX_BODY + 1), "a State message of 16777217 bytes"),
        ((1, 0, MAX_SHORT_BODY + 1), "a Hello message of 2097153 bytes"),
        ((3, 0, 0xFFFF_FFFF), "a Pages message of 4294967295 bytes"),
    ],
)
def test_malformed_head_is_refused(head: tuple[int, int, int], reason: str) -> None:  # M5
    with pytest.raises(ProtocolError, match=reason):
        decode_head(struct.pack("<HHI", *head))


def _table(block: int, count: int, *numbers: int) -> bytes:
    return struct.pack("<II", block, count) + b"".join(struct.pack("<q", number) for number in numbers)


_MALFORMED_TABLES = {
    "empty body": b"",
    "no runs": _table(0, 0),
    "fewer runs than announced": _table(0, 2, 0, 1),
    "more runs than announced": _table(0, 1, 0, 1, 5, 1),
    "half a run": _table(0, 1, 0),
    "too many runs": struct.pack("<II", 0, MAX_RUNS + 1) + b"\1" * 16 * (MAX_RUNS + 1),
    "run of no pages": _table(0, 1, 5, 0),
    "negative count": _table(0, 1, 5, -1),
    "negative page": _table(0, 1, -1, 1),
    "page past the largest": _table(0, 1, 1 << 52, 1),
    "count past the largest": _table(0, 1, 0, 1 << 52),
    "largest number": _table(0, 1, _BIG, _BIG),
    "descending": _table(0, 2, 5, 1, 0, 1),
    "overlapping": _table(0, 2, 0, 3, 2, 1),
    "the same run twice": _table(0, 2, 0, 1, 0, 1),
}


@pytest.mark.parametrize("kind", [Pages, ZeroPages, EncodedPages, Owed, Lacking])
@pytest.mark.parametrize("name", _MALFORMED_TABLES)
def test_malformed_run_table_is_refused(kind: type[Message], name: str) -> None:  # M5
    encoding = struct.pack("<II", 1, 0) if kind is EncodedPages else b""
    with pytest.raises(ProtocolError, match="the stream is corrupt"):
        decode_body(kind, _MALFORMED_TABLES[name] + encoding)


@pytest.mark.parametrize(
    ("pages", "encoding", "reason"),
    [
        (2, (0, 0), "2 pages encoded as 0 bytes, kind 0"),
        (2, (2 * PAGE_SIZE + 1, 0), "2 pages encoded as 8193 bytes, kind 0"),
        (2, (1, 2), "2 pages encoded as 1 bytes, kind 2"),
        (MAX_BATCH_PAGES + 1, (1, 0), "4097 pages in one message"),
    ],
)
def test_encoding_that_cannot_be_is_refused(pages: int, encoding: tuple[int, int], reason: str) -> None:  # M5
    with pytest.raises(ProtocolError, match=reason):
        decode_body(EncodedPages, _table(0, 1, 0, pages) + struct.pack("<II", *encoding))


def test_longest_encoding_is_that_of_the_contents() -> None:
    body = _table(0, 1, 0, MAX_BATCH_PAGES) + struct.pack("<II", MAX_BATCH_PAGES * PAGE_SIZE, 1)
    message = decode_body(EncodedPages, body)
    assert isinstance(message, EncodedPages)
    assert (message.payload_size, message.difference) == (MAX_BATCH_PAGES * PAGE_SIZE, True)


@given(st.data())
def test_numbers_are_those_of_the_runs(data: st.DataObject) -> None:
    runs = data.draw(_run_tables(50))
    numbers = [page for first, count in runs.tolist() for page in range(first, first + count)]
    message = Pages(0, runs)
    assert message.numbers.tolist() == numbers
    assert message.pages == len(numbers)


def test_runs_that_touch_are_accepted() -> None:
    assert decode_body(ZeroPages, _table(0, 2, 0, 3, 3, 1)) == ZeroPages(0, _runs((0, 3), (3, 1)))


def test_longest_table_and_largest_numbers_are_accepted() -> None:
    runs = np.stack((np.arange(MAX_RUNS, dtype=np.int64) * 2, np.ones(MAX_RUNS, np.int64)), axis=1)
    last = (1 << 52) - 1
    runs[-1] = last, last
    message = decode_body(ZeroPages, encode(ZeroPages((1 << 32) - 1, runs))[HEAD.size :])
    assert message == ZeroPages((1 << 32) - 1, runs)
    assert isinstance(message, ZeroPages)
    assert message.pages == MAX_RUNS - 1 + last


def test_more_pages_with_contents_than_a_receiver_waits_for_are_refused() -> None:  # M5
    assert decode_body(Pages, _table(0, 2, 0, 1, 7, MAX_BATCH_PAGES - 1)).payload_size == MAX_BATCH_PAGES * 4096  # type: ignore[union-attr]  # the kind asked for
    with pytest.raises(ProtocolError, match="4097 pages in one message"):
        decode_body(Pages, _table(0, 2, 0, 1, 7, MAX_BATCH_PAGES))


_HELLO: dict[str, object] = {
    "machine": "x",
    "blocks": [],
    "verify": False,
    "channels": 1,
    "session": bytes(16),
    "shared": False,
    "postcopy": False,
}
_WRONG_FACTS: dict[str, tuple[type[Message], object]] = {
    "not a map": (Hello, [1]),
    "fields missing": (Hello, {"machine": "x"}),
    **{
        f"no {left_out}": (Hello, {name: value for name, value in _HELLO.items() if name != left_out})
        for left_out in _HELLO
    },
    "unknown field": (Handover, {"extra": 1}),
    "wrong type": (PassEnd, {"number": "1"}),
    "negative": (PassEnd, {"number": -1}),
    "past 63 bits": (PassEnd, {"number": 1 << 63}),
    "text too long": (Failed, {"reason": "x" * 4097}),
    "name too long": (Hello, _HELLO | {"machine": "x" * 4097}),
    "no channel": (Hello, _HELLO | {"channels": 0}),
    "more channels than can be had": (Hello, _HELLO | {"channels": 65}),
    "session too short": (Hello, _HELLO | {"session": bytes(15)}),
    "session too long": (Join, {"session": bytes(17)}),
    "session of one that resumes too short": (Resume, {"session": bytes(15)}),
    "no process": (Welcome, {"boot_id": "b", "pid": 0, "start_time": 1}),
    "process number past the kernel's": (Welcome, {"boot_id": "b", "pid": 1 << 31, "start_time": 1}),
    "text where bytes belong": (Digests, {"blocks": ["x"]}),
    "part that is no map": (State, {"running": True, "parts": {"cpu0": b""}}),
    "neither true nor false": (State, {"running": 1, "parts": {}}),
}


@pytest.mark.parametrize("name", _WRONG_FACTS)
def test_message_with_wrong_facts_is_refused(name: str) -> None:  # M5
    kind, facts = _WRONG_FACTS[name]
    with pytest.raises(ProtocolError, match=f"the stream is corrupt: not a {kind.__name__} message"):
        decode_body(kind, msgspec.msgpack.encode(facts))


def test_text_that_is_not_utf8_is_refused() -> None:  # M5
    with pytest.raises(ProtocolError, match="not a Failed message"):
        decode_body(Failed, b"\x81\xa6reason\xa2\xff\xfe")


def test_longest_tables_fit() -> None:
    runs = np.stack((np.arange(0, 2 * MAX_RUNS, 2), np.ones(MAX_RUNS, np.int64)), axis=1)
    assert decode_head(encode(ZeroPages(0, runs))[: HEAD.size]) == (ZeroPages, 8 + 16 * MAX_RUNS)


def test_message_that_no_peer_would_accept_is_not_encoded() -> None:
    with pytest.raises(ProtocolError, match="a State message of 16777249 bytes is longer than 16777216"):
        encode(State(True, {"cpu0": {"regs": bytes(MAX_BODY)}}))
    with pytest.raises(ProtocolError, match="a Digests message of 2228237 bytes is longer than 2097152"):
        encode(Digests((bytes(32),) * (1 << 16)))
    with pytest.raises(ProtocolError, match="a Failed message of 32779 bytes is longer than 32768"):
        encode(Failed("a" * MAX_FACTS_BODY))


@pytest.mark.parametrize(
    "parts",
    [
        {f"cpu{n}": {} for n in range(MAX_PARTS + 1)},
        {"cpu0": {f"r{n}": b"" for n in range(MAX_NAMES + 1)}},
        {"c" * (MAX_NAME + 1): {}},
        {"cpu0": {"r" * (MAX_NAME + 1): b""}},
    ],
    ids=["parts", "names", "long part", "long name"],
)
def test_state_past_its_limits_is_neither_encoded_nor_decoded(parts: dict[str, dict[str, bytes]]) -> None:  # M5
    with pytest.raises(
        ProtocolError, match="a machine's state may have 1024 parts of 256 names, of 64 characters each"
    ):
        encode(State(True, parts))
    with pytest.raises(ProtocolError, match="not a State message"):
        decode_body(State, msgspec.msgpack.encode({"running": True, "parts": parts}))


def test_largest_state_survives_the_wire() -> None:
    names = {f"{n:0{MAX_NAME}}": b"" for n in range(MAX_NAMES)}
    state = State(True, {f"{n:0{MAX_NAME}}": names if n == 7 else {} for n in range(MAX_PARTS)})
    assert decode_body(State, encode(state)[HEAD.size :]) == state


def test_error_neither_quotes_nor_keeps_all_of_a_wrong_body() -> None:  # M5, M10
    with pytest.raises(ProtocolError) as caught:
        decode_body(Joined, msgspec.msgpack.encode({"x" * 1000: 1}))
    assert "unknown field `xxx" in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.__context__ is None


_counts = st.integers(0, _BIG)
_wide = st.integers(0, (1 << 64) - 1)
_sessions = st.binary(min_size=16, max_size=16)
_digests = st.binary(min_size=32, max_size=32)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def _run_tables(draw: st.DrawFn, longest: int) -> messages.Runs:
    """Ascending, disjoint runs, which may touch."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, longest)), min_size=1, max_size=20))
    runs, end = [], 0
    for gap, count in pairs:
        runs.append((end + gap, count))
        end += gap + count
    return _runs(*runs)


_any_message: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        _texts,
        st.lists(st.builds(BlockInfo, _texts, _counts, _counts), max_size=5).map(tuple),
        st.booleans(),
        st.integers(1, MAX_CHANNELS),
        _sessions,
        st.booleans(),
        st.booleans(),
    ),
    st.builds(Welcome, _texts, st.integers(1, (1 << 31) - 1), _counts),
    st.builds(Pages, st.integers(0, (1 << 32) - 1), _run_tables(200)),
    st.builds(ZeroPages, st.integers(0, (1 << 32) - 1), _run_tables(1 << 40)),
    st.builds(PassEnd, _counts),
    st.builds(PassDone, _counts, _counts, _counts, _counts),
    st.builds(Join, _sessions),
    st.just(Joined()),
    st.builds(Shared, st.integers(1, MAX_FILES)),
    st.builds(Owed, st.integers(0, (1 << 32) - 1), _run_tables(1 << 40)),
    *(st.builds(kind, _wide, _wide) for kind in (Request, Page, ZeroPage)),
    st.builds(Resume, _sessions),
    st.builds(Lacking, st.integers(0, (1 << 32) - 1), _run_tables(1 << 40)),
    st.just(Resumed()),
    st.builds(
        EncodedPages,
        st.integers(0, (1 << 32) - 1),
        _run_tables(200),
        size=st.integers(1, PAGE_SIZE),
        difference=st.booleans(),
    ),
    st.builds(Digests, st.lists(_digests, max_size=5).map(tuple)),
    st.builds(
        State,
        st.booleans(),
        st.dictionaries(_texts, st.dictionaries(_texts, st.binary(max_size=40), max_size=4), max_size=4),
    ),
    st.builds(Ready, st.lists(_digests, max_size=5).map(tuple), _counts),
    st.just(Handover()),
    st.just(Taken()),
    st.builds(Failed, _texts),
)


@given(_any_message)
def test_every_message_survives_the_wire(message: Message) -> None:
    frame = encode(message)
    kind, length = decode_head(frame[: HEAD.size])
    assert (kind, length) == (type(message), len(frame) - HEAD.size)
    assert decode_body(kind, frame[HEAD.size :]) == message


@given(st.binary(min_size=HEAD.size, max_size=HEAD.size))
def test_any_head_is_a_message_or_a_protocol_error(head: bytes) -> None:  # M5
    try:
        kind, length = decode_head(head)
    except ProtocolError:
        return
    assert kind in MESSAGES.values()
    assert length <= MAX_BODY


@given(st.sampled_from(list(MESSAGES.values())), st.binary(max_size=200))
@example(Digests, b"\x81\xa6blocks\xdd\xff\xff\xff\xff")
@example(State, b"\x82\xa7running\xc3\xa5parts\xdf\xff\xff\xff\xff")
@example(Failed, b"\x81\xa6reason\xdb\xff\xff\xff\xff")
@example(Handover, b"\x81" * 200)
def test_any_body_is_a_message_or_a_protocol_error(kind: type[Message], body: bytes) -> None:  # M5
    try:
        message = decode_body(kind, body)
    except ProtocolError:
        return
    assert isinstance(message, kind)


@given(_any_message, st.data())
def test_any_change_of_a_frame_gives_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:  # M5
    frame = bytearray(encode(message))
    for place in data.draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
        frame[place] = data.draw(st.integers(0, 255))
    try:
        kind, length = decode_head(bytes(frame[: HEAD.size]))
        changed = decode_body(kind, bytes(frame[HEAD.size : HEAD.size + length]))
    except ProtocolError:
        return
    assert isinstance(changed, kind)

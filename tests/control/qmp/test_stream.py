import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtylog.control.qmp.stream import MAX_NESTING, JSONStream, OversizeError
from dirtylog.errors import ProtocolError

LOST = b"lost"

CASES: dict[str, tuple[bytes, list[bytes]]] = {
    "one object": (b"{}", [b"{}"]),
    "white space only": (b" \r\n\t\n", []),
    "line ends": (b'{"a": 1}\r\n{"b": 2}\n', [b'{"a": 1}', b'{"b": 2}']),
    "back to back": (b'{"a":1}{"b":2}', [b'{"a":1}', b'{"b":2}']),
    "over several lines": (b'{"a":\n[1,\n2]\n}\n', [b'{"a":\n[1,\n2]\n}']),
    "an array": (b"[{}, [1]]", [b"[{}, [1]]"]),
    "brackets in a string": (b'{"a": "}]{["}', [b'{"a": "}]{["}']),
    "an escaped quote": (rb'{"a": "\"}"}{}', [rb'{"a": "\"}"}', b"{}"]),
    "an escaped backslash": (rb'{"a": "\\"}{}', [rb'{"a": "\\"}', b"{}"]),
    "incomplete": (b'{"a": [', []),
    "bad inside, but balanced": (b"{bad}{}", [b"{bad}", b"{}"]),
    "a scalar": (b"17 {}\n{}", [LOST, b"{}"]),
    "words": (b"GET / HTTP/1.1\r\n{}\n", [LOST, b"{}"]),
    "a closing bracket": (b"}\n{}", [LOST, b"{}"]),
    "brackets that do not match": (b'{"a": 1]}\n{}', [LOST, b"{}"]),
    "a string over a line": (b'{"a": "b\n{}', [LOST, b"{}"]),
    "0xFF outside": (b"\xff\n{}", [LOST, b"{}"]),
    "0xFF inside": (b'{"a": [\xff\n{}', [LOST, b"{}"]),
    "0xFF in a string": (b'{"a": "\xff\n{}', [LOST, b"{}"]),
    "not UTF-8, but balanced": (b'{"\xfe": 1}', [b'{"\xfe": 1}']),
    "as deep as allowed": (b"[" * MAX_NESTING + b"]" * MAX_NESTING, [b"[" * MAX_NESTING + b"]" * MAX_NESTING]),
    "too deep": (b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1) + b"\n{}", [LOST, b"{}"]),
}


def cut(stream: JSONStream, data: bytes) -> list[bytes]:
    """What the stream yields for more bytes; fails on any error but the declared one."""
    stream.feed(data)
    values: list[bytes] = []
    while True:
        try:
            value = stream.next()
        except ProtocolError:
            value = LOST
        if value is None:
            return values
        values.append(value)


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
class TestCases:
    def test_whole(self, data: bytes, expected: list[bytes]) -> None:
        assert cut(JSONStream(1000), data) == expected

    def test_byte_by_byte(self, data: bytes, expected: list[bytes]) -> None:
        stream = JSONStream(1000)
        assert [value for byte in data for value in cut(stream, bytes([byte]))] == expected

    def test_after_another_message(self, data: bytes, expected: list[bytes]) -> None:
        assert cut(JSONStream(1000), b'{"first": "\xc3\xa9"}' + data) == [b'{"first": "\xc3\xa9"}', *expected]

    def test_before_a_fresh_start(self, data: bytes, expected: list[bytes]) -> None:
        values = cut(JSONStream(1000), data + b'\xff\n{"last": 1}')
        assert [value for value in values if value != LOST] == [
            *(value for value in expected if value != LOST),
            b'{"last": 1}',
        ]


json_objects = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(json_objects, st.sampled_from([b"", b"\n", b" \r\n"])), max_size=5), st.booleans())
def test_objects_come_out_as_they_went_in(messages: list[tuple[dict[str, Any], bytes]], escape: bool) -> None:
    sent = [json.dumps(value, ensure_ascii=escape).encode("utf-8", "surrogatepass") for value, _ in messages]
    data = b"".join(text + separator for text, (_, separator) in zip(sent, messages, strict=True))
    assert cut(JSONStream(len(data) + 1), data) == sent


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12) | st.text('{}[]"\\\n a', max_size=12).map(str.encode), max_size=8))
def test_the_outcome_does_not_depend_on_how_the_bytes_arrive(chunks: list[bytes]) -> None:
    """Whatever the bytes are, they are cut, or refused with the declared error, and always in the same way."""
    stream = JSONStream(1000)
    assert [value for chunk in chunks for value in cut(stream, chunk)] == cut(JSONStream(1000), b"".join(chunks))


@pytest.mark.parametrize("data", [b'{"a": "' + b"x" * 100, b'{"a": "' + b"x" * 100 + b'"}'], ids=["part", "whole"])
def test_a_message_longer_than_the_limit_is_refused(data: bytes) -> None:
    stream = JSONStream(100)
    stream.feed(data)
    with pytest.raises(OversizeError, match="longer than 100 bytes"):
        stream.next()


def test_many_short_messages_may_be_longer_than_the_limit_together() -> None:
    assert cut(JSONStream(10), b'{"a": 1}' * 100) == [b'{"a": 1}'] * 100


def test_the_rest_of_a_lost_line_is_not_kept() -> None:
    stream = JSONStream(100)
    assert cut(stream, b"junk") == [LOST]
    for _ in range(100):
        assert cut(stream, b"more junk") == []
    assert cut(stream, b"\n{}") == [b"{}"]

import math
from typing import Any

import msgspec
import pytest

from dirtylog.control.qmp.messages import (
    ErrorBody,
    ErrorClass,
    Event,
    Failure,
    Greeting,
    GreetingBody,
    QMPCommandError,
    QMPError,
    Request,
    Success,
    Timestamp,
    Version,
    VersionTriple,
    decode_object,
    describe_type_error,
    encode,
    parse_request,
)
from dirtylog.errors import DirtylogError, RefusedError

MESSAGES: list[tuple[msgspec.Struct, bytes]] = [
    (Success({}), b'{"return": {}}\r\n'),
    (Success([1, "é"], None), b'{"return": [1, "\\u00e9"], "id": null}\r\n'),
    (
        Failure(ErrorBody(ErrorClass.GENERIC_ERROR, "no"), "x"),
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": "x"}\r\n',
    ),
    (Event("STOP", Timestamp(1, 2)), b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'),
    (
        Event("MIGRATION", Timestamp(1, 2), {"status": "active"}),
        b'{"event": "MIGRATION", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"status": "active"}}\r\n',
    ),
    (
        Greeting(GreetingBody(Version(VersionTriple(1, 2, 3), "p"), [])),
        b'{"QMP": {"version": {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "p"}, "capabilities": []}}\r\n',
    ),
]


@pytest.mark.parametrize(("message", "line"), MESSAGES)
def test_message_is_one_line_of_ascii(message: msgspec.Struct, line: bytes) -> None:
    assert encode(message) == line


@pytest.mark.parametrize(("message", "line"), MESSAGES)
def test_encoded_message_is_read_back(message: msgspec.Struct, line: bytes) -> None:
    assert msgspec.convert(decode_object(line), type(message)) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_value_without_json_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode(Success(value))


@pytest.mark.parametrize(
    ("version", "triple"),
    [("1.2.3", (1, 2, 3)), ("0.1.0.dev4", (0, 1, 0)), ("7.2", (7, 2, 0)), ("", (0, 0, 0))],
)
def test_version_is_parsed(version: str, triple: tuple[int, int, int]) -> None:
    assert Version.parse("x", version) == Version(VersionTriple(*triple), f"x {version}")


def test_timestamp_is_in_range() -> None:
    assert 0 <= Timestamp.now().microseconds < 1_000_000


@pytest.mark.parametrize(
    ("data", "desc"),
    [
        (b"[]", "must be a JSON object"),
        (b"{bad}", "invalid JSON"),
        (b'{"a": 1,}', "invalid JSON"),
        (b'{"a": 01}', "invalid JSON"),
        (b'{"a": NaN}', "invalid JSON"),
        (b'{"a": 1e400}', "invalid JSON"),
        (b'{"a": "\t"}', "invalid JSON"),
        (b'{"a": "\xfe"}', "invalid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "invalid JSON"),
        (b'{"a": "\\ud800"}', "invalid JSON"),
        (b"{'a': 1}", "invalid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON"),
    ],
)
def test_bytes_that_are_no_object_are_refused(data: bytes, desc: str) -> None:
    with pytest.raises(QMPError, match=desc) as caught:
        decode_object(data)
    assert caught.value.error_class is ErrorClass.GENERIC_ERROR


@pytest.mark.parametrize(
    ("members", "desc"),
    [
        ({}, "lacks the member 'execute'"),
        ({"arguments": {}}, "lacks the member 'execute'"),
        ({"execute": 1}, "'execute' must be a string"),
        ({"execute": None}, "'execute' must be a string"),
        ({"execute": "a", "arguments": []}, "'arguments' must be an object"),
        ({"execute": "a", "arguments": None}, "'arguments' must be an object"),
        ({"execute": "a", "more": 1}, "'more' is unexpected"),
        ({"exec-oob": "a"}, "'exec-oob' is unexpected"),
    ],
)
def test_malformed_request_is_refused(members: dict[str, Any], desc: str) -> None:
    with pytest.raises(QMPError, match=desc) as caught:
        parse_request(members)
    assert caught.value.error_class is ErrorClass.GENERIC_ERROR


def test_request_is_parsed() -> None:
    assert parse_request({"execute": "a", "id": 1}) == Request("a", {})
    assert parse_request({"execute": "a", "arguments": {"b": 1}}) == Request("a", {"b": 1})


def test_errors_have_their_place_in_the_tree() -> None:
    assert issubclass(QMPError, DirtylogError)
    assert issubclass(QMPCommandError, RefusedError)
    refused = QMPCommandError("DeviceNotFound", "no such device")
    assert (refused.error_class, refused.desc, str(refused)) == ("DeviceNotFound", "no such device", "no such device")


class Inner(msgspec.Struct):
    number: int


@pytest.mark.parametrize(
    ("value", "kind", "phrase"),
    [
        ({"number": "x"}, Inner, "'number': expected int, got str"),
        ([{"number": 1}, {"number": None}], list[Inner], "'[1].number': expected int, got null"),
        (1, Inner, "Expected `object`, got `int`"),
    ],
)
def test_type_error_names_the_place(value: object, kind: Any, phrase: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, kind)
    assert describe_type_error(caught.value) == phrase

"""What decoding the worst bodies takes: as much as their length, which was checked, allows, and no more."""

import gc
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from dirtylog.errors import ProtocolError
from dirtylog.migration.messages import (
    HEAD,
    MAX_BODY,
    MAX_FACTS_BODY,
    MAX_NAMES,
    MAX_PARTS,
    MAX_RUNS,
    MAX_SHORT_BODY,
    MESSAGES,
    PAGE_FRAME,
    Digests,
    EncodedPages,
    Hello,
    Message,
    OnePage,
    Ready,
    RunTable,
    State,
    decode_body,
    decode_head,
)

_REFUSED: Final = 9.1
"""Bytes that a body may take for each byte that its kind may have: a long text of wide characters, and the error."""
_VALID_STATE: Final = 3.0
_VALID: Final = 7.0
_SMALL: Final = 1 << 16
"""And whatever the length."""


def _longest(kind: type[Message]) -> int:
    """What `decode_head` lets through."""
    if kind is State:
        return MAX_BODY
    if issubclass(kind, OnePage):
        return PAGE_FRAME.size - HEAD.size
    return MAX_SHORT_BODY if kind in (Hello, Digests, Ready) or issubclass(kind, RunTable) else MAX_FACTS_BODY


def _name(text: str) -> bytes:
    return bytes([0xA0 + len(text)]) + text.encode()


def _array(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big")


def _map(count: int) -> bytes:
    return b"\xdf" + count.to_bytes(4, "big")


def _binary(size: int) -> bytes:
    return b"\xc6" + size.to_bytes(4, "big") + bytes(size)


def _wide(size: int) -> bytes:
    """A text of so many bytes, the last four of which make Python keep four for each of the others."""
    return b"\xdb" + size.to_bytes(4, "big") + b"a" * (size - 4) + "😀".encode()


def _of_any_kind(kind: type[Message], size: int) -> Iterator[tuple[str, bytes]]:
    room = size - 64
    yield "nothing of it", b"\xc1" * size
    yield "huge map", _map((1 << 32) - 1)
    yield "odd field", b"\x81" + _wide(room) + b"\xc0"
    for field in getattr(kind, "__struct_fields__", ()):
        start = b"\x81" + _name(field)
        yield f"{field} a text", start + _wide(room)
        yield f"{field} bytes", start + _binary(room)
        yield f"{field} an array", start + _array(room) + b"\xc0" * room
        yield f"{field} a huge array", start + _array((1 << 32) - 1)
        yield f"{field} a huge map", start + _map((1 << 32) - 1)
        yield f"{field} again and again", _map(room // 16) + (_name(field) + b"\xc0") * (room // 16)


def _states(size: int) -> Iterator[tuple[str, bytes]]:
    start = b"\x82" + _name("running") + b"\xc3" + _name("parts")
    short = [bytes((0xA3, n >> 14, n >> 7 & 127, n & 127)) for n in range(1 << 18)]
    value = b"\xc4\x02xx"
    yield "parts", start + _map(len(short)) + b"".join(name + b"\x80" for name in short)
    yield "parts of one name", start + _map(len(short)) + b"".join(name + b"\x81\xa1a\xc4\0" for name in short)
    yield "names", start + b"\x81" + _name("kvm") + _map(len(short)) + b"".join(name + value for name in short)
    part = _map(MAX_NAMES)
    names = [name + value for name in short]
    each = [part + b"".join(names[n : n + MAX_NAMES]) for n in range(0, MAX_PARTS * MAX_NAMES, MAX_NAMES)]
    yield "all that it may have", start + _map(MAX_PARTS) + b"".join(map(bytes.__add__, short, each))
    room = size - 64
    yield "long part", start + b"\x81" + _wide(room) + b"\x80"
    yield "long name", start + b"\x81" + _name("kvm") + b"\x81" + _wide(room - 8) + b"\xc4\0"
    yield "one value", start + b"\x81" + _name("kvm") + b"\x81" + _name("a") + _binary(room)


def _of_blocks(kind: type[Message], size: int) -> Iterator[tuple[str, bytes]]:
    """Arrays of what there is for each block, but as short as it can be written."""
    room = size - 256
    if kind is Hello:
        block = b"\x83" + _name("name") + b"\xa2ab" + _name("size") + b"\xcd\x10\0" + _name("page_size") + b"\xcd\x10\0"
        blocks = _array(room // len(block)) + block * (room // len(block))
        rest = (b"\xc2", b"\1", b"\xc4\x10" + bytes(16), b"\xc2", b"\xc2")
        facts = (_name("kvm"), blocks, *rest)
        yield "blocks", b"\x87" + b"".join(map(bytes.__add__, map(_name, kind.__struct_fields__), facts))
        return
    for what, digest in {"short digests": b"\xc4\x02xx", "digests": b"\xc4\x20" + bytes(32)}.items():
        digests = _array(room // len(digest)) + digest * (room // len(digest))
        if kind is Digests:
            yield what, b"\x81" + _name("blocks") + digests
        else:
            yield what, b"\x82" + _name("digests") + digests + _name("verify_ns") + b"\0"


def _tables(kind: type[Message], size: int) -> Iterator[tuple[str, bytes]]:
    runs = np.stack((np.arange(0, 2 * MAX_RUNS, 2), np.ones(MAX_RUNS, np.int64)), axis=1).tobytes()
    end = struct.pack("<II", 1 << 24, 0) if kind is EncodedPages else b""
    yield "nothing of it", b"\xff" * size
    for count in (4096, MAX_RUNS):
        yield f"{count} runs", struct.pack("<II", 0, count) + runs[: 16 * count] + end
    yield "one long run", struct.pack("<IIqq", 0, 1, 0, (1 << 52) - 1) + end


def _worst(kind: type[Message]) -> Iterator[tuple[str, bytes]]:
    size = _longest(kind)
    if issubclass(kind, RunTable):
        yield from _tables(kind, size)
        return
    if issubclass(kind, OnePage):
        yield "any numbers", b"\xff" * size
        return
    yield from _of_any_kind(kind, size)
    if kind is State:
        yield from _states(size)
    elif kind in (Hello, Digests, Ready):
        yield from _of_blocks(kind, size)


def _decoded(kind: type[Message], body: bytes) -> tuple[bool, int]:
    """Whether a body is valid, and the most bytes that were allocated at any time to find out."""
    gc.collect()
    tracemalloc.start()
    try:
        decode_body(kind, body)
        valid = True
    except ProtocolError:
        valid = False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return valid, peak


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=lambda kind: kind.__name__)
def test_worst_body_takes_no_more_memory_than_its_length_allows(kind: type[Message]) -> None:  # M5
    longest = _longest(kind)
    for what, body in _worst(kind):
        assert decode_head(HEAD.pack(kind.TYPE, 0, len(body))) == (kind, len(body))
        valid, peak = _decoded(kind, body)
        factor = (_VALID_STATE if kind is State else _VALID) if valid else _REFUSED
        assert peak <= _SMALL + factor * longest, what


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=lambda kind: kind.__name__)
def test_body_longer_than_any_of_its_kind_is_refused_before_it_is_awaited(kind: type[Message]) -> None:  # M5
    with pytest.raises(ProtocolError, match=f"a {kind.__name__} message of"):
        decode_head(HEAD.pack(kind.TYPE, 0, _longest(kind) + 1))

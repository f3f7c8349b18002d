"""Cuts a stream of bytes into JSON objects and arrays; parses nothing and does no I/O."""

import re
from typing import Final, NoReturn

from dirtylog.errors import ProtocolError

MAX_NESTING: Final = 128
"""Far deeper than any message of QMP, and shallow enough for every JSON parser."""

_CLOSERS: Final = {b"{": ord("}"), b"[": ord("]")}
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_IN_VALUE = re.compile(rb'[{}\[\]"\xff]')
_IN_STRING = re.compile(rb'["\\\n\xff]')


class OversizeError(ProtocolError):
    """A message is longer than the receiver accepts; the connection is of no more use."""


class JSONStream:
    r"""Cuts a stream of bytes into JSON objects and arrays.

    Nothing but its own brackets need end a message: senders may put a newline after each one, or not. Where the
    brackets cannot be followed any longer, the rest of the line is skipped. As QEMU's parser does, this one also gives
    up a message at a byte 0xFF, which UTF-8 never contains, so a sender can always start afresh with ``b"\xff\n"``.

    Args:
        limit: the most bytes one message may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._expected = bytearray()
        self._in_string = False
        self._lost = False

    def feed(self, data: bytes) -> None:
        """Add bytes to the end of the stream."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next whole object or array, or None until more bytes come.

        Raises:
            OversizeError: the message is longer than the limit.
            ProtocolError: the stream holds something else; the next call goes on in the next line.
        """
        if not self._find_start():
            return None
        while (mark := self._next_mark()) is not None:
            if mark == b"\xff":
                self._lose("byte 0xFF")
            elif self._in_string:
                self._string_mark(mark)
            elif self._value_mark(mark):
                return self._cut()
        self._check_size(len(self._buffer))
        return None

    def _find_start(self) -> bool:
        if self._expected:
            return True
        if self._lost:
            newline = self._buffer.find(b"\n")
            self._lost = newline < 0
            del self._buffer[: len(self._buffer) if self._lost else newline]
        start = _NOT_SPACE.search(self._buffer)
        if self._lost or start is None:
            self._buffer.clear()
            return False
        del self._buffer[: start.start()]
        first = self._buffer[:1]
        if bytes(first) not in _CLOSERS:
            self._lose(f"expected an object, found {chr(first[0])!a}")
        return True

    def _next_mark(self) -> bytes | None:
        match = (_IN_STRING if self._in_string else _IN_VALUE).search(self._buffer, self._scanned)
        if match is None:
            self._scanned = max(self._scanned, len(self._buffer))
            return None
        self._scanned = match.end()
        return match[0]

    def _string_mark(self, mark: bytes) -> None:
        if mark == b"\\":
            self._scanned += 1  # over the escaped character, which may not be here yet
        elif mark == b"\n":
            self._scanned -= 1  # the line that is given up ends here
            self._lose("a string is not closed in its line")
        else:
            self._in_string = False

    def _value_mark(self, mark: bytes) -> bool:
        """Follow one bracket or opening quote; true at the bracket that ends the value."""
        if mark == b'"':
            self._in_string = True
        elif mark in _CLOSERS:
            self._expected.append(_CLOSERS[mark])
            if len(self._expected) > MAX_NESTING:
                self._lose(f"nested deeper than {MAX_NESTING} levels")
        elif self._expected.pop() != mark[0]:
            self._lose(f"unexpected {mark.decode()!r}")
        return not self._expected

    def _cut(self) -> bytes:
        self._check_size(self._scanned)
        value = bytes(self._buffer[: self._scanned])
        self._restart()
        return value

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            self._restart()
            self._lost = True
            raise OversizeError(f"the message is longer than {self._limit} bytes")

    def _lose(self, reason: str) -> NoReturn:
        self._restart()
        self._lost = True
        raise ProtocolError(f"invalid JSON: {reason}")

    def _restart(self) -> None:
        del self._buffer[: self._scanned]
        self._scanned = 0
        self._expected.clear()
        self._in_string = False

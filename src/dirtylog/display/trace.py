"""A watch on file: which pages were written in which interval. ``docs/trace-format.md`` describes it byte by byte."""

import math
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO, Final, NoReturn, Self, TypeVar

import msgspec

from dirtylog.display.sample import Sample, pack, packed_bound, unpack
from dirtylog.errors import ClosedError, HostError, ProtocolError, UsageError
from dirtylog.units import PAGE_SIZE

VERSION: Final = 1
MAGIC: Final = b"DIRTYTRC"
PREAMBLE: Final = struct.Struct("<8sI")
"""The file's first bytes: magic, version. Everything after them belongs to that version."""
HEAD: Final = struct.Struct("<II")
"""A record's head: length and CRC-32 of its body."""

MAX_BLOCKS: Final = 4096
MAX_PAGES: Final = 1 << 32
"""The most pages in all blocks: 16 TiB."""
MAX_HEADER: Final = 64 << 20
_SAMPLE_ROOM: Final = 64
"""What a sample takes besides its bitmaps, and again for each of them, at most."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
S = TypeVar("S", bound=msgspec.Struct)


class TracedBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block of the machine that was watched. ``stored``: how many of its pages had contents when that began."""

    name: Annotated[str, msgspec.Meta(max_length=4096)]
    pages: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES)]
    stored: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAGES)]


class TraceHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first record. ``start_time``: of the watch, in seconds of Unix time."""

    start_time: Seconds
    page_size: int
    blocks: Annotated[tuple[TracedBlock, ...], msgspec.Meta(max_length=MAX_BLOCKS)]


class TracedSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each record after it: see `Sample`; a packed bitmap for each block, in the header's order."""

    time: Seconds
    seconds: Seconds
    written: tuple[bytes, ...]


class TraceWriter:
    """Writes a trace, replacing what the file held. Each sample is in the file when `append` returns.

    Args:
        path: the file.
        blocks: how many pages each block has, by name.
        start_time: when the watch began, in seconds of Unix time; now unless given.
        stored: how many of its pages have contents, by name; all of them unless given.

    Raises:
        HostError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        blocks: Mapping[str, int],
        start_time: float | None = None,
        *,
        stored: Mapping[str, int] | None = None,
    ) -> None:
        self._path = os.fspath(path)
        self._blocks = dict(blocks)
        self._file = self._open()
        header = TraceHeader(
            time.time() if start_time is None else start_time,
            PAGE_SIZE,
            tuple(TracedBlock(name, pages, (stored or blocks)[name]) for name, pages in blocks.items()),
        )
        try:
            self._write(PREAMBLE.pack(MAGIC, VERSION) + _record(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def append(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            UsageError: it is of other blocks.
            ClosedError: the trace was closed.
            HostError: the file cannot be written; what it has up to the last sample is good.
        """
        if {name: bitmap.pages for name, bitmap in sample.written.items()} != self._blocks:
            raise UsageError("the sample is not of the memory that the trace is of")
        if self._file.closed:
            raise ClosedError(f"the trace {self._path} was closed")
        bitmaps = tuple(pack(sample.written[name]) for name in self._blocks)
        self._write(_record(TracedSample(sample.time, sample.seconds, bitmaps)))

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            # With O_NONBLOCK a FIFO that nobody reads is an error; without, no signal could end the wait for a reader.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
            file = open(os.open(self._path, flags, 0o666), "wb", buffering=0)  # noqa: SIM115 - closed in `close`
            os.set_blocking(file.fileno(), True)
        except OSError as error:
            self._refuse(error)
        return file

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        cause = f"cannot write the trace {self._path}: {error.strerror or error}"
        raise HostError(cause, remedy="choose a place that has room and that you may write to") from error


class TraceReader:
    """Reads a trace; iterate over it for its samples, any number of times.

    A last record that is not whole, as an interrupted writer leaves it, is left out.

    Attributes:
        start_time: when the watch began, in seconds of Unix time.
        blocks: how many pages each block has, by name.
        stored: how many of them had contents when the watch began, by name.

    Raises:
        UsageError: the file cannot be read, or is no trace.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with self._open() as file:
            header = self._read_header(file)
            self._first = file.tell()
        self.start_time = header.start_time
        self.blocks = {block.name: block.pages for block in header.blocks}
        self.stored = {block.name: block.stored for block in header.blocks}
        if header.page_size != PAGE_SIZE:
            self._damaged(f"its pages have {header.page_size} bytes")
        if not math.isfinite(header.start_time):
            self._damaged("its start has no time")
        if len(self.blocks) < len(header.blocks):
            self._damaged("two of its blocks have the same name")
        if sum(self.blocks.values()) > MAX_PAGES:
            self._damaged(f"it is of more than {MAX_PAGES} pages")
        if any(block.stored > block.pages for block in header.blocks):
            self._damaged("more pages have contents than there are")
        self._limit = _SAMPLE_ROOM + sum(packed_bound(pages) + _SAMPLE_ROOM for pages in self.blocks.values())

    def __iter__(self) -> Iterator[Sample]:
        """The samples, in order.

        Raises:
            UsageError: the file is damaged.
        """
        last = 0.0
        with self._open() as file:
            file.seek(self._first)
            while (body := self._read_record(file, self._limit)) is not None:
                sample = self._sample(self._decode(body, TracedSample))
                if sample.time < last:
                    self._damaged("a sample is older than the one before it")
                last = sample.time
                yield sample

    def _open(self) -> BinaryIO:
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):
                self._damaged("it is not a file")  # of a pipe, the open alone might never end
            return self._path.open("rb")
        except OSError as error:
            raise UsageError(
                f"the trace {self._path} cannot be read: {error.strerror}",
                remedy="name a file that 'dirtylog watch --record' wrote",
            ) from error

    def _read_header(self, file: BinaryIO) -> TraceHeader:
        preamble = self._read(file, PREAMBLE.size)
        if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
            self._damaged("it does not start as one")
        (_, version) = PREAMBLE.unpack(preamble)
        if version != VERSION:
            raise UsageError(
                f"the trace {self._path} has version {version}, and this dirtylog reads version {VERSION}",
                remedy="use the dirtylog that wrote it",
            )
        body = self._read_record(file, MAX_HEADER)
        if body is None:
            self._damaged("it ends in its header")
        return self._decode(body, TraceHeader)

    def _read_record(self, file: BinaryIO, limit: int) -> bytes | None:
        """The next record's body, or None where the file ends before it does."""
        head = self._read(file, HEAD.size)
        if len(head) < HEAD.size:
            return None
        length, checksum = HEAD.unpack(head)
        if length > limit:
            self._damaged(f"a record has {length} bytes")
        body = self._read(file, length)
        if len(body) < length:
            return None
        if zlib.crc32(body) != checksum:
            self._damaged(f"the checksum of the record at byte {file.tell() - length} is wrong")
        return body

    def _read(self, file: BinaryIO, size: int) -> bytes:
        try:
            return file.read(size)
        except OSError as error:
            raise UsageError(f"the trace {self._path} cannot be read: {error.strerror}") from error

    def _decode(self, body: bytes, kind: type[S]) -> S:
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._damaged(str(error))

    def _sample(self, traced: TracedSample) -> Sample:
        if not (math.isfinite(traced.time) and math.isfinite(traced.seconds)):
            self._damaged("a sample has no time")
        if len(traced.written) != len(self.blocks):
            self._damaged(f"a sample has {len(traced.written)} bitmaps for {len(self.blocks)} blocks")
        try:
            written = {
                name: unpack(packed, pages)
                for (name, pages), packed in zip(self.blocks.items(), traced.written, strict=True)
            }
        except ProtocolError as error:
            self._damaged(error.cause)
        return Sample(traced.time, traced.seconds, written)

    def _damaged(self, problem: str) -> NoReturn:
        raise UsageError(f"{self._path} is not a good trace: {problem}", remedy="record it anew")


def _record(struct: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(struct)
    return HEAD.pack(len(body), zlib.crc32(body)) + body

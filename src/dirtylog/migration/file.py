"""A machine in a file: written by a migration to ``file:PATH``, and run from there as often as one likes.

Each page has its place in the file, whatever is sent when, so that a guest that writes while it is saved makes the file
no longer. What is zero is a hole. `docs/file-format.md` describes all of it byte by byte.

The file is written beside its place, and moved there when it is complete and on the disk: at PATH there is a whole
machine, the one that was there before, or nothing.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import xxhash

from dirtylog.errors import CancelledError, HostError, KernelError, ProtocolError, RefusedError, UsageError
from dirtylog.linux.files import extents, lock, punch_hole
from dirtylog.linux.mapping import Contents, memory_of
from dirtylog.linux.process import ProcessName
from dirtylog.memory import RAMBlock
from dirtylog.migration.messages import (
    MAX_BODY,
    BlockInfo,
    Digest,
    Digests,
    Handover,
    Hello,
    Message,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    ShortText,
    State,
    Taken,
    Welcome,
    ZeroPages,
    encode_body,
    shortened,
)
from dirtylog.units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE, align_up

MAGIC: Final = b"DIRTYRAM"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQ16s")
"""Magic, version, length of the description, length of the state, xxh3-128 of both."""
_DESCRIPTION: Final = 4096
"""Where the description begins."""
_READ_SIZE: Final = 4 * MIB

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file is of. ``digests``: of the blocks, as `block_digest` has them; empty if none were asked for."""

    machine: ShortText
    blocks: tuple[BlockInfo, ...]
    digests: tuple[Digest, ...]


class Layout:
    """Where in the file everything is, for blocks in their order.

    Attributes:
        starts: where each block begins.
        end: where the last one ends, and the state begins.
    """

    def __init__(self, blocks: Sequence[BlockInfo]) -> None:
        self.starts: list[int] = []
        self.end = align_up(_DESCRIPTION + MAX_BODY, HUGE_PAGE_SIZE)
        for block in blocks:
            self.starts.append(self.end)
            self.end = align_up(self.end + block.size, HUGE_PAGE_SIZE)


class FileOutlet:
    """Writes a machine to a file, in the part of a destination that never runs it.

    Args:
        path: where it shall be in the end. What is there is replaced then.

    Raises:
        UsageError: somebody else writes there, or it is something else than a file.
        HostError: nothing can be written there.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._aborted = False
        self._fd = -1
        if self._path.exists() and not self._path.is_file():
            raise UsageError(f"{path} is there, and is no file", remedy="give another path")
        with self._io():
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not lock(self._fd):
            os.close(self._fd)
            self._fd = -1
            raise UsageError(f"somebody else writes to {self._partial}", remedy="wait, or give another path")
        with self._io():
            os.ftruncate(self._fd, 0)
        self._hello = Hello("", (), False, 1, bytes(16), False, False)
        self._layout = Layout(())
        self._number = 0
        self._digests: tuple[bytes, ...] = ()
        self._state = b""

    def set_timeout(self, seconds: float) -> None:
        """Nothing: a disk that stalls cannot be left alone."""

    def abort(self) -> None:
        """Make the next call fail."""
        self._aborted = True

    def stop_sending(self) -> None:
        """Make the next call fail."""
        self._aborted = True

    def cut(self) -> None:
        """Make the next call fail."""
        self._aborted = True

    def last_words(self) -> RefusedError | None:
        """None: a file says nothing."""
        return None

    def close(self) -> None:
        """Close the file, and remove it unless it is complete; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # complete, and moved; or the filesystem fails, which has ended it already
                self._partial.unlink()
            os.close(fd)

    def send(self, message: Message, payload: Iterable[Contents] = ()) -> int:
        """Do what a destination would do with a message; how many bytes were written.

        Raises:
            HostError: the file could not be written.
            CancelledError: `abort` was called.
        """
        if self._aborted:
            raise CancelledError("the migration was cancelled")
        with self._io():
            return self._take(message, payload)

    def _take(self, message: Message, payload: Iterable[Contents]) -> int:
        if isinstance(message, Pages):
            return self._write_pages(message, payload)
        if isinstance(message, ZeroPages):
            self._write_zeros(message)
        elif isinstance(message, PassEnd):
            self._number = message.number
        elif isinstance(message, Hello):
            self._hello, self._layout = message, Layout(message.blocks)
            os.ftruncate(self._fd, self._layout.end)
        elif isinstance(message, Digests):
            self._digests = message.blocks
        elif isinstance(message, State):
            self._state = encode_body(message)
            self._write(self._state, self._layout.end)
            return len(self._state)
        elif isinstance(message, Handover):
            self._complete()
        else:
            raise ProtocolError(f"{type(message).__name__} cannot be written to a file")
        return 0

    def expect(self, kind: type[_M]) -> _M:
        """What a destination would say now: that all went well."""
        name = ProcessName.own()
        answers: tuple[Message, ...] = (
            Welcome(name.boot_id, name.pid, name.start_time),
            PassDone(self._number, 0, 0, 0),
            Ready(self._digests, 0),
            Taken(),
        )
        for answer in answers:
            if isinstance(answer, kind):
                return answer
        raise ProtocolError(f"a file does not say {kind.__name__}")

    def _write_pages(self, message: Pages, payload: Iterable[Contents]) -> int:
        start, total = self._layout.starts[message.block], 0
        for first, part in zip(message.runs[:, 0].tolist(), payload, strict=True):
            memory = memory_of(part)
            self._write(memory, start + first * PAGE_SIZE)
            total += len(memory)
        return total

    def _write_zeros(self, message: ZeroPages) -> None:
        start = self._layout.starts[message.block]
        for first, count in message.runs.tolist():
            if not punch_hole(self._fd, start + first * PAGE_SIZE, count * PAGE_SIZE):
                for page in range(first, first + count):
                    self._write(bytes(PAGE_SIZE), start + page * PAGE_SIZE)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def _complete(self) -> None:
        description = msgspec.msgpack.encode(Description(self._hello.machine, self._hello.blocks, self._digests))
        self._write(description, _DESCRIPTION)
        os.fsync(self._fd)
        digest = xxhash.xxh3_128_digest(description + self._state)
        self._write(_HEAD.pack(MAGIC, VERSION, len(description), len(self._state), digest), 0)
        os.fsync(self._fd)
        self._partial.rename(self._path)
        with _directory(self._path.parent) as folder:
            os.fsync(folder)

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except (OSError, KernelError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.cause
            raise HostError(
                f"the machine cannot be written to {self._path}: {reason}",
                remedy="see whether there is room, whether one may write there, and how long files may be, 'ulimit -f'",
            ) from error


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class MachineFile:
    """A machine in a file, opened.

    Attributes:
        description: what it is of.
        state: what is not memory.

    Raises:
        UsageError: there is no such file.
        ProtocolError: it is no such file, or a damaged one.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"there is no machine in {path}: {error.strerror}", remedy="migrate one to it") from error
        try:
            self.description, self.state = self._read_facts()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fill(self, blocks: Sequence[RAMBlock]) -> Iterator[int]:
        """Read memory, whose blocks are empty and fit the description; how many bytes, piece by piece."""
        layout = Layout(self.description.blocks)
        for start, block in zip(layout.starts, blocks, strict=True):
            for data, end in extents(self._fd, start, start + block.size):
                for offset in range(data, end, _READ_SIZE):
                    size = min(_READ_SIZE, end - offset)
                    self._read_into(block.memory[offset - start : offset - start + size], offset)
                    yield size

    def _read_facts(self) -> tuple[Description, State]:
        head = self._read(0, _HEAD.size)
        magic, version, description_size, state_size, digest = _HEAD.unpack(head)
        if magic != MAGIC:
            raise ProtocolError(f"{self._path} is no machine in a file", remedy="name what a migration wrote")
        if version != VERSION:
            raise ProtocolError(f"{self._path} is of version {version}, not {VERSION}", remedy="use the same dirtylog")
        if not 0 < description_size <= MAX_BODY or not 0 < state_size <= MAX_BODY:
            raise self._damaged("its parts have impossible lengths")
        raw = self._read(_DESCRIPTION, description_size)
        description = self._decode(raw, Description)
        end = Layout(description.blocks).end
        if os.fstat(self._fd).st_size != end + state_size:
            raise self._damaged("it is shorter or longer than it says")
        state = self._read(end, state_size)
        if xxhash.xxh3_128_digest(raw + state) != digest:
            raise self._damaged("its description or its state has changed")
        return description, self._decode(state, State)

    def _decode(self, data: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._damaged(shortened(error)) from error

    def _read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _read_into(self, memory: memoryview, offset: int) -> None:
        while memory:
            try:
                done = os.preadv(self._fd, [memory], offset)
            except OSError as error:
                raise HostError(f"{self._path} cannot be read: {error.strerror}") from error
            if not done:
                raise self._damaged("it ends too early")
            memory, offset = memory[done:], offset + done

    def _damaged(self, why: str) -> ProtocolError:
        return ProtocolError(f"the machine in {self._path} is damaged: {why}", remedy="migrate it to a file anew")

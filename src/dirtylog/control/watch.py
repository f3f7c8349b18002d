"""Watching the memory of a machine in another process: what the QMP commands say, and the end that asks."""

import contextlib
import math
from typing import Annotated, Any, Final, NoReturn, Self, TypeVar

import msgspec

from dirtylog.control.qmp import ErrorClass, QMPClient, QMPCommandError
from dirtylog.display import Sample, unpack
from dirtylog.display.trace import MAX_PAGES
from dirtylog.errors import DisconnectedError, ProtocolError, UsageError
from dirtylog.units import PAGE_SIZE

START: Final = "x-watch-start"
SAMPLE: Final = "x-watch-sample"
STOP: Final = "x-watch-stop"

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_PAGES * PAGE_SIZE)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
S = TypeVar("S", bound=msgspec.Struct)


class WatchedBlock(msgspec.Struct, frozen=True):
    """A RAM block: bytes and pages, and how many of these have contents."""

    name: str
    size: Count
    pages: Count
    stored: Count


class WatchInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """Result of x-watch-start."""

    page_size: int
    blocks: tuple[WatchedBlock, ...]


class WrittenBlock(msgspec.Struct, frozen=True):
    """What was written of a block: how many pages, and which: see `display.pack`, in base64."""

    name: str
    size: Count
    pages: Count
    written: Count
    bitmap: bytes


class SampleInfo(msgspec.Struct, frozen=True):
    """Result of x-watch-sample: see `display.Sample`. ``status``: the machine's, as query-status tells it."""

    time: Seconds
    seconds: Seconds
    status: str
    blocks: tuple[WrittenBlock, ...]


class RemoteWatch:
    """A watch of the machine at the other end of a QMP session, which has one at a time.

    Args:
        qmp: the session; its owner closes it, which ends the watch too.

    Attributes:
        blocks: the machine's RAM blocks: how many pages each name has.
        stored: how many of them had contents when the watch began.
        status: what the machine was doing at the last sample.

    Raises:
        UsageError: the server offers no watch.
        RefusedError: the server cannot watch.
        PeerError: the server is gone, or broke the protocol.
    """

    def __init__(self, qmp: QMPClient) -> None:
        self._qmp = qmp
        self.status = ""
        info = _convert(self._start(), WatchInfo)
        if info.page_size != PAGE_SIZE:
            _complain(f"pages of {info.page_size} bytes")
        if any(block.size != block.pages * PAGE_SIZE for block in info.blocks):
            _complain("a block whose pages are not its bytes")
        if any(block.stored > block.pages for block in info.blocks):
            _complain("a block with more contents than pages")
        self.blocks = {block.name: block.pages for block in info.blocks}
        self.stored = {block.name: block.stored for block in info.blocks}
        if len(self.blocks) != len(info.blocks):
            _complain("two blocks of one name")
        if sum(self.blocks.values()) > MAX_PAGES:
            _complain(f"more than {MAX_PAGES} pages")
        self._time = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def sample(self) -> Sample:
        """Which pages were written since the last sample.

        Raises:
            RefusedError: the server has none.
            PeerError: the server is gone, or broke the protocol.
        """
        info = _convert(self._qmp.execute(SAMPLE), SampleInfo)
        if not (math.isfinite(info.time) and math.isfinite(info.seconds)) or info.time < self._time:
            _complain("a sample before the last one")
        if {block.name: block.pages for block in info.blocks} != self.blocks or len(info.blocks) != len(self.blocks):
            _complain("a sample of other memory")
        written = {block.name: unpack(block.bitmap, block.pages) for block in info.blocks}
        if any(written[block.name].count() != block.written for block in info.blocks):
            _complain("pages that it counts otherwise")
        self._time = info.time
        self.status = info.status
        return Sample(info.time, info.seconds, written)

    def close(self) -> None:
        """End the watch; idempotent."""
        with contextlib.suppress(DisconnectedError, QMPCommandError):  # then it has ended
            self._qmp.execute(STOP)

    def _start(self) -> Any:
        try:
            return self._qmp.execute(START)
        except QMPCommandError as error:
            if error.error_class != ErrorClass.COMMAND_NOT_FOUND:
                raise
            raise UsageError(
                "the QMP server there cannot tell which pages are written",
                remedy="name a machine that 'dirtylog run' runs, of the same version",
            ) from error


def _convert(reply: object, kind: type[S]) -> S:
    try:
        return msgspec.convert(reply, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the QMP server tells of written pages in other words: {error}") from error


def _complain(what: str) -> NoReturn:
    raise ProtocolError(f"the QMP server tells of {what}")

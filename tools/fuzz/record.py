"""``python -m tools.fuzz.record``: makes the corpus anew from what two sides say in real migrations.

Needed after a change of the protocol or of the file's format.
"""

import hashlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np

from dirtylog.linux.mapping import Contents, memory_of
from dirtylog.machine import Process
from dirtylog.migration import Channel, IncomingMigration, Listener, OutgoingMigration, Parameters, parse_address
from dirtylog.migration import file as machine_file
from dirtylog.migration.encoding import Compressor
from dirtylog.migration.file import Layout, MachineFile
from dirtylog.migration.messages import (
    EncodedPages,
    Failed,
    Join,
    Joined,
    Lacking,
    Message,
    Page,
    Request,
    Resume,
    Resumed,
    ZeroPage,
    encode,
)
from dirtylog.migration.protocol import Protocol
from dirtylog.units import PAGE_SIZE
from tools.fuzz.targets import BLOCKS, FILE_HEAD, SESSION

CORPUS: Final = Path(__file__).with_name("corpus")
"""A folder for each target, a file for each input."""

_WAYS: Final = (
    Parameters(verify=True),
    Parameters(channels=2),
    Parameters(share_memory=True),
    Parameters(postcopy=True),
)
_TO_DESTINATION: Final = 0
_TO_SOURCE: Final = 1
_TO_SOURCE_FURTHER: Final = 3


_RARE: Final[tuple[tuple[int, Message | None, Message, bytes], ...]] = (
    (_TO_DESTINATION, None, Failed("enough"), b""),
    (_TO_DESTINATION, None, Resume(SESSION), b""),
    (_TO_DESTINATION, Join(SESSION), Page(0, 3), bytes(PAGE_SIZE)),
    (_TO_DESTINATION, Join(SESSION), ZeroPage(0, 3), b""),
    (_TO_SOURCE_FURTHER, Joined(), Request(0, 3), b""),
    (_TO_SOURCE, None, Lacking(0, np.array([[3, 2], [9, 1]], np.int64)), b""),
    (_TO_SOURCE, None, Resumed(), b""),
)
"""What is heard only when pages are waited for, or a connection is lost: who hears it, and what comes before it."""


class Said:
    """What was said on one channel by one side."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.data = bytearray(Protocol.preamble())
        self.messages: list[Message] = []

    def add(self, message: Message, payload: list[Contents]) -> None:
        """Add a message and what belongs to it."""
        self.messages.append(message)
        self.data += encode(message)
        for part in payload:
            self.data += memory_of(part)

    @property
    def way(self) -> int:
        """Who hears it, as the target `Stream` has it."""
        if self.channel.peer == "destination":
            return _TO_DESTINATION
        return _TO_SOURCE_FURTHER if isinstance(self.messages[0], Joined) else _TO_SOURCE


@contextmanager
def _recording() -> Iterator[list[Said]]:
    said: list[Said] = []
    lock = threading.Lock()
    send = Channel.send

    def recording(channel: Channel, message: Message, payload: Iterable[Contents] = ()) -> int:
        parts = list(payload)
        with lock:
            one = next((one for one in said if one.channel is channel), None)
            if one is None:
                said.append(one := Said(channel))
            one.add(message, parts)
        return send(channel, message, parts)

    with mock.patch.object(Channel, "send", recording):
        yield said


class _Patient(Process):
    """One whose threads do not touch memory that is not there yet: it has none."""

    def check_postcopy(self, *, of_kernel: bool) -> None:
        """Do not refuse."""
        del of_kernel


def _machine() -> Process:
    sizes = {name: pages * PAGE_SIZE for name, pages in BLOCKS}
    return _Patient(sizes, resume=lambda: None, pause=lambda: None, save=lambda: b"state", tracker="comparison")


def _migrated(parameters: Parameters, folder: Path) -> list[Said]:
    address = parse_address(f"unix:{folder}/x")
    with closing(_machine()) as source, closing(_machine()) as destination, _recording() as said:
        source.array("ram", PAGE_SIZE, np.uint8)[::16] = 7
        source.resume()
        incoming = IncomingMigration(destination, Listener(address))
        thread = threading.Thread(target=incoming.run)
        thread.start()
        outgoing = OutgoingMigration(source, address, parameters)
        if parameters.postcopy:
            outgoing.start_postcopy()
        outgoing.run()
        thread.join()
    return said


def _encoded() -> tuple[EncodedPages, bytes]:
    """What the economy does not choose for so few pages."""
    frame = Compressor(1).compress(np.arange(1024, dtype=np.uint64).reshape(2, 512))
    return EncodedPages(0, np.array([[3, 2]], np.int64), size=len(frame), difference=True), frame


def _streams(folder: Path) -> Iterator[tuple[int, bytes, list[Message]]]:
    for parameters in _WAYS:
        for said in _migrated(parameters, folder):
            yield said.way, bytes(said.data), said.messages
    encoded, frame = _encoded()
    yield _TO_DESTINATION, Protocol.preamble() + encode(Join(SESSION)) + encode(encoded) + frame, [encoded]
    for way, first, message, payload in _RARE:
        opening = b"" if first is None else encode(first)
        yield way, Protocol.preamble() + opening + encode(message) + payload, [message]


def _file(folder: Path) -> bytes:
    """The input of the target `File`."""
    path = f"{folder}/machine"
    with closing(_machine()) as source:
        source.resume()
        OutgoingMigration(source, parse_address(f"file:{path}"), Parameters(verify=True)).run()
    data = Path(path).read_bytes()
    with closing(MachineFile(path)) as file:
        end = Layout(file.description.blocks).end
    size: int = machine_file._HEAD.unpack(data[:FILE_HEAD])[2]
    start = machine_file._DESCRIPTION
    return data[:FILE_HEAD] + size.to_bytes(2, "little") + data[start : start + size] + data[end:]


def inputs(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each target's name and an input, as they come; the folder is for what is needed meanwhile."""
    for way, data, messages in _streams(folder):
        yield "stream", bytes([way]) + data
        for message in messages:
            frame = encode(message)
            yield "body", frame[:1] + frame[8:]
    requests = b"".join(encode(Request(0, page)) for page in (3, 300, 7))
    pages = encode(Page(0, 3)) + b"\3" * PAGE_SIZE + encode(ZeroPage(0, 300)) + encode(Page(0, 7)) + bytes(PAGE_SIZE)
    for piece in (1, 24, 0xFFFF):
        yield "urgent", b"\1" + piece.to_bytes(2, "little") + requests
        yield "urgent", b"\0" + piece.to_bytes(2, "little") + pages
    _, frame = _encoded()
    yield "encoded", b"\1" + frame
    yield "encoded", b"\0" + frame
    facts = _file(folder)
    yield "file", b"\0" + facts
    yield "file", b"\1" + facts


def main() -> int:
    """Write the corpus, in place of what is there."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for target, data in inputs(Path(folder)):
            place = CORPUS / target / hashlib.sha256(data).hexdigest()[:16]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())

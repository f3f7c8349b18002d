"""The asking end against a server that says what tests tell it to."""

import base64
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from dirtylog.control.qmp import CommandRegistry, NoArguments, QMPClient, QMPServer
from dirtylog.control.watch import RemoteWatch
from dirtylog.display.trace import MAX_PAGES
from dirtylog.errors import DisconnectedError, ProtocolError, RefusedError, UsageError
from dirtylog.units import PAGE_SIZE

INFO: Final[dict[str, Any]] = {
    "page-size": PAGE_SIZE,
    "blocks": [{"name": "ram", "size": 10 * PAGE_SIZE, "pages": 10, "stored": 4}],
}


def memory(name: str, pages: int, **changes: int) -> dict[str, Any]:
    return {"name": name, "size": pages * PAGE_SIZE, "pages": pages, "stored": 0} | changes


def packed(word: int) -> str:
    return base64.b64encode(zlib.compress(word.to_bytes(8, "little"))).decode()


def block(**changes: Any) -> dict[str, Any]:
    return {"name": "ram", "size": 10 * PAGE_SIZE, "pages": 10, "written": 2, "bitmap": packed(0b101)} | changes


def sample(**changes: Any) -> dict[str, Any]:
    return {"time": 3.0, "seconds": 1.0, "status": "running", "blocks": [block()]} | changes


class Script:
    """Replies with what it was told to; raises it if it is an exception."""

    def __init__(self, path: Path) -> None:
        self.info: Any = INFO
        self.sample: Any = sample()
        self.stopped = 0
        self.registry = CommandRegistry()
        self.registry.add("x-watch-start", NoArguments, lambda _: self._tell(self.info))
        self.registry.add("x-watch-sample", NoArguments, lambda _: self._tell(self.sample))
        self.registry.add("x-watch-stop", NoArguments, self._stop)
        self.server = QMPServer(path, self.registry)

    def _tell(self, what: Any) -> Any:
        if isinstance(what, Exception):
            raise what
        return what

    def _stop(self, _: NoArguments) -> None:
        self.stopped += 1


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    script = Script(tmp_path / "qmp")
    with script.server:
        script.server.start()
        yield script


@pytest.fixture
def qmp(script: Script, tmp_path: Path) -> Iterator[QMPClient]:
    with QMPClient(tmp_path / "qmp") as client:
        yield client


def test_sample_is_what_the_server_says(script: Script, qmp: QMPClient) -> None:
    with RemoteWatch(qmp) as watch:
        assert (watch.blocks, watch.stored) == ({"ram": 10}, {"ram": 4})
        found = watch.sample()
        assert (found.time, found.seconds, watch.status) == (3.0, 1.0, "running")
        assert found.written["ram"].indices().tolist() == [0, 2]
    assert script.stopped == 1


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({}, "in other words"),
        (INFO | {"page-size": 16384}, "pages of 16384 bytes"),
        (INFO | {"blocks": INFO["blocks"] * 2}, "two blocks of one name"),
        (INFO | {"blocks": [memory("ram", 10, size=1)]}, "a block whose pages are not its bytes"),
        (INFO | {"blocks": [memory("ram", 10, stored=11)]}, "a block with more contents than pages"),
        (INFO | {"blocks": [memory("ram", -1)]}, "in other words"),
        (INFO | {"blocks": [memory("ram", 1 << 50)]}, "in other words"),
        (INFO | {"blocks": [memory(name, MAX_PAGES) for name in "ab"]}, "more than 4294967296 pages"),
    ],
)
def test_memory_that_cannot_be_is_refused(script: Script, qmp: QMPClient, info: Any, problem: str) -> None:
    script.info = info
    with pytest.raises(ProtocolError, match=problem):
        RemoteWatch(qmp)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ({}, "in other words"),
        (sample(blocks=[]), "a sample of other memory"),
        (sample(blocks=[block(), block()]), "a sample of other memory"),
        (sample(blocks=[block(pages=11)]), "a sample of other memory"),
        (sample(blocks=[block(name="rom")]), "a sample of other memory"),
        (sample(blocks=[block(written=3)]), "pages that it counts otherwise"),
        (sample(blocks=[block(bitmap=packed(1 << 10))]), "has a page past its end"),
        (sample(blocks=[block(bitmap="AAAA")]), "is damaged"),
        (sample(blocks=[block(bitmap="?")]), "in other words"),
        (sample(seconds=-1), "in other words"),
        (sample(time=2.0), "a sample before the last one"),
    ],
)
def test_sample_that_cannot_be_is_refused(script: Script, qmp: QMPClient, reply: Any, problem: str) -> None:
    watch = RemoteWatch(qmp)
    watch.sample()
    script.sample = reply
    with pytest.raises(ProtocolError, match=problem):
        watch.sample()


def test_server_that_refuses_is_quoted(script: Script, qmp: QMPClient) -> None:
    script.info = UsageError("not today")
    with pytest.raises(RefusedError, match="not today"):
        RemoteWatch(qmp)


def test_server_without_the_commands_is_no_machine_of_ours(tmp_path: Path) -> None:
    with QMPServer(tmp_path / "other", CommandRegistry()) as server:
        server.start()
        with (
            QMPClient(tmp_path / "other") as qmp,
            pytest.raises(UsageError, match="cannot tell which pages are written; name a machine"),
        ):
            RemoteWatch(qmp)


def test_end_of_the_server_ends_the_watch(script: Script, qmp: QMPClient) -> None:
    with RemoteWatch(qmp) as watch:
        script.server.close()
        with pytest.raises(DisconnectedError):
            watch.sample()

import json
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.require import require

from dirtylog.errors import HostError, UsageError
from dirtylog.guests import dirtier
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "src/dirtylog/guests/dirtier.img"
BOUND = 60.0


def test_image_is_a_boot_sector_without_partitions() -> None:
    image = dirtier.build(*dirtier.DEFAULT_RANGE)

    assert len(image) == 512
    assert image[446:510] == bytes(64)
    assert image[510:] == b"\x55\xaa"


def test_default_range_is_the_shipped_one() -> None:
    assert dirtier.build(*dirtier.DEFAULT_RANGE) == SHIPPED.read_bytes()


@pytest.mark.parametrize(
    ("first", "last"),
    [(64 * KIB, 68 * KIB), (1 * MIB, 512 * MIB), (3 * GIB - PAGE_SIZE, 3 * GIB), (64 * KIB, 3 * GIB)],
)
def test_range_is_patched_and_nothing_else(first: int, last: int) -> None:
    image = dirtier.build(first, last)
    shipped = SHIPPED.read_bytes()

    assert struct.unpack_from("<4sII", image, 4) == (b"DLP1", first, last)
    assert image[:8] == shipped[:8]
    assert image[16:] == shipped[16:]


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (1 * MIB + 1, 2 * MIB, "not whole pages"),
        (1 * MIB, 2 * MIB - 512, "not whole pages"),
        (1 * MIB, 1 * MIB, "holds no page"),
        (2 * MIB, 1 * MIB, "holds no page"),
        (60 * KIB, 1 * MIB, "own code or counter"),
        (0, 1 * MIB, "own code or counter"),
        (-PAGE_SIZE, 1 * MIB, "own code or counter"),
        (1 * MIB, 3 * GIB + PAGE_SIZE, "PCI hole"),
        (4 * GIB, 5 * GIB, "PCI hole"),
    ],
)
def test_range_that_cannot_be_is_refused(first: int, last: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        dirtier.build(first, last)
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    "content", [b"", bytes(512), SHIPPED.read_bytes()[:-1], SHIPPED.read_bytes() + b"\x55\xaa", None]
)
def test_damaged_installation_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if content is not None:
        (tmp_path / "dirtier.img").write_bytes(content)
    monkeypatch.setattr("dirtylog.guests.sector.resources.files", lambda package: tmp_path)

    with pytest.raises(HostError, match=r"dirtier\.img (cannot be read|is damaged)"):
        dirtier.build(*dirtier.DEFAULT_RANGE)


def slow_rule(values: list[int], rounds: int | None) -> bool:
    """Whether some moment of some round leaves these values, found by trying them all."""
    for count in range(256) if rounds is None else [rounds % 256]:
        for written in range(len(values) + 1):
            if values == [(count + 1) % 256] * written + [count] * (len(values) - written):
                return True
    return False


@st.composite
def nearly_right_pages(draw: st.DrawFn) -> list[int]:
    start = draw(st.integers(0, 255))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    drops = [draw(st.sampled_from([1, 1, 1, 0, -1, 2])) for _ in lengths]
    values, value = [], start
    for length, drop in zip(lengths, drops, strict=True):
        values += [value % 256] * length
        value -= drop
    return values


@given(
    values=nearly_right_pages() | st.lists(st.integers(0, 255), min_size=1, max_size=6),
    offset=st.none() | st.integers(-2, 2),
)
def test_page_rule_agrees_with_trying_every_moment(values: list[int], offset: int | None) -> None:
    rounds = None if offset is None else 256 * 7 + values[-1] + offset

    violation = dirtier.check_pages(np.array(values, dtype=np.uint8), rounds)

    assert (violation is None) == slow_rule(values, rounds)


@pytest.mark.parametrize(
    ("values", "rounds", "message"),
    [
        ([5, 5, 6], None, "page 1 holds 5 and page 2 holds 6"),
        ([5, 4, 4, 3], None, "after page 0 and again after page 2"),
        ([5, 4, 9], None, "page 1 holds 4 and page 2 holds 9"),
        ([5, 4], 5, "last page holds 4, which 5 completed rounds do not explain"),
        ([5, 4], 3, "last page holds 4, which 3 completed rounds do not explain"),
    ],
)
def test_violation_says_where(values: list[int], rounds: int | None, message: str) -> None:
    violation = dirtier.check_pages(np.array(values, dtype=np.uint8), rounds)

    assert violation is not None
    assert message in violation


@pytest.mark.parametrize(
    "pages", [np.zeros(0, np.uint8), np.zeros(4, np.int64), np.zeros((2, 2), np.uint8)], ids=["none", "wide", "table"]
)
def test_pages_that_are_no_row_of_bytes_are_refused(pages: Any) -> None:
    with pytest.raises(UsageError, match="wants a row of bytes"):
        dirtier.check_pages(pages)


class Peer:
    """QEMU running an image, spoken to by the few QMP commands that these tests need."""

    def __init__(self, image: bytes, folder: Path) -> None:
        self._folder = folder
        (folder / "image").write_bytes(image)
        self._ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    "qemu-system-x86_64", "-accel", "tcg", "-cpu", "qemu64", "-m", "16", "-nodefaults",
                    "-display", "none", "-drive", f"file={folder}/image,format=raw", "-serial", "stdio",
                    "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self._ours.settimeout(BOUND)
        self._stream = self._ours.makefile("rwb")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(BOUND)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stream.close()
        self._ours.close()

    def execute(self, command: str, **arguments: Any) -> None:
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._stream.flush()
        answer: dict[str, Any] = {}
        while "return" not in answer:
            answer = json.loads(self._stream.readline())
            assert "error" not in answer

    def serial(self, size: int) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.read(size)

    def memory(self, address: int, size: int) -> bytes:
        path = self._folder / "memory"
        self.execute("pmemsave", val=address, size=size, filename=str(path))
        return path.read_bytes()


@pytest.fixture
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peer]:
    require("qemu", shutil.which("qemu-system-x86_64"), "running the guest here needs qemu-system-x86_64")
    peer = Peer(dirtier.build(*request.param), tmp_path)
    try:
        peer.execute("qmp_capabilities")
        yield peer
    finally:
        peer.close()


RANGES = [
    pytest.param((1 * MIB, 8 * MIB), id="whole turns of the loop"),
    pytest.param((1 * MIB, 8 * MIB + 5 * PAGE_SIZE), id="a short turn"),
    pytest.param((64 * KIB, 68 * KIB), id="one page, as low as can be"),
]


@pytest.mark.parametrize("peer", RANGES, indirect=True)
def test_page_rule_holds_whenever_qemu_stops_the_guest(peer: Peer, request: pytest.FixtureRequest) -> None:
    first, last = request.node.callspec.params["peer"]
    assert peer.serial(4) == b"ABBB"
    counts: list[int] = []
    deadline = time.monotonic() + BOUND

    while len(set(counts)) < 5:
        assert time.monotonic() < deadline, f"the guest does not go on: {counts[-1]} rounds"
        peer.execute("stop")
        rounds, started = struct.unpack("<Q4s", peer.memory(dirtier.COUNTER_ADDRESS, 12))
        memory = np.frombuffer(peer.memory(0, 16 * MIB), np.uint8)
        peer.execute("cont")
        assert started == dirtier.STARTED
        assert dirtier.check_pages(memory[first:last:PAGE_SIZE], rounds) is None
        counts.append(rounds)

    assert counts[0] >= 3
    assert counts == sorted(counts)

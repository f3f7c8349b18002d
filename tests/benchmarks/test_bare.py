import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support import bare
from benchmarks.support.bare import COPIES, SCHEMES, copy
from dirtylog.errors import HostError, PeerError, UsageError
from dirtylog.units import MIB

RECEIVER = Path(bare.__file__).with_name("receiver.py")
LINES = "import os, signal, socket, sys\nsock = socket.socket(fileno=0)\n"


def receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str) -> None:
    """Let another program stand in for the receiver."""
    program = tmp_path / "receiver.py"
    program.write_text(LINES + lines)
    monkeypatch.setattr(bare, "_RECEIVER", program)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, MIB, 9 * MIB + 5])
def test_every_copy_is_timed(scheme: str, size: int) -> None:
    result = copy(size, scheme)
    assert result.size == size
    assert len(result.seconds) == COPIES
    assert all(0 < one.seconds < 60 and one.steal >= 0 for one in result.copies)


def test_number_of_copies_is_as_asked() -> None:
    assert len(copy(MIB, "unix", 2).copies) == 2


@pytest.mark.parametrize(("size", "scheme"), [(0, "unix"), (-1, "tcp"), (MIB, "rdma")])
def test_size_or_connection_that_cannot_be_is_refused(size: int, scheme: str) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes cannot be copied over a connection of kind '{scheme}'"):
        copy(size, scheme)


@pytest.mark.parametrize("size", [1 << 60, 1 << 70], ids=["no room", "no number for it"])
def test_lack_of_memory_is_told(size: int) -> None:
    with pytest.raises(HostError, match="the host cannot map"):
        copy(size, "unix")


@pytest.mark.parametrize(
    "lines",
    ["sys.exit('out of luck')\n", "sock.sendall(b'!')\nsys.exit('out of luck')\n"],
    ids=["before it was ready", "in the middle"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_receiver_that_ends_is_an_error_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, scheme: str
) -> None:
    receiver(monkeypatch, tmp_path, lines)
    with pytest.raises(PeerError, match=r"the receiver of 67108864 bytes is lost .*: out of luck"):
        copy(64 * MIB, scheme)


def test_receiver_that_is_stuck_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    number = tmp_path / "pid"
    receiver(
        monkeypatch,
        tmp_path,
        f"open({str(number)!r}, 'w').write(str(os.getpid()))\nsock.sendall(b'!')\nsignal.pause()\n",
    )
    monkeypatch.setattr(bare, "_STALL_SECONDS", 2.0)  # the program has to start in that time
    with pytest.raises(PeerError, match=r"is lost \(.*unavailable\): it did not say why"):
        copy(MIB, "unix")
    assert not Path(f"/proc/{number.read_text()}").exists()


@pytest.mark.parametrize(("sent", "confirmations"), [(0, 1), (6999, 1), (7000, 2), (13_999, 2), (21_001, 4)])
def test_receiver_confirms_its_memory_and_each_time_that_it_is_full(sent: int, confirmations: int) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", str(RECEIVER), "7000"]
    with ours, theirs, subprocess.Popen(command, stdin=theirs.fileno()) as process:
        theirs.close()
        ours.settimeout(60)
        ours.sendall(bytes(sent))
        ours.shutdown(socket.SHUT_WR)
        received = b""
        while piece := ours.recv(16):
            received += piece
        assert process.wait(60) == 0
    assert received == b"!" * confirmations

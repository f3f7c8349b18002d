import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.dirtier_runs import MEMORY, Place
from support.processes import Process, dirtylog
from support.waiting import wait_until

from dirtylog.cli.main import main
from dirtylog.migration.protocol import Protocol


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _check_lines(text: str, cause: str, remedy: str) -> None:
    """One clear line names the cause, and one the remedy."""
    lines = [line for line in text.splitlines() if not line.startswith("dirtylog: waiting")]
    assert len(lines) == 2, text
    assert lines[0].startswith("dirtylog: error: ")
    assert cause in lines[0]
    assert lines[1].startswith("  remedy: ")
    assert remedy in lines[1]


def _check_ends(process: Process, status: int, cause: str, remedy: str) -> None:
    with process:
        assert process.wait() == status, process.err
        assert process.out == ""
        _check_lines(process.err, cause, remedy)


def _file(name: str, content: bytes) -> Callable[[Place, ExitStack], None]:
    def write(place: Place, _: ExitStack) -> None:
        Path(place.path(name)).write_bytes(content)

    return write


def _listening(name: str) -> Callable[[Place, ExitStack], None]:
    def listen(place: Place, stack: ExitStack) -> None:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(place.path(name))
        sock.listen()

    return listen


def _nothing(_: Place, __: ExitStack) -> None:
    return


# Name: arguments (paths in braces are in the test's directory), what must be there, status, cause, remedy.
_CASES: dict[str, tuple[str, Callable[[Place, ExitStack], None], int, str, str]] = {
    "nothing to run": ("run", _nothing, 2, "there is nothing to run", "name an IMAGE"),
    "image that is missing": ("run {nowhere}", _nothing, 2, "cannot be read: No such file", "'dirtylog guest'"),
    "image that is a directory": ("run {}", _nothing, 2, "cannot be read: Is a directory", "'dirtylog guest'"),
    "image that is empty": ("run {empty}", _file("empty", b""), 2, "the image is empty", "'dirtylog guest'"),
    "image larger than memory": (
        "run {big} --memory 64K", _file("big", bytes(65537)), 2, "larger than memory", "--memory"
    ),
    "image that is no boot sector": (
        "run {text}", _file("text", b"hello" * 200), 2, "do not end in 55 aa", "--load-address"
    ),
    "memory of no pages": ("run {dirtier.img} --memory 0", _nothing, 2, "memory of 0 bytes", "a multiple of 4K"),
    "memory of half a page": ("run {dirtier.img} --memory 6K", _nothing, 2, "memory of 6144 bytes", "a multiple of 4K"),
    "memory that no host has": ("run {dirtier.img} --memory 1E", _nothing, 3, "cannot map 1.0 EiB", "ask for less"),
    "memory past all numbers": ("run {dirtier.img} --memory 99999E", _nothing, 3, "cannot map", "ask for less"),
    "QMP path in use": ("run {dirtier.img} --qmp {busy}", _listening("busy"), 2, "already in use", "another path"),
    "QMP path that is a file": ("run {dirtier.img} --qmp {f}", _file("f", b"x"), 2, "is not a socket", "another path"),
    "QMP path too long": ("run {dirtier.img} --qmp {" + "x" * 100 + "}", _nothing, 2, "more than the 107", "shorter"),
    "QMP path nowhere": ("run {dirtier.img} --qmp {no/where}", _nothing, 3, "does not exist", "mkdir -p"),
    "incoming path in use": ("run --incoming unix:{busy}", _listening("busy"), 2, "already in use", "another path"),
    "incoming path too long": (
        "run --incoming unix:{" + "x" * 100 + "}", _nothing, 2, "more than the 107", "shorter"
    ),
    "incoming address that is none": ("run --incoming telnet:x", _nothing, 2, "not a migration address", "unix:PATH"),
    "incoming host name that is none": ("run --incoming tcp:a..b:1", _nothing, 2, "not a migration", "tcp:HOST:PORT"),
    "incoming address of another host": (
        "run --incoming tcp:192.0.2.1:0", _nothing, 3, "cannot listen at tcp:192.0.2.1:0", "this host"
    ),
    "serial output nowhere": (
        "run {dirtier.img} --serial {no/where}", _nothing, 3, "cannot write serial output", ""
    ),
    "nobody at the QMP path": ("migrate {nobody} tcp:localhost:1", _nothing, 5, "{nobody}", ""),
    "migration to no address": ("migrate {nobody} nowhere", _nothing, 2, "not a migration address", "unix:PATH"),
}  # fmt: skip


def _fill_in(place: Place, text: str) -> str:
    """``{name}`` is a path in the place's directory."""
    before, brace, rest = text.partition("{")
    if not brace:
        return text
    name, _, after = rest.partition("}")
    return before + place.path(name) + _fill_in(place, after)


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("name", _CASES)
def test_bad_input_ends_with_its_cause_and_remedy(
    place: Place, stack: ExitStack, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, prepare, status, cause, remedy = _CASES[name]
    prepare(place, stack)
    before = place.left()
    command = [_fill_in(place, argument) for argument in arguments.split()]
    assert main(command) == status
    out, err = capfd.readouterr()
    assert out == ""
    _check_lines(err, _fill_in(place, cause), remedy)
    assert place.left() == before


_WITH_DEVICE = """
import sys
from dirtylog.machine import KVMMachine
KVMMachine.__init__.__kwdefaults__["device"] = sys.argv.pop(1)
from dirtylog.cli.main import main
sys.exit(main())
"""


_RUN = ("run", "--accel", "kvm")


def test_host_without_kvm_is_told_how_to_get_it(place: Place) -> None:
    process = Process((sys.executable, "-c", _WITH_DEVICE, place.path("kvm"), *_RUN, str(place.image)))
    _check_ends(process, 3, f"there is no {place.path('kvm')}", "modprobe")


def test_user_who_may_not_use_kvm_is_told_which_group_to_join(place: Place) -> None:
    refuse = "import os; os.open = lambda *_: (_ for _ in ()).throw(PermissionError(13, 'Permission denied'))\n"
    process = Process((sys.executable, "-c", refuse + _WITH_DEVICE, place.path("kvm"), *_RUN, str(place.image)))
    _check_ends(process, 3, f"no permission to open {place.path('kvm')}", "usermod -aG kvm")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "the source does not speak dirtylog's migration protocol; check the address"),
        (b"DIRTYLOG\x01\0\0\0", "the source speaks version 1 of the migration protocol, this side 5"),
        (Protocol.preamble(), "the connection to the source ended before the migration did"),
    ],
    ids=["HTTP", "another version", "nothing more"],
)
def test_destination_that_hears_something_else_says_so_and_waits_on(
    place: Place, said: bytes, cause: str
) -> None:  # M10
    path = place.path("m")
    destination = dirtylog("run", "--incoming", f"unix:{path}", "--memory", MEMORY)
    with destination, socket.socket(socket.AF_UNIX) as peer:
        wait_until(lambda: "waiting for a guest" in destination.err, "it waits")
        peer.connect(path)
        peer.sendall(said)
        peer.shutdown(socket.SHUT_WR)
        wait_until(lambda: "refused" in destination.err and destination.err.endswith("\n"), "it says so")
        *_, line = destination.err.splitlines()
        assert line.startswith(f"dirtylog: refused a connection from process {os.getpid()} of user {os.getuid()}: ")
        assert cause in line
        destination.signal(signal.SIGTERM)
        assert destination.wait() == 0
    assert place.left() == []

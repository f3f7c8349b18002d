import fcntl
import http.client
import os
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import pytest
from support.processes import DIRTYLOG, Process, Run, dirtylog, environment
from support.require import require
from support.waiting import BOUND, Task, wait_until

from dirtylog.cli.main import main
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import QMPClient
from dirtylog.errors import DisconnectedError, HostError
from dirtylog.guests.dirtier import build
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import Capability
from dirtylog.machine import KVMMachine
from dirtylog.trackers import KVMLogMode
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.units import MIB

_SEND: Final = "b0 {0:02x} ee"  # mov al, CHARACTER; out dx, al
_PORT: Final = {"real": "ba f8 03", "protected": "66 ba f8 03", "long": "66 ba f8 03"}  # mov dx, 0x3f8
_HALT: Final = "f4 eb fd"  # hlt; jmp to it
_AGAIN: Final = "ee eb fd"  # out dx, al; jmp to it
_FAULT: Final = "0f 0b"  # ud2, and nobody handles it
_PIPE_SIZE: Final = 4096

Capture = pytest.CaptureFixture[str]


def code(mode: str, character: str, end: str = _HALT) -> bytes:
    """A flat image that sends a character on the serial port."""
    return bytes.fromhex(f"{_PORT[mode]} {_SEND.format(ord(character))} {end}")


@pytest.fixture
def image(kvm: object, tmp_path: Path) -> str:
    """The dirtier, small."""
    path = tmp_path / "dirtier.img"
    path.write_bytes(build(1 * MIB, 2 * MIB))
    return str(path)


@pytest.fixture
def flat(kvm: object, tmp_path: Path) -> Callable[[bytes], str]:
    def write(content: bytes) -> str:
        (tmp_path / "flat").write_bytes(content)
        return str(tmp_path / "flat")

    return write


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


class Here:
    """Runs ``dirtylog run`` in this process, in a tenth of the time, and quits it when a test has seen enough."""

    def __init__(self, folder: Path) -> None:
        self.qmp_path = folder / "qmp"
        self._serial = folder / "serial"
        self._ended = threading.Event()

    def run(self, arguments: Sequence[str], look: Callable[[QMPClient], None]) -> int:
        """The exit status; ``look`` is called in another thread, since signals want this one."""
        looker = Task(lambda: self._look(look))
        common = ("--memory", "4M", "--qmp", str(self.qmp_path), "--serial", str(self._serial))
        try:
            status = main(["run", *arguments, *common])
        finally:
            self._ended.set()
        looker.join()
        return status

    def _look(self, look: Callable[[QMPClient], None]) -> None:
        with self._connect() as client:
            try:
                look(client)
            finally:
                client.execute("quit")

    def _connect(self) -> QMPClient:
        """A client, as soon as somebody listens: the socket's file is there a moment before."""
        clients: list[QMPClient] = []

        def connected() -> bool:
            with suppress(DisconnectedError):
                clients.append(QMPClient(self.qmp_path))
            return bool(clients)

        wait_until(lambda: connected() or self._ended.is_set(), "QMP is served")
        assert clients, "it ended before QMP was served"
        return clients[0]

    @property
    def out(self) -> str:
        return self._serial.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.out or self._ended.is_set(), f"the guest sent {text!r}")
        assert text in self.out


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


class TestBoot:
    def test_boot_sector_runs_and_its_output_is_printed(self, image: str) -> None:
        with dirtylog("run", image, "--memory", "4M") as process:
            wait_until(lambda: "ABB" in process.out or not process.running, "the guest ran")
            assert process.out.startswith("ABB"), process.err

    @pytest.mark.parametrize(
        ("mode", "before", "options"),
        [
            ("real", "", ["--load-address", "32K"]),
            ("real", "f4" * 16, ["--load-address", "640K", "--entry", "655376"]),
            ("protected", "", ["--load-address", "2M", "--mode", "protected"]),
            ("protected", "f4" * 32, ["--load-address", "2M", "--entry", "2097184", "--mode", "protected"]),
            ("long", "", ["--load-address", "2M", "--mode", "long"]),
        ],
        ids=["real", "real-high-entry", "protected", "protected-entry", "long"],
    )
    def test_flat_image_starts_where_and_how_it_is_told(
        self, flat: Callable[[bytes], str], here: Here, mode: str, before: str, options: list[str], capfd: Capture
    ) -> None:
        path = flat(bytes.fromhex(before) + code(mode, "!"))
        assert here.run([path, *options], lambda _: here.wait_for("!")) == 0
        assert capfd.readouterr() == ("", "")

    def test_image_may_come_from_a_pipe(self, kvm: object, here: Here, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        writer = Task(lambda: (tmp_path / "pipe").write_bytes(build(1 * MIB, 2 * MIB)))
        assert here.run([str(tmp_path / "pipe")], lambda _: here.wait_for("A")) == 0
        writer.join()

    def test_paused_guest_waits_for_cont(self, image: str, here: Here) -> None:
        def look(client: QMPClient) -> None:
            assert client.execute("query-status")["status"] == "prelaunch"
            assert here.out == ""
            client.execute("cont")
            here.wait_for("A")

        assert here.run([image, "--paused"], look) == 0

    def test_several_vcpus_can_be_had(self, image: str, here: Here) -> None:
        def look(client: QMPClient) -> None:
            here.wait_for("A")
            client.execute("stop")
            assert {"vcpu0", "vcpu1"} <= {thread.name for thread in threading.enumerate()}

        assert here.run([image, "--cpus", "2"], look) == 0

    @pytest.mark.parametrize("mode", ["legacy", "manual", "initially-set"])
    def test_mode_of_the_log_can_be_chosen(
        self, kvm: KVM, image: str, here: Here, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        with kvm.create_vm() as vm:
            try:
                choose_mode(vm, KVMLogMode(mode))
            except HostError as error:
                pytest.skip(str(error))
        chosen: list[KVMLogMode] = []

        def note(machine: KVMMachine) -> Controller:
            chosen.append(machine.log_mode)
            return Controller(machine)

        monkeypatch.setattr("dirtylog.cli.run.Controller", note)
        assert here.run([image, "--dirty-log", mode], lambda _: here.wait_for("A")) == 0
        assert chosen == [KVMLogMode(mode)]

    def test_dirty_rings_can_be_chosen_with_their_size(
        self, kvm: KVM, image: str, here: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")
        told: list[tuple[int, ...]] = []

        def note(machine: KVMMachine) -> Controller:
            told.append(machine.dirty_pages())
            return Controller(machine)

        monkeypatch.setattr("dirtylog.cli.run.Controller", note)
        options = ["--dirty-log", "ring", "--dirty-ring-size", "1024"]
        assert here.run([image, *options], lambda _: here.wait_for("A")) == 0
        assert told == [(0,)]

    @pytest.mark.parametrize("log", [(), ("--dirty-log", "manual")])
    def test_size_of_rings_without_rings_is_refused(self, log: tuple[str, ...], capfd: Capture) -> None:
        check_error(capfd, main(["run", "x", "--dirty-ring-size", "4096", *log]), 2, "is for --dirty-log ring")

    @pytest.mark.parametrize("size", ["0", "1000", "-4096"])
    def test_size_that_no_ring_can_have_is_refused(self, kvm: KVM, size: str, capfd: Capture) -> None:
        require("kvm", kvm.check(Capability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")
        options = ["--dirty-log", "ring", "--dirty-ring-size", size]
        check_error(capfd, main(["run", "x", *options]), 2, f"a dirty ring of {size} entries")

    def test_machine_is_ready_when_its_first_client_is_served(self, kvm: object, here: Here, tmp_path: Path) -> None:
        def look(client: QMPClient) -> None:
            assert client.execute("query-status")["status"] == "inmigrate"

        assert here.run(["--incoming", f"unix:{tmp_path}/m"], look) == 0

    def test_incoming_address_is_told_with_the_port_that_the_system_chose(
        self, kvm: object, here: Here, capfd: Capture
    ) -> None:
        assert here.run(["--incoming", "tcp:127.0.0.1:0"], lambda _: None) == 0
        err = capfd.readouterr().err
        assert re.fullmatch(r"dirtylog: waiting for a guest at tcp:127\.0\.0\.1:[1-9]\d*\n", err)

    def test_credentials_are_also_those_of_migrations_away_from_here(self, image: str, here: Here) -> None:
        def look(client: QMPClient) -> None:
            parameters = client.execute("query-migrate-parameters")
            assert (parameters["tls-creds"], parameters["tls-hostname"]) == (f"{os.getcwd()}/pki", "host")

        assert here.run([image, "--tls-creds", "pki", "--tls-hostname", "host"], look) == 0


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_ends_it_cleanly(self, image: str, qmp: Path, tmp_path: Path, number: signal.Signals) -> None:
        before = set(tmp_path.iterdir())
        with Run(qmp, image, "--memory", "4M") as process:
            process.signal(number)
            assert process.qmp.wait_event("SHUTDOWN").data == {"guest": False, "reason": "host-signal"}
            assert process.wait() == 0
            assert process.err == ""
        assert set(tmp_path.iterdir()) == before

    def test_signal_ends_waiting_for_a_guest(self, kvm: object, tmp_path: Path) -> None:
        with Run(tmp_path / "qmp", "--incoming", f"unix:{tmp_path}/m", "--memory", "4M") as process:
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
        assert not list(tmp_path.iterdir())

    def test_signal_cancels_a_migration_under_way(self, image: str, qmp: Path, tmp_path: Path) -> None:
        with (
            socket.create_server(str(tmp_path / "silent"), family=socket.AF_UNIX),
            Run(qmp, image, "--memory", "4M") as process,
        ):
            process.qmp.execute("migrate", uri=f"unix:{tmp_path}/silent")
            process.signal(signal.SIGINT)
            assert process.wait() == 0
            assert process.err == ""

    def test_guest_that_faults_ends_it_with_an_error(
        self, flat: Callable[[bytes], str], qmp: Path, tmp_path: Path
    ) -> None:
        path = flat(code("protected", "!", _FAULT))
        options = ("--load-address", "1M", "--mode", "protected", "--memory", "4M", "--paused")
        with Run(qmp, path, *options) as process:
            process.qmp.execute("cont")
            shutdown = process.qmp.wait_event("SHUTDOWN")
            assert shutdown.data == {"guest": True, "reason": "guest-shutdown"}
            assert process.wait() == 6
            assert process.out == "!"
            assert process.err.splitlines()[0] == "dirtylog: error: the guest shut down by a triple fault"
        assert not qmp.exists()


@contextmanager
def _piped(qmp: Path, image: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """``dirtylog run`` with a small pipe as standard output, and the end to read from."""
    command = [*DIRTYLOG, "run", image, "--memory", "4M", "--qmp", str(qmp), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pipesize=_PIPE_SIZE, env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def _waiting(reader: IO[bytes]) -> int:
    """Bytes that wait in a pipe."""
    (size,) = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4))
    return int(size)


class TestSerial:
    @pytest.fixture
    @staticmethod
    def talker(flat: Callable[[bytes], str]) -> str:
        """Sends a character for ever."""
        return flat(code("real", "x", _AGAIN))

    def test_it_goes_to_a_file_if_told(self, image: str, tmp_path: Path) -> None:
        (tmp_path / "serial").write_text("old")
        with dirtylog("run", image, "--memory", "4M", "--serial", str(tmp_path / "serial")) as process:
            wait_until(lambda: "ABB" in (tmp_path / "serial").read_text(), "the guest's output is in the file")
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
            assert (process.out, process.err) == ("", "")
        assert (tmp_path / "serial").read_text().startswith("ABB")

    def test_reader_that_stops_does_not_keep_the_guest_from_stopping(self, talker: str, qmp: Path) -> None:
        with _piped(qmp, talker, "--load-address", "32K") as (process, reader):
            wait_until(lambda: _waiting(reader) == _PIPE_SIZE, "the pipe is full")
            with QMPClient(qmp) as client:
                client.execute("stop")
                assert client.execute("query-status")["status"] == "paused"
                client.execute("quit")
            assert process.wait(BOUND) == 0

    def test_reader_that_leaves_is_told_of_once_and_the_guest_goes_on(self, talker: str, qmp: Path) -> None:
        with _piped(qmp, talker, "--load-address", "32K") as (process, reader):
            wait_until(lambda: _waiting(reader) == _PIPE_SIZE, "the pipe is full")
            reader.close()
            assert process.stderr is not None
            assert process.stderr.readline() == (
                b"dirtylog: warning: serial output is lost from here on: Broken pipe\n"
            )
            with QMPClient(qmp) as client:
                assert client.execute("query-status")["running"] is True
            process.send_signal(signal.SIGTERM)
            assert process.wait(BOUND) == 0
            assert process.stderr.read() == b""

    def test_full_disk_is_told_of_once_and_the_guest_goes_on(self, image: str, qmp: Path) -> None:
        with Run(qmp, image, "--memory", "4M", "--serial", "/dev/full") as process:
            wait_until(lambda: process.err, "the warning came")
            process.qmp.execute("quit")
            assert process.wait() == 0
            assert process.err == "dirtylog: warning: serial output is lost from here on: No space left on device\n"

    def test_without_a_standard_output_it_goes_nowhere(self, image: str, qmp: Path) -> None:
        command = 'exec "$@" >&-'
        with Process(
            ("sh", "-c", command, "sh", *DIRTYLOG, "run", image, "--memory", "4M", "--qmp", str(qmp))
        ) as process:
            wait_until(lambda: qmp.exists() or not process.running, "QMP is served")
            with QMPClient(qmp) as client:
                client.execute("quit")
            assert process.wait() == 0
            assert process.err == ""


def check_error(capfd: Capture, status: int, expected_status: int, cause: str) -> None:
    """One error with its status; the cause is matched, and a remedy may follow."""
    out, err = capfd.readouterr()
    assert (out, status) == ("", expected_status), err
    first, *rest = err.splitlines()
    assert re.search(f"^dirtylog: error: .*{cause}", first), err
    assert len(rest) <= 1
    assert all(line.startswith("  remedy: ") for line in rest)


class TestMetrics:
    def test_they_are_served_to_this_host_until_the_end(self, image: str) -> None:
        with dirtylog("run", image, "--memory", "4M", "--metrics", "0") as process:
            wait_until(lambda: "\n" in process.err, "it said where metrics are")
            said = re.fullmatch(r"dirtylog: metrics at http://(127\.0\.0\.1):(\d+)(/metrics)\n", process.err)
            assert said is not None, process.err
            connection = http.client.HTTPConnection(said[1], int(said[2]), timeout=BOUND)
            connection.request("GET", said[3])
            text = connection.getresponse().read().decode()
            connection.close()
            assert "\ndirtylog_memory_bytes 4.194304e+06\n" in text
            assert '\ndirtylog_run_state{state="running"}' in text
            process.signal(signal.SIGTERM)
            assert process.wait() == 0

    def test_place_that_is_taken_ends_it_before_the_guest_runs(self, image: str, capfd: Capture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            arguments = ["run", image, "--memory", "4M", "--metrics", str(taken.getsockname()[1])]
            check_error(capfd, main(arguments), 3, "metrics cannot be served at 127.0.0.1")


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            ([], "there is nothing to run"),
            (["x", "--entry", "32K"], "--entry and --mode are for flat binaries"),
            (["x", "--mode", "protected"], "--entry and --mode are for flat binaries"),
            (["--incoming", "unix:m", "--paused"], "--paused cannot hold a guest that arrives"),
            (["--incoming", "tls:host:1"], "tls:host:1 needs credentials"),
            (["--incoming", "tls::0", "--tls-creds", "/nowhere"], "'/nowhere/ca-cert.pem' cannot be read"),
            (["--incoming", "tcp::0", "--tls-creds", "/nowhere"], "tcp:127.0.0.1:0 would not be encrypted"),
            (["--incoming", "elsewhere"], "'elsewhere' is not a migration address"),
            (["--incoming", "unix:" + "x" * 108], "113 bytes|108 bytes long"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: list[str], cause: str, capfd: Capture) -> None:
        check_error(capfd, main(["run", *options]), 2, cause)

    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            (["--memory", "1Z"], "'1Z' is not a size"),
            (["--cpus", "0"], "0 is not in the range"),
            (["--cpus", "256"], "256 is not in the range"),
            (["--mode", "virtual"], "'virtual' is not one of 'real', 'protected', 'long'"),
            (["--dirty-log", "rings"], "'rings' is not one of 'legacy', 'manual', 'initially-set', 'ring'"),
            (["--accel", "tcg"], "'tcg' is not"),
            (["--metrics", "here"], "'here' is no place to serve metrics at; give a port, or a host and a port"),
        ],
    )
    def test_value_without_sense_is_refused(self, options: list[str], cause: str, capfd: Capture) -> None:
        assert main(["run", "x", *options]) == 2
        assert cause in capfd.readouterr().err


class TestBadMemory:
    @pytest.mark.parametrize("size", ["0", "1000", "4097"])
    def test_what_is_not_whole_pages_is_refused(self, image: str, size: str, capfd: Capture) -> None:
        cause = "not a positive whole number of 4096-byte pages"
        check_error(capfd, main(["run", image, "--memory", size]), 2, cause)

    @pytest.mark.parametrize("size", ["1E", "64P", "1000000000000T"])
    def test_more_than_the_host_can_map_is_refused(self, image: str, size: str, capfd: Capture) -> None:
        check_error(capfd, main(["run", image, "--memory", size]), 3, "the host cannot map")


class TestBadImage:
    @pytest.mark.parametrize(
        ("name", "cause"),
        [
            ("missing", "cannot be read: No such file"),
            (".", "cannot be read: Is a directory"),
            ("empty", "the image is empty"),
            ("large", "is larger than memory"),
            ("/dev/zero", "is larger than memory"),
            ("short", "not a boot sector"),
            ("unsigned", "not a boot sector"),
        ],
    )
    def test_it_is_refused(self, kvm: object, tmp_path: Path, capfd: Capture, name: str, cause: str) -> None:
        (tmp_path / "empty").touch()
        with (tmp_path / "large").open("wb") as file:
            file.truncate(MIB + 1)
        (tmp_path / "short").write_bytes(b"\xf4" * 511)
        (tmp_path / "unsigned").write_bytes(b"\xf4" * 512)
        qmp = tmp_path / "qmp"
        check_error(capfd, main(["run", str(tmp_path / name), "--memory", "1M", "--qmp", str(qmp)]), 2, cause)
        assert not qmp.exists()

    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            (["--load-address", "1M"], "does not fit in 1.0 MiB of memory at 0x100000"),
            (["--load-address", "0", "--entry", "1M"], "cannot be reached in real mode"),
            (["--load-address", "0", "--entry", "4G", "--mode", "protected"], "cannot be reached in protected mode"),
        ],
    )
    def test_flat_one_that_cannot_be_there_is_refused(
        self, flat: Callable[[bytes], str], options: list[str], cause: str, capfd: Capture
    ) -> None:
        check_error(capfd, main(["run", flat(b"\xf4"), "--memory", "1M", *options]), 2, cause)


class TestBadPaths:
    @pytest.fixture
    @staticmethod
    def taken(tmp_path: Path) -> Iterator[Path]:
        with socket.create_server(str(tmp_path / "taken"), family=socket.AF_UNIX):
            yield tmp_path / "taken"

    def test_qmp_path_in_use_is_refused(self, image: str, taken: Path, capfd: Capture) -> None:
        check_error(capfd, main(["run", image, "--memory", "4M", "--qmp", str(taken)]), 2, "already in use")
        assert taken.exists()

    def test_incoming_path_in_use_is_refused(self, taken: Path, capfd: Capture) -> None:
        check_error(capfd, main(["run", "--incoming", f"unix:{taken}"]), 2, "already in use")
        assert taken.exists()

    @pytest.mark.parametrize(("path", "status"), [("x" * 108, 2), ("", 2), ("/nonexistent/qmp", 3)])
    def test_qmp_path_that_cannot_be_is_refused(self, image: str, path: str, status: int, capfd: Capture) -> None:
        check_error(capfd, main(["run", image, "--memory", "4M", "--qmp", path]), status, "socket")

    def test_incoming_port_in_use_is_refused(self, capfd: Capture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            uri = f"tcp:127.0.0.1:{other.getsockname()[1]}"
            check_error(capfd, main(["run", "--incoming", uri]), 3, f"cannot listen at {uri}: Address already in use")

    def test_serial_path_that_cannot_be_written_is_refused(self, image: str, tmp_path: Path, capfd: Capture) -> None:
        check_error(capfd, main(["run", image, "--serial", str(tmp_path)]), 3, "cannot write serial output to")


class TestWithoutKVM:
    @pytest.fixture
    @staticmethod
    def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """What the machine takes for /dev/kvm."""
        device = tmp_path / "kvm"
        defaults = KVMMachine.__init__.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "device", str(device))
        monkeypatch.setattr(KVM.__init__, "__defaults__", (str(device),))
        return device

    def test_missing_device_is_reported_and_nothing_is_left(self, device: Path, tmp_path: Path, capfd: Capture) -> None:
        uri, qmp = f"unix:{tmp_path}/m", str(tmp_path / "qmp")
        check_error(capfd, main(["run", "--accel", "kvm", "--incoming", uri, "--qmp", qmp]), 3, str(device))
        assert not list(tmp_path.iterdir())

    def test_device_without_permission_is_reported(
        self, device: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_open = os.open

        def deny(path: str, *arguments: int, **options: int) -> int:
            if path == str(device):
                raise PermissionError(13, "Permission denied")
            return real_open(path, *arguments, **options)

        monkeypatch.setattr(os, "open", deny)
        check_error(capfd, main(["run", "--accel", "kvm", "x"]), 3, "permission")

    def test_other_device_is_reported(self, device: Path, capfd: Capture) -> None:
        device.touch()
        check_error(capfd, main(["run", "--accel", "kvm", "x"]), 3, "is not a KVM device")

    def test_emulator_is_taken_and_said_so(self, device: Path, here: Here, tmp_path: Path, capfd: Capture) -> None:
        (tmp_path / "sector").write_bytes(build(1 * MIB, 2 * MIB))
        assert here.run([str(tmp_path / "sector")], lambda _: here.wait_for("ABB")) == 0
        assert capfd.readouterr().err == f"dirtylog: there is no {device}: the guest runs in Unicorn, an emulator\n"

    def test_wish_for_a_dirty_log_is_one_for_kvm(self, device: Path, capfd: Capture) -> None:
        check_error(capfd, main(["run", "x", "--dirty-log", "manual"]), 3, f"there is no {device}")

    def test_several_vcpus_cannot_be_had(self, device: Path, capfd: Capture) -> None:
        assert main(["run", "x", "--cpus", "2"]) == 2
        assert "Unicorn runs one vCPU, not 2\n  remedy: use KVM for more" in capfd.readouterr().err


class TestUnicorn:
    @pytest.mark.parametrize("mode", ["real", "protected", "long"])
    def test_flat_image_starts_how_it_is_told(self, here: Here, tmp_path: Path, mode: str, capfd: Capture) -> None:
        (tmp_path / "flat").write_bytes(code(mode, "!"))
        options = ["--accel", "unicorn", "--load-address", "32K", "--mode", mode]
        assert here.run([str(tmp_path / "flat"), *options], lambda _: here.wait_for("!")) == 0
        assert capfd.readouterr() == ("", "")

    def test_guest_that_faults_ends_with_the_reason(self, tmp_path: Path, capfd: Capture) -> None:
        (tmp_path / "flat").write_bytes(code("protected", "!", _FAULT))
        options = ["--accel", "unicorn", "--load-address", "1M", "--mode", "protected", "--memory", "4M"]
        assert main(["run", str(tmp_path / "flat"), *options]) != 0
        out, err = capfd.readouterr()
        assert out == "!"
        assert "Unicorn cannot go on: Invalid instruction" in err

    def test_dirty_log_of_kvm_is_refused(self, capfd: Capture) -> None:
        check_error(capfd, main(["run", "x", "--accel", "unicorn", "--dirty-log", "manual"]), 2, "--dirty-log is KVM's")


def test_handlers_of_signals_are_put_back(image: str, capfd: Capture) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["run", image, "--memory", "4K"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "does not fit in 4.0 KiB" in capfd.readouterr().err


def test_help_fits_into_80_columns(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("run", "migrate", "guest"):
        assert main([name, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

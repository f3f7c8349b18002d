"""The commands as a client for QEMU sees them: the qemu.qmp package drives our machines, and QEMU beside them."""

import asyncio
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import pytest
from qemu.qmp import ExecuteError
from qemu.qmp import QMPClient as PeerClient
from support.checkpoints import Checkpoint, Moment, install
from support.fake_machine import FakeMachine
from support.guests import KVM_RAM, Guest, check_memory, check_runs_on, machine, wait_for_rounds
from support.require import require
from support.waiting import BOUND, wait_until

from dirtylog.control.commands import Commands, emit_events
from dirtylog.control.controller import Controller
from dirtylog.control.migration_commands import CAPABILITIES
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.errors import DirtylogError, GuestError
from dirtylog.machine import RunState
from dirtylog.memory import Client, TrackingReason
from dirtylog.memory.description import MemoryDescription
from dirtylog.migration import (
    Listener,
    parse_address,
)
from dirtylog.migration.batch import Batch
from dirtylog.migration.owed import OwedPages
from dirtylog.migration.protocol import Role
from dirtylog.units import MIB

QEMU: Final = shutil.which("qemu-system-x86_64")

_LAST_MESSAGE: Final = Checkpoint(Role.SOURCE, Moment.BEFORE_SENDING, "State")
"""The guest stands still, held by its migration."""


class Peer:
    """The qemu.qmp package's asyncio client, a step at a time."""

    def __init__(self, path: Path) -> None:
        self._runner = asyncio.Runner()
        self._client = PeerClient("peer")
        self._run(self._client.connect(str(path)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._run(self._client.disconnect())
        except EOFError:  # how it tells that the server was the first to hang up
            pass
        finally:
            self._runner.close()

    def _run(self, coroutine: Any) -> Any:
        return self._runner.run(asyncio.wait_for(coroutine, BOUND))

    def execute(self, command: str, **arguments: object) -> Any:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._run(self._client.execute(command, given))

    def refused(self, command: str, **arguments: object) -> ExecuteError:
        """The error of a command that must have one."""
        with pytest.raises(ExecuteError) as caught:
            self.execute(command, **arguments)
        return caught.value

    def event(self) -> tuple[str, Any]:
        """The next event, and its data."""
        event = self._run(self._client.events.get())
        return event["event"], event.get("data")

    def migration(self) -> Any:
        return self.execute("query-migrate")

    def wait_migrated(self, status: str = "completed") -> Any:
        """Ask until the migration has ended; every answer must be JSON, which knows no infinity."""
        answers = []

        def ended() -> bool:
            answers.append(self.migration())
            json.dumps(answers[-1], allow_nan=False)
            return answers[-1]["status"] in ("completed", "failed", "cancelled")

        wait_until(ended, "the migration ended")
        assert answers[-1]["status"] == status, answers[-1]
        return answers[-1]

    def events_until(self, last: tuple[str, Any]) -> list[tuple[str, Any]]:
        events = [self.event()]
        while events[-1] != last:
            events.append(self.event())
        return events


class Served:
    """A machine that answers QMP as in ``dirtylog run``."""

    def __init__(self, stack: ExitStack, path: Path, guest: Guest) -> None:
        self.guest = guest
        self.path = path
        self.failures: list[DirtylogError] = []
        self.controller = Controller(guest)
        stack.callback(self.controller.close)
        registry = CommandRegistry()
        Commands(self.controller).register(registry)
        self.server = QMPServer(path, registry, on_failure=self.failures.append)
        stack.callback(self.server.close)
        emit_events(self.controller, self.server)
        self.server.start()
        self.peer = stack.enter_context(Peer(path))


@contextmanager
def serve(path: Path, kind: str, *, boot: bool = True) -> Iterator[Served]:
    with ExitStack() as stack:
        served = Served(stack, path, stack.enter_context(machine(kind, boot=boot)))
        yield served
        assert served.failures == []


@pytest.fixture(params=["fake", "kvm"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    return str(request.param)


@pytest.fixture
def served(kind: str, tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path / "qmp", kind) as served:
        yield served


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Served]:
    """For what is the same whatever the machine."""
    with serve(tmp_path / "qmp", "fake") as served:
        yield served


@pytest.fixture
def peer(served: Served) -> Peer:
    return served.peer


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/migration"


@pytest.fixture
def destination(kind: str, uri: str, tmp_path: Path) -> Iterator[Served]:
    """Waits at the URI."""
    listener = Listener(parse_address(uri))
    try:
        with serve(tmp_path / "destination", kind, boot=False) as served:
            served.controller.receive(listener)
            yield served
    finally:
        listener.close()


@pytest.fixture
def silent(uri: str) -> Iterator[None]:
    """Somebody listens at the URI and never answers."""
    listener = Listener(parse_address(uri))
    yield
    listener.close()


class Gate:
    """Where the source's migration waits, with the guest in its hands, until the test has looked around."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        install(_LAST_MESSAGE, self._stand, monkeypatch.setattr)

    def _stand(self) -> None:
        self._reached.set()
        assert self._open.wait(BOUND)

    def wait(self) -> None:
        assert self._reached.wait(BOUND)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


class TestRunState:
    def test_status_is_in_qemus_words(self, peer: Peer) -> None:
        assert peer.execute("query-status") == {"running": False, "status": "prelaunch"}
        assert peer.execute("cont") == {}
        assert peer.execute("query-status") == {"running": True, "status": "running"}
        assert peer.execute("stop") == {}
        assert peer.execute("query-status") == {"running": False, "status": "paused"}

    def test_guest_runs_and_stops_as_told(self, served: Served) -> None:
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        served.peer.execute("stop")
        check_memory(served.guest)

    def test_stop_and_cont_are_told_once_each(self, peer: Peer) -> None:
        for command in ("stop", "cont", "cont", "stop", "stop", "cont"):
            assert peer.execute(command) == {}
        assert [peer.event() for _ in range(3)] == [("RESUME", None), ("STOP", None), ("RESUME", None)]

    def test_guest_that_ends_is_told_of(self, fake: Served) -> None:
        fake.peer.execute("cont")
        fake.guest._end(RunState.SHUTDOWN, GuestError("a triple fault"))
        with pytest.raises(GuestError):
            fake.controller.wait()
        assert [fake.peer.event() for _ in range(3)] == [
            ("RESUME", None),
            ("STOP", None),
            ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
        ]
        assert fake.peer.execute("query-status") == {"running": False, "status": "shutdown"}
        for command in ("cont", "migrate"):
            error = fake.peer.refused(command, **({"uri": "unix:x"} if command == "migrate" else {}))
            assert (error.error_class, "ended (shutdown)" in str(error)) == ("GenericError", True)

    def test_quit_is_answered_and_told_of_and_ends_the_wait(self, peer: Peer, served: Served) -> None:
        assert peer.execute("quit") == {}
        served.controller.wait()
        assert peer.event() == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})


class TestMigrate:
    def test_guest_moves_and_events_come_in_order(self, served: Served, destination: Served, uri: str) -> None:
        source = served.peer
        source.execute("cont")
        wait_for_rounds(served.guest)
        assert source.execute("migrate", uri=uri) == {}
        info = source.wait_migrated()

        assert source.events_until(("MIGRATION", {"status": "completed"})) == [
            ("RESUME", None),
            ("MIGRATION", {"status": "setup"}),
            ("MIGRATION", {"status": "active"}),
            ("STOP", None),
            ("MIGRATION", {"status": "device"}),
            ("MIGRATION", {"status": "completed"}),
        ]
        assert source.execute("query-status") == {"running": False, "status": "postmigrate"}
        assert destination.peer.event() == ("RESUME", None)
        assert destination.peer.execute("query-status") == {"running": True, "status": "running"}
        check_runs_on(destination.guest)
        self._check_report(info, served.guest)

    @staticmethod
    def _check_report(info: Any, guest: Guest) -> None:
        ram, passes = info["ram"], info["x-passes"]
        size = sum(block.size for block in guest.memory.blocks.values())
        assert (ram["total"], ram["remaining"], ram["page-size"]) == (size, 0, 4096)
        assert ram["normal-bytes"] == ram["normal"] * 4096 <= ram["transferred"]
        assert ram["normal"] + ram["duplicate"] >= size // 4096
        assert ram["dirty-sync-count"] == len(passes) >= 2
        assert [one["number"] for one in passes] == list(range(1, len(passes) + 1))
        assert sum(one["bytes"] for one in passes) == ram["transferred"]
        assert passes[0]["expected-downtime"] > 0
        assert passes[-1]["expected-downtime"] is None
        assert round(info["x-downtime-us"] / 1000) == info["downtime"] <= info["total-time"]
        parts = info["x-downtime-parts"]
        assert list(parts) == ["stop", "final-pass", "state", "handover"]
        assert sum(parts.values()) == pytest.approx(info["x-downtime-us"], abs=4)
        assert ram["precopy-bytes"] + ram["downtime-bytes"] == ram["transferred"]
        assert ram["downtime-bytes"] == passes[-1]["bytes"]
        assert info["x-ways"]["plain"]["pages"] == ram["normal"]
        assert "xbzrle-cache" not in info
        assert "expected-downtime" not in info
        assert "error-desc" not in info
        assert "x-digests" not in info

    def test_stopped_guest_arrives_stopped(self, served: Served, destination: Served, uri: str) -> None:
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        served.peer.execute("stop")
        served.peer.execute("migrate", uri=uri)
        served.peer.wait_migrated()
        wait_until(lambda: destination.guest.state is RunState.PAUSED, "the guest arrived")
        destination.peer.execute("cont")
        check_runs_on(destination.guest)

    def test_verified_migration_has_the_digest_of_each_block(
        self, served: Served, destination: Served, uri: str
    ) -> None:
        served.peer.execute("migrate-set-parameters", x_verify=True)
        served.peer.execute("migrate", uri=uri)
        info = served.peer.wait_migrated()
        assert info["x-digests"].keys() == served.guest.memory.blocks.keys()
        assert all(int(digest, 16) for digest in info["x-digests"].values())
        assert info["x-verify-us"] >= 0

    def test_guest_moves_with_its_memory_in_mode_cpr_transfer(
        self, served: Served, destination: Served, uri: str
    ) -> None:
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        served.peer.execute("migrate-set-parameters", mode="cpr-transfer")
        served.peer.execute("migrate", uri=uri)
        info = served.peer.wait_migrated()
        assert (info["ram"]["transferred"], info["x-passes"], info["ram"]["dirty-sync-count"]) == (0, [], 0)
        assert round(info["x-downtime-us"] / 1000) == info["downtime"] <= info["total-time"]
        wait_until(lambda: destination.guest.state is RunState.RUNNING, "the guest arrived")
        check_runs_on(destination.guest)

    def test_mode_cpr_transfer_with_several_channels_or_over_the_network_is_refused(
        self, fake: Served, uri: str
    ) -> None:
        fake.peer.execute("migrate-set-parameters", mode="cpr-transfer")
        assert "memory cannot be shared over tcp:" in str(fake.peer.refused("migrate", uri="tcp:127.0.0.1:1"))
        fake.peer.execute("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
        assert "needs no further channels" in str(fake.peer.refused("migrate", uri=uri))
        assert fake.peer.execute("query-migrate") == {}

    def test_guest_that_moved_may_be_taken_back_but_not_moved_again(
        self, served: Served, destination: Served, uri: str
    ) -> None:
        served.peer.execute("migrate", uri=uri)
        served.peer.wait_migrated()
        assert "migrated away already" in str(served.peer.refused("migrate", uri=uri))
        assert served.peer.execute("cont") == {}
        assert served.peer.execute("query-status")["status"] == "running"

    def test_nobody_there_fails_it_and_the_guest_runs_on(self, served: Served, uri: str) -> None:
        served.peer.execute("cont")
        assert served.peer.execute("migrate", uri=uri, detach=True) == {}
        info = served.peer.wait_migrated("failed")
        assert "cannot connect to the destination" in info["error-desc"]
        assert "downtime" not in info
        assert served.peer.events_until(("MIGRATION", {"status": "failed"})) == [
            ("RESUME", None),
            ("MIGRATION", {"status": "setup"}),
            ("MIGRATION", {"status": "failed"}),
        ]
        check_runs_on(served.guest)

    def test_second_one_is_refused_and_cancel_leaves_the_guest(self, fake: Served, silent: None, uri: str) -> None:
        peer = fake.peer
        peer.execute("cont")
        peer.execute("migrate", uri=uri)
        assert peer.migration()["status"] == "setup"
        error = peer.refused("migrate", uri=uri)
        assert (error.error_class, "a migration is under way" in str(error)) == ("GenericError", True)
        assert peer.execute("migrate_cancel") == {}
        assert "error-desc" not in peer.wait_migrated("cancelled")
        assert peer.events_until(("MIGRATION", {"status": "cancelled"}))[-2] == (
            "MIGRATION",
            {"status": "cancelling"},
        )
        check_runs_on(fake.guest)

    def test_cancel_without_a_migration_is_fine(self, fake: Served) -> None:
        assert fake.peer.execute("migrate_cancel") == {}
        assert fake.peer.migration() == {}

    @pytest.mark.parametrize(
        "bad", ["", "x", "exec:cat", "unix:", "tcp:host", "tcp:host:x", "unix:a\0b", "unix:" + "x" * 108]
    )
    def test_bad_uri_is_refused(self, fake: Served, bad: str) -> None:
        assert fake.peer.refused("migrate", uri=bad).error_class == "GenericError"
        assert fake.peer.migration() == {}

    def test_machine_in_the_hands_of_a_migration_is_left_alone(
        self, served: Served, destination: Served, uri: str, gate: Gate
    ) -> None:
        served.peer.execute("cont")
        served.peer.execute("migrate", uri=uri)
        gate.wait()
        assert served.peer.execute("query-status") == {"running": False, "status": "finish-migrate"}
        assert destination.peer.execute("query-status") == {"running": False, "status": "inmigrate"}
        for held in (served.peer, destination.peer):
            for command in ("stop", "cont"):
                error = held.refused(command)
                assert error.error_class == "GenericError"
                assert "in the hands of a migration" in str(error)
        assert "under way" in str(served.peer.refused("migrate", uri=uri))
        assert "not arrived" in str(destination.peer.refused("migrate", uri=uri))
        assert served.peer.migration()["status"] == "device"
        gate.open()
        served.peer.wait_migrated()
        check_runs_on(destination.guest)

    def test_cancel_brings_a_guest_back_that_stood_still_already(
        self, served: Served, destination: Served, uri: str, gate: Gate
    ) -> None:
        served.peer.execute("cont")
        served.peer.execute("migrate", uri=uri)
        gate.wait()
        served.peer.execute("migrate_cancel")
        gate.open()
        served.peer.wait_migrated("cancelled")
        assert [name for name, _ in served.peer.events_until(("MIGRATION", {"status": "cancelled"}))][-2] == "RESUME"
        check_runs_on(served.guest)


class TestParameters:
    DEFAULTS: Final = {
        "mode": "normal",
        "downtime-limit": 300,
        "max-bandwidth": 0,
        "max-postcopy-bandwidth": 0,
        "avail-switchover-bandwidth": 0,
        "multifd-channels": 2,
        "multifd-compression": "none",
        "xbzrle-cache-size": 64 * MIB,
        "throttle-trigger-threshold": 50,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "cpu-throttle-tailslow": False,
        "max-cpu-throttle": 99,
        "vcpu-dirty-limit": 1,
        "x-vcpu-dirty-limit-period": 1000,
        "tls-creds": "",
        "tls-hostname": "",
        "x-clear-chunk": 128 * MIB,
        "x-verify": False,
        "x-postcopy-after": 0,
    }

    def test_defaults_can_be_asked_for(self, fake: Served) -> None:
        assert fake.peer.execute("query-migrate-parameters") == self.DEFAULTS

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("mode", "cpr-transfer"),
            ("downtime-limit", 0),
            ("downtime-limit", 2_000_000),
            ("max-bandwidth", (1 << 63) - 1),
            ("max-postcopy-bandwidth", (1 << 63) - 1),
            ("avail-switchover-bandwidth", (1 << 63) - 1),
            ("multifd-channels", 1),
            ("multifd-channels", 64),
            ("multifd-compression", "zstd"),
            ("xbzrle-cache-size", 4096),
            ("throttle-trigger-threshold", 1),
            ("throttle-trigger-threshold", 100),
            ("cpu-throttle-initial", 1),
            ("cpu-throttle-initial", 99),
            ("cpu-throttle-increment", 1),
            ("cpu-throttle-increment", 99),
            ("cpu-throttle-tailslow", True),
            ("max-cpu-throttle", 20),
            ("vcpu-dirty-limit", 1000),
            ("x-vcpu-dirty-limit-period", 1),
            ("x-vcpu-dirty-limit-period", 999),
            ("tls-creds", "/etc/pki/dirtylog"),
            ("tls-hostname", "host.example.org"),
            ("x-clear-chunk", 1),
            ("x-verify", True),
            ("x-postcopy-after", 2),
        ],
    )
    def test_one_is_set_and_the_others_stay(self, fake: Served, name: str, value: object) -> None:
        assert fake.peer.execute("migrate-set-parameters", **{name: value}) == {}
        assert fake.peer.execute("query-migrate-parameters") == self.DEFAULTS | {name: value}

    def test_nothing_is_set_by_nothing(self, fake: Served) -> None:
        assert fake.peer.execute("migrate-set-parameters") == {}
        assert fake.peer.execute("query-migrate-parameters") == self.DEFAULTS

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("mode", "cpr-reboot"),
            ("mode", True),
            ("downtime-limit", -1),
            ("downtime-limit", 2_000_001),
            ("downtime-limit", 10**400),
            ("downtime-limit", 0.5),
            ("downtime-limit", "300"),
            ("downtime-limit", None),
            ("max-bandwidth", -1),
            ("max-bandwidth", 1 << 63),
            ("max-bandwidth", 10**400),
            ("max-bandwidth", True),
            ("avail-switchover-bandwidth", -1),
            ("avail-switchover-bandwidth", 1 << 63),
            ("multifd-channels", 0),
            ("multifd-channels", 65),
            ("multifd-channels", 256),
            ("multifd-compression", "zlib"),
            ("multifd-compression", "auto"),
            ("multifd-compression", True),
            ("xbzrle-cache-size", 0),
            ("xbzrle-cache-size", 4095),
            ("xbzrle-cache-size", 1 << 63),
            ("x-clear-chunk", 0),
            ("x-clear-chunk", 1 << 63),
            ("x-verify", 1),
            ("throttle-trigger-threshold", 0),
            ("throttle-trigger-threshold", 101),
            ("cpu-throttle-initial", 0),
            ("cpu-throttle-initial", 100),
            ("cpu-throttle-increment", 0),
            ("cpu-throttle-increment", 100),
            ("cpu-throttle-tailslow", 1),
            ("max-cpu-throttle", 100),
            ("max-cpu-throttle", 19),  # less than the first throttle
            ("vcpu-dirty-limit", 0),
            ("vcpu-dirty-limit", 1 << 32),
            ("x-vcpu-dirty-limit-period", 0),
            ("x-vcpu-dirty-limit-period", 1001),
            ("downtime_limit", 300),
        ],
    )
    def test_bad_one_is_refused_and_changes_nothing(self, fake: Served, name: str, value: object) -> None:
        error = self._set(fake.peer, {"x-verify": True, name: value})
        assert error.error_class == "GenericError"
        assert fake.peer.execute("query-migrate-parameters") == self.DEFAULTS

    @staticmethod
    def _set(peer: Peer, arguments: dict[str, object]) -> ExecuteError:
        with pytest.raises(ExecuteError) as caught:
            peer._run(peer._client.execute("migrate-set-parameters", arguments))
        return caught.value

    def test_change_reaches_the_migration_under_way(self, fake: Served, silent: None, uri: str) -> None:
        fake.peer.execute("migrate", uri=uri)
        fake.peer.execute("migrate-set-parameters", downtime_limit=1000)
        assert fake.controller.outgoing is not None
        assert fake.controller.outgoing.parameters.downtime_limit == 1.0

    def test_change_that_comes_too_late_is_refused(self, fake: Served, silent: None, uri: str) -> None:
        fake.peer.execute("migrate", uri=uri)
        for name, value in (
            ("x_verify", True),
            ("mode", "cpr-transfer"),
            ("x_clear_chunk", 1),
            ("multifd_compression", "zstd"),
        ):
            error = fake.peer.refused("migrate-set-parameters", **{name: value})
            assert (error.error_class, "under way" in str(error)) == ("GenericError", True)
        assert fake.peer.execute("query-migrate-parameters") == self.DEFAULTS
        fake.peer.execute("migrate-set-parameters", multifd_channels=3, xbzrle_cache_size=MIB)  # neither is on


class TestCapabilities:
    @staticmethod
    def _set(peer: Peer, **states: object) -> dict[str, object]:
        wanted = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        return {"capabilities": wanted}

    def test_all_are_off_at_first(self, fake: Served) -> None:
        answer = fake.peer.execute("query-migrate-capabilities")
        assert {one["capability"] for one in answer} == set(CAPABILITIES)
        assert not any(one["state"] for one in answer)

    def test_those_that_are_switched_on_are_on(self, fake: Served) -> None:
        assert fake.peer.execute("migrate-set-capabilities", **self._set(fake.peer, multifd=True, xbzrle=True)) == {}
        fake.peer.execute(
            "migrate-set-capabilities", **self._set(fake.peer, events=True, multifd=False, postcopy_ram=False)
        )
        on = {one["capability"] for one in fake.peer.execute("query-migrate-capabilities") if one["state"]}
        assert on == {"xbzrle", "events"}

    @pytest.mark.parametrize(
        ("name", "state", "cause"),
        [
            ("release-ram", True, "the capability 'release-ram' is not offered here"),
            ("rdma-pin-all", True, "the capability 'rdma-pin-all' is not offered here"),
            ("toaster", False, "there is no capability 'toaster'"),
            ("dirty-limit", True, "a machine of kind 'fake' does not know which vCPU writes"),
            ("multifd", 1, "invalid parameter"),
        ],
    )
    def test_one_that_cannot_be_had_is_refused_with_all_others(
        self, fake: Served, name: str, state: object, cause: str
    ) -> None:
        error = fake.peer.refused("migrate-set-capabilities", **self._set(fake.peer, xbzrle=True, **{name: state}))
        assert (error.error_class, cause in str(error)) == ("GenericError", True)
        assert not any(one["state"] for one in fake.peer.execute("query-migrate-capabilities"))

    def test_guest_is_slowed_down_in_one_way_only(self, fake: Served) -> None:
        assert isinstance(fake.guest, FakeMachine)
        fake.guest.can_limit = True
        both = self._set(fake.peer, auto_converge=True, dirty_limit=True)
        assert "exclude each other" in str(fake.peer.refused("migrate-set-capabilities", **both))
        fake.peer.execute("migrate-set-capabilities", **self._set(fake.peer, auto_converge=True))
        for one in ({"dirty_limit": True}, {"dirty_limit": True, "xbzrle": True}):
            error = fake.peer.refused("migrate-set-capabilities", **self._set(fake.peer, **one))
            assert (error.error_class, "exclude each other" in str(error)) == ("GenericError", True)
        on = {one["capability"] for one in fake.peer.execute("query-migrate-capabilities") if one["state"]}
        assert on == {"auto-converge"}
        other = self._set(fake.peer, auto_converge=False, dirty_limit=True)
        fake.peer.execute("migrate-set-capabilities", **other)

    def test_none_changes_while_a_migration_is_under_way(self, fake: Served, silent: None, uri: str) -> None:
        fake.peer.execute("migrate", uri=uri)
        error = fake.peer.refused("migrate-set-capabilities", **self._set(fake.peer, multifd=True))
        assert (error.error_class, "under way" in str(error)) == ("GenericError", True)

    def test_guest_moves_with_all_of_them_and_passes_are_told(
        self, served: Served, destination: Served, uri: str
    ) -> None:
        source = served.peer
        source.execute("migrate-set-capabilities", **self._set(source, multifd=True, xbzrle=True, events=True))
        source.execute("migrate-set-parameters", multifd_channels=3, multifd_compression="zstd", x_verify=True)
        source.execute("migrate-set-parameters", max_bandwidth=100 * MIB, avail_switchover_bandwidth=100 * MIB)
        source.execute("cont")
        wait_for_rounds(served.guest)
        source.execute("migrate", uri=uri)
        info = source.wait_migrated()
        events = source.events_until(("MIGRATION", {"status": "completed"}))
        passes = [data for name, data in events if name == "MIGRATION_PASS"]
        assert passes == [{"pass": number} for number in range(1, info["ram"]["dirty-sync-count"] + 1)]
        assert info["ram"]["multifd-bytes"] == info["ram"]["transferred"]
        assert info["xbzrle-cache"]["cache-size"] == 64 * MIB
        assert sum(way["pages"] for way in info["x-ways"].values()) == info["ram"]["normal"]
        check_runs_on(destination.guest)


@pytest.fixture
def real(kvm: object, tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path / "qmp", "kvm") as served:
        yield served


class TestPmemsave:
    @pytest.mark.parametrize(("val", "size"), [(0x7C00, 512), (MIB - 1, 2 * MIB + 2), (0, KVM_RAM), (KVM_RAM - 1, 1)])
    def test_file_holds_the_memory(self, real: Served, tmp_path: Path, val: int, size: int) -> None:
        real.peer.execute("pmemsave", val=val, size=size, filename=str(tmp_path / "saved"))
        assert (tmp_path / "saved").read_bytes() == real.guest.system.read(val, size)

    def test_nothing_is_an_empty_file(self, real: Served, tmp_path: Path) -> None:
        real.peer.execute("pmemsave", val=0, size=0, filename=str(tmp_path / "saved"))
        assert (tmp_path / "saved").read_bytes() == b""

    @pytest.mark.parametrize(("val", "size"), [(KVM_RAM, 1), (KVM_RAM - 1, 2), (0, 1 << 62), (1 << 64, 1), (10**30, 1)])
    def test_what_is_no_memory_is_refused_and_no_file_is_touched(
        self, real: Served, tmp_path: Path, val: int, size: int
    ) -> None:
        (tmp_path / "saved").write_text("precious")
        error = real.peer.refused("pmemsave", val=val, size=size, filename=str(tmp_path / "saved"))
        assert error.error_class == "GenericError"
        assert "there is no memory at 0x" in str(error)
        assert (tmp_path / "saved").read_text() == "precious"

    @pytest.mark.parametrize("filename", ["/", "/nonexistent/file", "", "/dev/full"])
    def test_file_that_cannot_be_written_is_refused_with_the_reason(self, real: Served, filename: str) -> None:
        error = real.peer.refused("pmemsave", val=0, size=4096, filename=filename)
        assert error.error_class == "GenericError"
        assert f"cannot write {filename!r}: " in str(error)

    def test_name_that_is_none_is_refused(self, real: Served) -> None:
        assert "cannot be the name of a file" in str(real.peer.refused("pmemsave", val=0, size=1, filename="a\0b"))

    @pytest.mark.parametrize(
        "arguments", [{}, {"val": -1, "size": 1, "filename": "x"}, {"val": 0, "size": -1, "filename": "x"}]
    )
    def test_bad_arguments_are_refused(self, fake: Served, arguments: dict[str, object]) -> None:
        assert fake.peer.refused("pmemsave", **arguments).error_class == "GenericError"

    def test_machine_without_physical_memory_is_refused(self, fake: Served) -> None:
        assert "has no physical memory" in str(fake.peer.refused("pmemsave", val=0, size=1, filename="x"))


class TestQueryMemory:
    def test_description_reads_back_as_it_was_made(self, served: Served) -> None:
        answer = served.peer.execute("x-query-memory")
        assert msgspec.convert(answer, MemoryDescription) == served.guest.memory.describe()
        assert [space["name"] for space in answer["address_spaces"]] == [
            space.name for space in served.guest.memory.address_spaces
        ]
        assert answer["tracking"] == []

    def test_what_is_logged_and_dirty_is_told_while_the_guest_runs(self, served: Served) -> None:
        memory = served.guest.memory
        memory.start_logging(TrackingReason.MIGRATION)
        for region in memory.ram_regions:
            region.snapshot_and_clear_dirty(0, region.size, Client.MIGRATION)
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        memory.sync_dirty_log()
        answer = served.peer.execute("x-query-memory")
        assert answer["tracking"] == ["migration"]
        ranges = [part for part in answer["address_spaces"][0]["ranges"] if part["kind"] in ("ram", "rom")]
        assert all(part["logging"] == ["migration"] for part in ranges)
        assert sum(part["dirty"]["migration"] for part in ranges) > 0
        memory.stop_logging(TrackingReason.MIGRATION)

    def test_arguments_are_refused(self, fake: Served) -> None:
        assert fake.peer.refused("x-query-memory", size=1).error_class == "GenericError"


@contextmanager
def _qemu(path: Path, *arguments: str) -> Iterator[Peer]:
    """QEMU with a small PC that needs no KVM; it is handed the listening socket, so nobody need wait for it."""
    require("qemu", QEMU, "qemu-system-x86_64 is not installed")
    assert QEMU is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        chardev = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
        plain = ["-nodefaults", "-display", "none", "-chardev", chardev, "-mon", "chardev=qmp,mode=control"]
        command = [QEMU, "-machine", "pc", "-accel", "tcg", "-m", "8", *plain, *arguments]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        with Peer(path) as peer:
            yield peer
            peer.execute("quit")
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Peer]:
    with _qemu(tmp_path / "qemu", "-S") as peer:
        yield peer


def _own(members: dict[str, Any]) -> dict[str, Any]:
    """Without what is dirtylog's own."""
    return {name: value for name, value in members.items() if not name.startswith("x-")}


def _check_same_shape(ours: dict[str, Any], qemus: dict[str, Any]) -> None:
    """What we have by a name of QEMU's is of QEMU's type. It may have more, having more to tell."""
    for name, value in _own(ours).items():
        assert name in qemus
        assert isinstance(value, type(qemus[name])) or {type(value), type(qemus[name])} == {int, float}, name
        if isinstance(value, dict):
            _check_same_shape(value, qemus[name])


class TestAsInQEMU:
    def test_states_of_a_source(self, fake: Served, qemu: Peer, kind_of_destination: str) -> None:
        ours = self._states(fake.peer, kind_of_destination)
        assert ours == self._states(qemu, "exec:cat >/dev/null")

    @staticmethod
    def _states(peer: Peer, uri: str) -> list[Any]:
        states = []
        for command in ("query-migrate", "stop", "cont", "cont", "stop", "migrate_cancel", "migrate", "cont"):
            peer.execute(command, **({"uri": uri} if command == "migrate" else {}))
            if command == "migrate":
                peer.wait_migrated()
                assert peer.refused("migrate", uri=uri).error_class == "GenericError"
            status = peer.execute("query-status")
            states.append((command, status["status"], status["running"]))
        return states

    @pytest.fixture
    def kind_of_destination(self, tmp_path: Path, uri: str) -> Iterator[str]:
        listener = Listener(parse_address(uri))
        try:
            with serve(tmp_path / "destination", "fake", boot=False) as served:
                served.controller.receive(listener)
                yield uri
        finally:
            listener.close()

    def test_state_of_a_destination(self, tmp_path: Path, fake: Served, kind_of_destination: str) -> None:
        with _qemu(tmp_path / "qemu", "-incoming", f"unix:{tmp_path}/qemu-migration") as peer:
            theirs = peer.execute("query-status")
        with Peer(tmp_path / "destination") as peer:
            ours = peer.execute("query-status")
        _check_same_shape(ours, theirs)
        assert ours["status"] == theirs["status"] == "inmigrate"

    def test_completed_migration_is_described_alike(self, fake: Served, qemu: Peer, kind_of_destination: str) -> None:
        fake.peer.execute("migrate", uri=kind_of_destination)
        qemu.execute("migrate", uri="exec:cat >/dev/null")
        ours, theirs = fake.peer.wait_migrated(), qemu.wait_migrated()
        _check_same_shape(ours, theirs)
        assert _own(ours).keys() == theirs.keys()

    def test_failed_migration_is_described_alike(self, fake: Served, qemu: Peer, tmp_path: Path) -> None:
        for peer in (fake.peer, qemu):
            peer.execute("migrate", uri=f"unix:{tmp_path}/nobody")
        ours, theirs = fake.peer.wait_migrated("failed"), qemu.wait_migrated("failed")
        assert theirs.keys() <= ours.keys()
        _check_same_shape({name: ours[name] for name in theirs}, theirs)

    def test_parameters_have_its_names_and_types(self, fake: Served, qemu: Peer) -> None:
        ours, theirs = (peer.execute("query-migrate-parameters") for peer in (fake.peer, qemu))
        if "avail-switchover-bandwidth" not in theirs:  # before QEMU 8.2
            for name in ("mode", "avail-switchover-bandwidth", "vcpu-dirty-limit", "x-vcpu-dirty-limit-period"):
                del ours[name]
        _check_same_shape(ours, theirs)

    def test_capabilities_are_all_that_it_has(self, fake: Served, qemu: Peer) -> None:
        ours, theirs = (
            [one["capability"] for one in peer.execute("query-migrate-capabilities")] for peer in (fake.peer, qemu)
        )
        assert set(theirs) <= set(ours)
        assert [name for name in ours if name in theirs] == theirs

    def test_differences_are_described_alike(self, fake: Served, qemu: Peer, kind_of_destination: str) -> None:
        on = [{"capability": "xbzrle", "state": True}]
        for peer, uri in ((fake.peer, kind_of_destination), (qemu, "exec:cat >/dev/null")):
            peer.execute("migrate-set-capabilities", capabilities=on)
            peer.execute("migrate", uri=uri)
        ours, theirs = fake.peer.wait_migrated(), qemu.wait_migrated()
        _check_same_shape(ours, theirs)
        assert ours["xbzrle-cache"].keys() == theirs["xbzrle-cache"].keys()

    @pytest.mark.parametrize(
        ("command", "arguments"),
        [
            ("migrate", {}),
            ("migrate", {"uri": 17}),
            ("migrate", {"uri": "nonsense"}),
            ("migrate", {"uri": "unix:x", "nonsense": 1}),
            ("migrate_cancel", {"nonsense": 1}),
            ("query-migrate", {"nonsense": 1}),
            ("query-status", {"nonsense": 1}),
            ("stop", {"nonsense": 1}),
            ("cont", {"nonsense": 1}),
            ("quit", {"nonsense": 1}),
            ("pmemsave", {"val": 0, "size": 1}),
            ("pmemsave", {"val": "0", "size": 1, "filename": "/dev/null"}),
            ("pmemsave", {"val": 0, "size": 1, "filename": "/nonexistent/file"}),
            ("migrate-set-parameters", {"downtime-limit": -1}),
            ("migrate-set-parameters", {"downtime-limit": 2_000_001}),
            ("migrate-set-parameters", {"downtime-limit": "300"}),
            ("migrate-set-parameters", {"downtime-limit": 0.5}),
            ("migrate-set-parameters", {"nonsense": 1}),
            ("migrate-set-parameters", {"multifd-channels": 0}),
            ("migrate-set-parameters", {"multifd-compression": "nonsense"}),
            ("migrate-set-parameters", {"xbzrle-cache-size": 4095}),
            ("migrate-set-capabilities", {}),
            ("migrate-set-capabilities", {"capabilities": {}}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "multifd"}]}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "nonsense", "state": True}]}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "multifd", "state": 1}]}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "multifd", "state": True, "x": 1}]}),
            ("query-migrate-capabilities", {"nonsense": 1}),
            ("migrate-cancel", {}),
        ],
    )
    def test_error_has_its_class(self, pair: tuple[Peer, Peer], command: str, arguments: dict[str, object]) -> None:
        ours, theirs = (peer.refused(command, **arguments) for peer in pair)
        assert ours.error_class == theirs.error_class

    @pytest.fixture(scope="class")
    @staticmethod
    def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Peer, Peer]]:
        """A machine of ours and QEMU, for many requests that change nothing."""
        folder = tmp_path_factory.mktemp("pair")
        with serve(folder / "qmp", "fake") as served, _qemu(folder / "qemu", "-S") as peer:
            yield served.peer, peer


class TestPostcopy:
    """Commands about a guest that runs before its memory is there."""

    @staticmethod
    def _switch_on(peer: Peer, *names: str) -> None:
        peer.execute("migrate-set-capabilities", capabilities=[{"capability": one, "state": True} for one in names])

    def test_commands_without_such_a_migration_are_refused(self, fake: Served) -> None:
        for command, arguments, cause in (
            ("migrate-start-postcopy", {}, "there is no migration to be handed over"),
            ("migrate-continue", {"state": "pre-switchover"}, "there is no migration to be continued"),
            ("migrate-pause", {}, "there is no migration to be paused"),
            ("migrate-recover", {"uri": "unix:x"}, "no migration to here can be recovered"),
            ("migrate", {"uri": "unix:x", "resume": True}, "there is no migration to be resumed"),
        ):
            error = fake.peer.refused(command, **arguments)
            assert (error.error_class, cause in str(error)) == ("GenericError", True), str(error)

    def test_precopy_can_be_neither_handed_over_early_nor_paused(self, fake: Served, silent: None, uri: str) -> None:
        fake.peer.execute("migrate", uri=uri)
        for command, arguments, cause in (
            ("migrate-start-postcopy", {}, "cannot hand its guest over before all of its memory"),
            ("migrate-continue", {"state": "pre-switchover"}, "does not wait before its switchover"),
            ("migrate-pause", {}, "only postcopy can be paused"),
            ("migrate", {"uri": uri, "resume": True}, "only postcopy that was paused can be resumed"),
        ):
            assert cause in str(fake.peer.refused(command, **arguments))

    def test_other_state_than_the_one_that_waits_cannot_be_continued(self, fake: Served) -> None:
        assert "invalid parameter" in str(fake.peer.refused("migrate-continue", state="device"))

    def test_guest_waits_stopped_before_the_switchover_until_told_to_go_on(
        self, served: Served, destination: Served, uri: str
    ) -> None:
        self._switch_on(served.peer, "pause-before-switchover")
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        served.peer.execute("migrate", uri=uri)
        wait_until(lambda: served.peer.migration()["status"] == "pre-switchover", "it waits")
        assert served.peer.execute("query-status") == {"running": False, "status": "finish-migrate"}
        served.peer.execute("migrate-continue", state="pre-switchover")
        served.peer.wait_migrated()
        wait_until(lambda: destination.guest.state is RunState.RUNNING, "the guest arrived")
        check_runs_on(destination.guest)

    def test_cancel_before_the_switchover_lets_the_guest_run_on(  # M2
        self, served: Served, destination: Served, uri: str
    ) -> None:
        self._switch_on(served.peer, "pause-before-switchover")
        served.peer.execute("cont")
        wait_for_rounds(served.guest)
        served.peer.execute("migrate", uri=uri)
        wait_until(lambda: served.peer.migration()["status"] == "pre-switchover", "it waits")
        served.peer.execute("migrate_cancel")
        served.peer.wait_migrated("cancelled")
        check_runs_on(served.guest)
        destination.failures.clear()


class TestPostcopyUnderWay:
    """A guest whose memory comes after it, as far as the test lets it."""

    @pytest.fixture(params=["patient", "kvm"])
    @staticmethod
    def kind(request: pytest.FixtureRequest) -> str:
        if request.param == "kvm":
            request.getfixturevalue("kvm")
        return str(request.param)

    @pytest.fixture
    @staticmethod
    def let_come(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """What is sent in order waits for it; what the guest asks for does not."""
        let = threading.Event()
        take = OwedPages.take

        def held(owed: OwedPages) -> Batch | None:
            assert let.wait(BOUND), "nobody let it come"
            return take(owed)

        monkeypatch.setattr(OwedPages, "take", held)
        yield let
        let.set()

    def test_guest_is_handed_over_paused_and_resumed_and_events_come_in_order(  # D1, M1, M8
        self, served: Served, destination: Served, uri: str, tmp_path: Path, let_come: threading.Event
    ) -> None:
        source, there = served.peer, destination.peer
        on = [{"capability": one, "state": True} for one in ("postcopy-ram", "pause-before-switchover")]
        source.execute("migrate-set-capabilities", capabilities=on)
        source.execute("migrate-set-parameters", downtime_limit=0)
        source.execute("cont")
        wait_for_rounds(served.guest)
        assert there.execute("query-migrate") == {}
        assert source.execute("migrate", uri=uri) == {}
        assert source.execute("migrate-start-postcopy") == {}
        wait_until(lambda: source.migration()["status"] == "pre-switchover", "it waits")
        assert there.migration()["x-remaining"] == 0
        assert source.execute("migrate-continue", state="pre-switchover") == {}
        self._wait(source, there, "postcopy-active")
        assert 0 < there.migration()["x-remaining"] <= sum(block.size for block in served.guest.memory.blocks.values())
        assert source.execute("migrate-pause") == {}
        let_come.set()  # whoever sends finds the connection lost
        self._wait(source, there, "postcopy-paused")
        again = f"unix:{tmp_path}/again"
        assert there.execute("migrate-recover", uri=again) == {}
        assert source.execute("migrate", uri=again, resume=True) == {}
        source.wait_migrated()
        wait_until(lambda: there.migration()["status"] == "completed", "all of memory came")
        check_runs_on(destination.guest)

        begins, ends = ["setup", "active"], ["postcopy-active", "postcopy-paused", "postcopy-recover"]
        assert self._told(source) == [
            "RESUME",
            *begins,
            "STOP",
            "pre-switchover",
            "device",
            *ends,
            ends[0],
            "completed",
        ]
        assert self._told(there)[:6] == ["RESUME", *ends, ends[0], "completed"]

    @staticmethod
    def _wait(source: Peer, there: Peer, status: str) -> None:
        wait_until(lambda: source.migration()["status"] == status, f"the source was {status}")
        wait_until(lambda: there.migration()["status"] == status, f"the destination was {status}")

    @staticmethod
    def _told(peer: Peer) -> list[str]:
        """Its events, a migration's by their status."""
        events = peer.events_until(("MIGRATION", {"status": "completed"}))
        return [data["status"] if name == "MIGRATION" else name for name, data in events]

    def test_destination_that_gives_up_leaves_the_guest_to_who_cancels_the_source(  # M1
        self, served: Served, destination: Served, uri: str, let_come: threading.Event
    ) -> None:
        source, there = served.peer, destination.peer
        source.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        source.execute("migrate-set-parameters", downtime_limit=0)
        source.execute("cont")
        wait_for_rounds(served.guest)
        source.execute("migrate", uri=uri)
        source.execute("migrate-start-postcopy")
        self._wait(source, there, "postcopy-active")
        destination.controller.close()
        let_come.set()
        wait_until(lambda: source.migration()["status"] == "postcopy-paused", "the source knew")
        assert "in the hands of a migration" in str(source.refused("cont"))
        source.execute("migrate_cancel")
        assert "was not sent" in source.wait_migrated("failed")["error-desc"]
        source.execute("cont")
        check_runs_on(served.guest)

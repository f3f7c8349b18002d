import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from msgspec import UNSET
from support.processes import Run, dirtylog
from support.terminal import Terminal

from dirtylog.cli import migrate
from dirtylog.cli.main import main
from dirtylog.control.machine_commands import StatusInfo
from dirtylog.control.migration_commands import CapabilitiesArguments, MigrateArguments, MigrationParameters
from dirtylog.control.migration_info import MigrationInfo, PassInfo, RAMInfo
from dirtylog.control.qmp import CommandRegistry, NoArguments, QMPServer
from dirtylog.errors import UsageError
from dirtylog.guests.dirtier import build
from dirtylog.units import GIB, MIB, PAGE_SIZE

_URI: Final = "unix:/nowhere/at-all"


def info(status: str, passes: int = 0, **changes: Any) -> MigrationInfo:
    """What query-migrate tells."""
    made = MigrationInfo(
        status=status,
        total_time=1500,
        setup_time=1,
        ram=RAMInfo(
            transferred=passes * MIB,
            remaining=512 * PAGE_SIZE,
            total=GIB,
            duplicate=1000,
            normal=passes * 256,
            normal_bytes=passes * MIB,
            dirty_pages_rate=256,
            mbps=800.0,
            dirty_sync_count=passes,
            page_size=PAGE_SIZE,
            pages_per_second=25_000,
            multifd_bytes=0,
            precopy_bytes=passes * MIB,
            downtime_bytes=0,
        ),
        x_passes=[PassInfo(n + 1, 256, 0, MIB, 0.01, 0.0, 40, 1e8, 0.012) for n in range(passes)],
    )
    return msgspec.structs.replace(made, **changes)


SETUP: Final = info("setup")
ACTIVE: Final = info("active", 1)
COMPLETED: Final = info("completed", 3, downtime=12, x_downtime_us=12_345)
CANCELLED: Final = info("cancelled", 1)


class Script:
    """A QMP server that plays a migration: each query-migrate tells the next of ``stages``, and the last for ever."""

    def __init__(self, path: Path) -> None:
        self.before: MigrationInfo | None = None
        self.stages: list[MigrationInfo] = [SETUP, ACTIVE, info("active", 2), COMPLETED]
        self.on_query: Callable[[int], None] = lambda number: None
        self.on_cancel: Callable[[], None] = lambda: None
        self.refusal: UsageError | None = None
        self.state = "running"
        self.commands: list[str] = []
        self.parameters: MigrationParameters | None = None
        self.capabilities: dict[str, bool] = {}
        self._begun = False
        self._queries = 0
        registry = CommandRegistry()
        registry.add("migrate-set-parameters", MigrationParameters, self._set_parameters)
        registry.add("migrate-set-capabilities", CapabilitiesArguments, self._set_capabilities)
        registry.add("migrate", MigrateArguments, self._migrate)
        registry.add("query-migrate", NoArguments, self._query)
        registry.add("migrate-start-postcopy", NoArguments, lambda _: self.commands.append("migrate-start-postcopy"))
        registry.add("migrate_cancel", NoArguments, self._cancel)
        registry.add("query-status", NoArguments, lambda _: StatusInfo(self.state == "running", self.state))
        self.server = QMPServer(path, registry)

    def _set_parameters(self, parameters: MigrationParameters) -> None:
        self.commands.append("migrate-set-parameters")
        self.parameters = parameters

    def _set_capabilities(self, arguments: CapabilitiesArguments) -> None:
        self.commands.append("migrate-set-capabilities")
        self.capabilities |= {one.capability: one.state for one in arguments.capabilities}

    def _migrate(self, arguments: MigrateArguments) -> None:
        self.commands.append(f"migrate {arguments.uri}" + (" resume" if arguments.resume else ""))
        if self.refusal is not None:
            raise self.refusal
        self._begun = True

    def _query(self, _: NoArguments) -> MigrationInfo | None:
        if not self._begun:
            return self.before
        self._queries += 1
        self.on_query(self._queries)
        return self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]

    def _cancel(self, _: NoArguments) -> None:
        self.commands.append("migrate_cancel")
        self.on_cancel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def script(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(migrate, "_POLL_SECONDS", 0.005)
    script = Script(path)
    with script.server:
        script.server.start()
        yield script


@pytest.fixture
def run(path: Path) -> Callable[..., int]:
    return lambda *options: main(["migrate", str(path), _URI, *options])


Capture = pytest.CaptureFixture[str]
RunMigrate = Callable[..., int]


_DEFAULTS: Final = MigrationParameters(
    mode="normal",
    downtime_limit=300,
    max_bandwidth=0,
    max_postcopy_bandwidth=0,
    avail_switchover_bandwidth=0,
    multifd_channels=1,
    multifd_compression="zstd",
    xbzrle_cache_size=64 * MIB,
    x_clear_chunk=128 * MIB,
    x_verify=False,
    x_postcopy_after=0,
)


class TestParameters:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ([], {}),
            (["--max-downtime", "1.5s"], {"downtime_limit": 1500}),
            (["--max-downtime", "2000s"], {"downtime_limit": 2_000_000}),
            (["--bandwidth", "1G"], {"max_bandwidth": GIB}),
            (["--bandwidth", "10Gbit"], {"max_bandwidth": 1_250_000_000}),
            (["--postcopy-bandwidth", "10Gbit"], {"max_postcopy_bandwidth": 1_250_000_000}),
            (["--switchover-bandwidth", "1Gbit"], {"avail_switchover_bandwidth": 125_000_000}),
            (["--clear-chunk", "4M"], {"x_clear_chunk": 4 * MIB}),
            (["--channels", "3"], {"multifd_channels": 3}),
            (["--compression", "none"], {"multifd_compression": "none"}),
            (["--compression", "auto"], {"multifd_compression": "zstd"}),
            (["--delta-cache", "1G"], {"xbzrle_cache_size": GIB}),
            (["--delta-cache", "0"], {"xbzrle_cache_size": UNSET}),
            (["--local"], {"mode": "cpr-transfer"}),
            (["--verify"], {"x_verify": True}),
            (["--auto-converge"], {}),
            (["--dirty-limit", "50M"], {"vcpu_dirty_limit": 50}),
            (["--dirty-limit", "1M/s"], {"vcpu_dirty_limit": 1}),
            (["--postcopy-after", "3"], {"x_postcopy_after": 3}),
        ],
    )
    def test_options_set_them(
        self, script: Script, run: RunMigrate, options: Sequence[str], expected: dict[str, Any]
    ) -> None:
        assert run(*options) == 0
        assert script.parameters == msgspec.structs.replace(_DEFAULTS, **expected)
        assert script.capabilities == {
            "multifd": "--channels" in options,
            "xbzrle": expected.get("xbzrle_cache_size") is not UNSET,
            "auto-converge": "--auto-converge" in options,
            "dirty-limit": "--dirty-limit" in options,
            "postcopy-ram": "--postcopy-after" in options,
        }
        assert script.commands == ["migrate-set-parameters", "migrate-set-capabilities", f"migrate {_URI}"]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--tls-creds", "/etc/pki"], {"tls_creds": "/etc/pki"}),
            (["--tls-creds", "pki"], {"tls_creds": f"{os.getcwd()}/pki"}),
            (["--tls-hostname", "host"], {"tls_hostname": "host"}),
            (["--tls-creds", "", "--tls-hostname", ""], {"tls_creds": "", "tls_hostname": ""}),
            ([], {}),
        ],
    )
    def test_credentials_are_named_to_the_machine_as_it_can_find_them(
        self, script: Script, path: Path, options: Sequence[str], expected: dict[str, Any]
    ) -> None:
        assert main(["migrate", str(path), "tls:host:1", *options]) == 0
        assert script.parameters == msgspec.structs.replace(_DEFAULTS, **expected)

    @pytest.mark.parametrize("uri", ["tcp:host:1", "unix:x", "file:x"])
    @pytest.mark.parametrize("option", ["--tls-creds", "--tls-hostname"])
    def test_credentials_that_would_not_be_used_are_refused(
        self, script: Script, path: Path, uri: str, option: str, capsys: Capture
    ) -> None:
        assert main(["migrate", str(path), uri, option, "x"]) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"dirtylog: error: {uri} is not encrypted, whatever the credentials",
            "  remedy: migrate to tls:HOST:PORT",
        ]
        assert script.commands == []

    @pytest.mark.parametrize(
        ("options", "cause"),
        [
            (["--max-downtime", "300"], "'300' is not a duration; write one like 300ms, 2s or 1min"),
            (["--max-downtime", "-1s"], "'-1s' is not a duration"),
            (["--max-downtime", "1h"], "a downtime limit of 3600.0 s\n  remedy: it may be 0 to 2000 s"),
            (["--bandwidth", "fast"], "'fast' is not a rate; write one like 128M (bytes a second) or 10Gbit"),
            (["--bandwidth", "16E"], f"a bandwidth of {1 << 64} bytes a second\n  remedy: 0 means no limit"),
            (["--clear-chunk", "big"], "'big' is not a size"),
            (["--channels", "0"], "0 channels\n  remedy: 1 to 64 can be had"),
            (["--channels", "65"], "65 channels\n"),
            (["--channels", "many"], "'many' is not a valid integer"),
            (["--compression", "zip"], "'zip' is not one of 'none', 'auto'"),
            (["--delta-cache", "1K"], "a cache of 1024 bytes\n  remedy: 64M is usual; 0 means none"),
            (["--switchover-bandwidth", "fast"], "'fast' is not a rate"),
            (["--clear-chunk", "0"], "a clear chunk of 0 bytes\n  remedy: 128M is usual"),
            (["--dirty-limit", "0"], "a dirty limit of 0 MiB/s\n  remedy: 1 MiB/s is the lowest"),
            (["--dirty-limit", "1000K"], "a dirty limit of 1024000 bytes a second\n  remedy: give whole MiB/s"),
            (["--dirty-limit", "5M", "--auto-converge"], "exclude each other\n  remedy: leave one of them out"),
            (["--local", "--channels", "2"], "--local needs no further channels\n  remedy: leave one of them out"),
        ],
    )
    def test_bad_ones_are_refused_before_the_machine_hears_of_them(
        self, script: Script, run: RunMigrate, capsys: Capture, options: Sequence[str], cause: str
    ) -> None:
        assert run(*options) == 2
        assert cause in capsys.readouterr().err
        assert script.commands == []

    def test_local_hand_over_needs_a_unix_socket(self, script: Script, path: Path, capsys: Capture) -> None:
        assert main(["migrate", str(path), "tcp:host:1", "--local"]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "dirtylog: error: --local cannot hand memory over at tcp:host:1",
            "  remedy: use unix:PATH on both sides",
        ]
        assert script.commands == []

    @pytest.mark.parametrize("uri", ["", "elsewhere", "exec:cat", "tcp:host", "unix:" + "x" * 108])
    def test_bad_uri_is_refused_before_the_machine_hears_of_it(
        self, script: Script, path: Path, uri: str, capsys: Capture
    ) -> None:
        assert main(["migrate", str(path), uri]) == 2
        cause, remedy = capsys.readouterr().err.splitlines()
        assert cause.startswith("dirtylog: error: ")
        assert remedy.startswith("  remedy: ")
        assert script.commands == []


class TestProgress:
    def test_without_a_terminal_each_change_is_a_line(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [SETUP, ACTIVE, ACTIVE, ACTIVE, info("active", 2), info("device", 3), COMPLETED]
        assert run() == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert [line.split("  ")[:2] for line in lines[:5]] == [
            ["status setup", "pass 0"],
            ["status active", "pass 1"],
            ["status active", "pass 2"],
            ["status device", "pass 3"],
            ["status completed", "pass 3"],
        ]
        assert lines[5].split() == ["expected"]
        assert lines[-1].split() == ["bytes", "3.0", "MiB"]
        assert "\x1b" not in out
        assert err == ""

    def test_on_a_terminal_it_is_shown_in_place_and_the_report_stays(
        self, script: Script, run: RunMigrate, terminal: "Terminal"
    ) -> None:
        script.on_query = lambda number: terminal.wait_for("expected downtime") if number == 3 else None
        with terminal:
            assert run() == 0
        assert "\x1b[2K" in terminal.text  # a line is erased, to be written anew
        progress, _, report = terminal.text.rpartition("\x1b[2K")
        assert "dirty rate" in progress
        assert "dirty rate" not in report
        assert "total time" in report

    def test_terminal_that_cannot_move_its_cursor_gets_lines(
        self, script: Script, run: RunMigrate, terminal: "Terminal", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "dumb")
        with terminal:
            assert run() == 0
        assert "status active  pass 2  pages left 512" in terminal.text
        assert "\x1b" not in terminal.text

    def test_text_of_the_machine_is_no_markup(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [info("[bold]:smile:"), COMPLETED]
        assert run() == 0
        assert "status [bold]:smile:" in capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


class TestJSON:
    def test_it_is_the_last_query_migrate_and_nothing_else(
        self, script: Script, run: RunMigrate, capsys: Capture
    ) -> None:
        assert run("--json") == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == msgspec.to_builtins(COMPLETED)
        assert err == ""

    def test_nothing_is_printed_on_a_terminal_but_it(self, script: Script, run: RunMigrate, terminal: Terminal) -> None:
        with terminal:
            assert run("--json") == 0
        assert json.loads(terminal.text)["status"] == "completed"

    def test_failure_prints_none(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [info("failed", error_desc="no reason")]
        assert run("--json") == 5
        assert capsys.readouterr().out == ""


class TestFailure:
    def test_failed_migration_says_why_and_where_the_guest_is(
        self, script: Script, run: RunMigrate, capsys: Capture
    ) -> None:
        script.stages = [SETUP, info("failed", error_desc="the destination gave up: no memory; give it some")]
        assert run() == 5
        assert capsys.readouterr().err == (
            "dirtylog: error: the migration failed, the guest is running on the source: "
            "the destination gave up: no memory; give it some\n"
        )

    def test_refused_migration_says_why(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.refusal = UsageError("the guest was migrated away already", remedy="'cont' takes it back")
        assert run() == 5
        assert capsys.readouterr().err == (
            "dirtylog: error: the guest was migrated away already; 'cont' takes it back\n"
        )

    @pytest.mark.parametrize("status", ["setup", "active", "device", "cancelling"])
    def test_migration_under_way_is_left_alone(
        self, script: Script, run: RunMigrate, capsys: Capture, status: str
    ) -> None:
        script.before = info(status)
        assert run() == 2
        cause, remedy = capsys.readouterr().err.splitlines()
        assert cause == f"dirtylog: error: the guest is being migrated already ({status})"
        assert remedy.startswith("  remedy: wait for that migration")
        assert script.commands == []

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
    def test_earlier_migration_is_no_hindrance(self, script: Script, run: RunMigrate, status: str) -> None:
        script.before = info(status)
        assert run() == 0

    def test_server_of_another_kind_is_reported(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [msgspec.structs.replace(SETUP, ram=None)]
        assert run() == 5
        err = capsys.readouterr().err
        assert "dirtylog: error: the QMP server does not describe migrations as dirtylog does" in err
        assert "ram" in err

    def test_machine_that_goes_away_is_reported(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        def leave(number: int) -> None:
            if number == 2:
                threading.Thread(target=script.server.close).start()

        script.stages = [ACTIVE]
        script.on_query = leave
        assert run() == 5
        assert "dirtylog: error: the QMP server at" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "status", "cause"),
        [
            ("missing", 5, "there is no QMP socket"),
            ("file", 5, "nobody listens on the QMP socket"),
            ("deaf", 5, "nobody listens on the QMP socket"),
            ("x" * 108, 2, "bytes long"),
            ("", 2, "cannot be the path of a socket"),
        ],
    )
    def test_path_that_is_no_qmp_socket_is_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str, status: int, cause: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("file").touch()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind("deaf")
        assert main(["migrate", name, _URI]) == status
        shown, remedy = capsys.readouterr().err.splitlines()
        assert shown.startswith("dirtylog: error: ")
        assert cause in shown
        assert remedy.startswith("  remedy: ")


class TestCancel:
    @pytest.fixture(autouse=True)
    @staticmethod
    def _handler() -> Iterator[None]:
        """Whoever handled SIGINT before does so again afterwards."""
        before = signal.getsignal(signal.SIGINT)
        yield
        assert signal.getsignal(signal.SIGINT) is before

    @staticmethod
    def _press_ctrl_c(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def test_ctrl_c_cancels_and_says_where_the_guest_is(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [ACTIVE]
        script.on_query = self._press_ctrl_c
        script.on_cancel = lambda: script.stages.extend([info("cancelling", 1), CANCELLED])
        assert run() == 130
        assert capsys.readouterr().err == (
            "dirtylog: error: the migration was cancelled; the guest is running on the source\n"
        )
        assert script.commands[-1] == "migrate_cancel"

    def test_impatience_does_not_lose_the_answer(self, script: Script, run: RunMigrate, capsys: Capture) -> None:
        script.stages = [ACTIVE]
        script.on_query = lambda number: os.kill(os.getpid(), signal.SIGINT) if number in (2, 3, 4) else None
        script.on_cancel = lambda: script.stages.extend([info("cancelling", 1)] * 5 + [CANCELLED])
        script.state = "paused"
        assert run("--json") == 130
        out, err = capsys.readouterr()
        assert out == ""
        assert "the migration was cancelled; the guest is paused on the source" in err

    def test_ctrl_c_that_comes_too_late_ends_in_the_report(
        self, script: Script, run: RunMigrate, capsys: Capture
    ) -> None:
        script.stages = [ACTIVE]
        script.on_query = self._press_ctrl_c
        script.on_cancel = lambda: script.stages.append(COMPLETED)
        assert run() == 0
        assert "downtime" in capsys.readouterr().out


@pytest.fixture
def image(kvm: object, tmp_path: Path) -> str:
    path = tmp_path / "dirtier.img"
    path.write_bytes(build(1 * MIB, 3 * MIB))
    return str(path)


class TestWithGuests:
    def test_running_guest_moves(self, image: str, tmp_path: Path) -> None:
        uri, common = f"unix:{tmp_path}/m", ("--memory", "8M", "--serial", "/dev/null")
        with (
            Run(tmp_path / "a", image, *common) as source,
            Run(tmp_path / "b", "--incoming", uri, *common) as destination,
            dirtylog("migrate", str(tmp_path / "a"), uri, "--verify", "--json") as command,
        ):
            assert command.wait() == 0, command.err
            shown = json.loads(command.out)
            assert shown["status"] == "completed"
            assert shown["x-digests"].keys() == {"pc.ram"}
            assert (source.state, destination.state) == ("postmigrate", "running")

    def test_running_guest_is_handed_over_with_its_memory(self, image: str, tmp_path: Path) -> None:
        uri, common = f"unix:{tmp_path}/m", ("--memory", "8M", "--serial", "/dev/null")
        with (
            Run(tmp_path / "a", image, *common) as source,
            Run(tmp_path / "b", "--incoming", uri, *common) as destination,
            dirtylog("migrate", str(tmp_path / "a"), uri, "--local") as command,
        ):
            assert command.wait() == 0, command.err
            assert "memory was handed over whole, and not copied" in command.out.splitlines()
            assert (source.state, destination.state) == ("postmigrate", "running")

    def test_nobody_at_the_uri_leaves_the_guest_running(self, image: str, tmp_path: Path, capsys: Capture) -> None:
        with Run(tmp_path / "a", image, "--memory", "8M", "--serial", "/dev/null") as source:
            assert main(["migrate", str(tmp_path / "a"), f"unix:{tmp_path}/m"]) == 5
            assert source.state == "running"
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("dirtylog: error: the migration failed, the guest is running on the source: ")
        assert f"start it there with 'dirtylog run --incoming unix:{tmp_path}/m'" in error


class TestPostcopy:
    def test_guest_is_handed_over_at_once(self, script: Script, run: RunMigrate) -> None:
        assert run("--postcopy") == 0
        assert script.capabilities["postcopy-ram"]
        assert script.commands[-2:] == [f"migrate {_URI}", "migrate-start-postcopy"]

    def test_resume_changes_nothing_and_goes_on(self, script: Script, run: RunMigrate) -> None:
        script.before = info("postcopy-paused", 1, error_desc="the line was cut")
        script.stages = [info("postcopy-recover", 1), info("postcopy-active", 2), COMPLETED]
        assert run("--resume") == 0
        assert script.commands == [f"migrate {_URI} resume"]

    def test_lost_connection_ends_with_what_is_to_be_done(
        self, script: Script, run: RunMigrate, capsys: Capture
    ) -> None:
        script.stages = [ACTIVE, info("postcopy-active", 2), info("postcopy-paused", 2, error_desc="the line was cut")]
        assert run("--postcopy") == 5
        said = capsys.readouterr().err
        assert "for memory that is here: the line was cut" in said
        assert "dirtylog recover" in said

    def test_ctrl_c_after_the_handover_leaves_the_migration_alone(
        self, script: Script, run: RunMigrate, capsys: Capture
    ) -> None:
        script.stages = [ACTIVE, info("postcopy-active", 2)]
        script.on_query = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 3 else None
        assert run("--postcopy") == 130
        assert "the migration goes on, unwatched" in capsys.readouterr().err
        assert "migrate_cancel" not in script.commands

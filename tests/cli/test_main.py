import importlib
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

import dirtylog
from dirtylog import errors
from dirtylog.cli import main as main_module
from dirtylog.cli.main import COMMANDS, EXIT_STATUS, exit_status, main
from dirtylog.cli.options import DURATION, RATE, SIZE, UnitType
from dirtylog.errors import CancelledError, DirtylogError, HostError, RefusedError, UsageError

Fail = Callable[[BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Makes the subcommand ``doctor`` raise what it is given."""

    def fail(error: BaseException) -> None:
        @click.command("doctor")
        def command() -> None:
            raise error

        module = types.SimpleNamespace(command=command)
        monkeypatch.setattr(importlib, "import_module", lambda name: module)

    return fail


def test_help_lists_every_command_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)
    listed = {int(number) for number in re.findall(r"^    (\d+) ", shown, re.MULTILINE)}
    assert listed == {0, *EXIT_STATUS.values()}
    assert max(map(len, shown.splitlines())) <= 80


def test_help_loads_no_command() -> None:
    code = "import sys; from dirtylog.cli.main import main; main(['--help']); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_what_the_table_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module(f"dirtylog.cli.{name}").command
    assert isinstance(command, click.Command)
    assert command.name == name
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: dirtylog {name} ")


def test_every_command_module_is_in_the_table() -> None:
    modules = [path.stem for path in Path(main_module.__file__).parent.glob("*.py")]
    commands = [name for name in modules if hasattr(importlib.import_module(f"dirtylog.cli.{name}"), "command")]
    assert sorted(commands) == sorted(COMMANDS)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dirtylog {dirtylog.__version__}\n"


def test_installed_script_is_this_main() -> None:
    scripts = entry_points(group="console_scripts", name="dirtylog")
    if not scripts:
        pytest.skip("dirtylog is not installed in this environment")
    assert [script.load() for script in scripts] == [main]


@pytest.mark.parametrize("args", [["nonsense"], ["--nonsense"], ["doctor", "--nonsense"], ["doctor", "nonsense"]])
def test_wrong_usage_exits_with_2_and_one_message(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nonsense" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("x"), 2),
        (errors.ClosedError("x"), 2),
        (HostError("x"), 3),
        (errors.KernelError("KVM_RUN", 14, "Bad address"), 4),
        (RefusedError("x"), 5),
        (errors.DisconnectedError("x"), 5),
        (errors.GuestError("x"), 6),
        (CancelledError("x"), 130),
        (DirtylogError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_class_gives_the_exit_status(error: DirtylogError, status: int) -> None:
    assert exit_status(error) == status


def test_every_error_class_has_an_exit_status_that_is_not_success() -> None:
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, DirtylogError):
            assert exit_status(cls.__new__(cls)) > 0


def test_error_is_shown_as_cause_and_remedy(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(HostError("there is no /dev/kvm", remedy="load its module"))
    assert main(["doctor"]) == 3
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "dirtylog: error: there is no /dev/kvm\n  remedy: load its module\n")


def test_error_without_a_remedy_is_one_line(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(UsageError("memory of 0 bytes"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "dirtylog: error: memory of 0 bytes\n"


def test_text_from_a_peer_cannot_steer_the_terminal(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(RefusedError("no\n\x1b[2Jdirtylog: all is well ✓"))
    assert main(["doctor"]) == 5
    assert capsys.readouterr().err == "dirtylog: error: no\\n\\x1b[2Jdirtylog: all is well ✓\n"


def test_keyboard_interrupt_exits_with_130_and_says_nothing(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert main(["doctor"]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err.strip()) == ("", "")


def test_a_bug_is_not_hidden(fail: Fail) -> None:
    fail(ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize("args", [["--help"], ["doctor"], ["doctor", "--json"]], ids=" ".join)
def test_closed_pipe_ends_quietly(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        command = [sys.executable, "-m", "dirtylog.cli.main", *args]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_missing_stdout_is_no_reason_to_fail() -> None:
    command = f"exec '{sys.executable}' -m dirtylog.cli.main --version >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("unit", "text", "value"), [(SIZE, "1G", 1 << 30), (RATE, "10Gbit", 1_250_000_000), (DURATION, "300ms", 0.3)]
)
def test_option_takes_a_unit(unit: UnitType, text: str, value: float) -> None:
    seen = []

    @click.command()
    @click.option("--it", type=unit)
    def command(it: float) -> None:
        seen.append(it)

    command.main(["--it", text], standalone_mode=False)
    assert seen == [value]


def test_default_may_be_a_number() -> None:
    assert SIZE.convert(4096, None, None) == 4096


def test_option_without_its_unit_is_refused_with_an_example() -> None:
    @click.command()
    @click.option("--max-downtime", type=DURATION)
    def command(max_downtime: float) -> None: ...

    with pytest.raises(click.BadParameter, match="'300' is not a duration; write one like 300ms") as caught:
        command.main(["--max-downtime", "300"], standalone_mode=False)
    assert caught.value.param is not None
    assert caught.value.param.name == "max_downtime"


def test_help_names_the_value_by_its_kind() -> None:
    @click.command()
    @click.option("--memory", type=SIZE)
    def command(memory: int) -> None: ...

    assert "--memory SIZE" in command.get_help(click.Context(command))

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from support.processes import Process
from support.waiting import wait_until

from dirtylog.cli.watch_target import find_qmp
from dirtylog.errors import HostError, UsageError

_SLEEP: Final = "import signal; signal.pause()"

Start = Callable[..., str]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process whose arguments are those of a machine, and gives its number."""
    with ExitStack() as stack:

        def start(*arguments: str) -> str:
            process = stack.enter_context(Process((sys.executable, "-c", _SLEEP, *arguments)))
            wait_until(Path(f"/proc/{process.pid}/cmdline").read_bytes, "the process has its arguments")
            return str(process.pid)

        yield start


@pytest.mark.parametrize("path", ["qmp", "/run/a.sock", "./123", "../1", "12x", "\uff11"])  # the last is a digit too
def test_what_is_no_number_is_a_path(path: str) -> None:
    assert find_qmp(path) == path


@pytest.mark.parametrize(
    "arguments",
    [
        ("/usr/bin/dirtylog", "run", "guest.img", "--qmp", "/run/a"),
        ("-m", "dirtylog.cli.main", "run", "--qmp=/run/a", "guest.img"),
        ("src/dirtylog/cli/main.py", "run", "--incoming", "tcp:h:1", "--qmp", "/run/a", "--memory", "1G"),
        ("dirtylog", "run", "--qmp", "/run/b", "--qmp", "/run/a"),
        ("dirtylog", "run", "--serial", "--qmp", "--qmp", "/run/a"),
        ("dirtylog", "run", "guest.img", "--of-another-version", "--qmp", "/run/a"),
    ],
)
def test_socket_of_a_process_is_the_one_it_was_given(start: Start, arguments: tuple[str, ...]) -> None:
    assert find_qmp(start(*arguments)) == "/run/a"


def test_relative_path_is_where_the_process_is(start: Start) -> None:
    assert find_qmp(start("dirtylog", "run", "guest.img", "--qmp", "a.sock")) == os.path.join(os.getcwd(), "a.sock")


@pytest.mark.parametrize(
    "arguments",
    [
        ("dirtylog", "run", "guest.img"),
        ("dirtylog", "run", "guest.img", "--serial", "--qmp"),
        ("dirtylog", "run", "--", "--qmp", "/run/a"),
        ("dirtylog", "run", "guest.img", "--qmp"),
    ],
)
def test_machine_without_qmp_is_told_so(start: Start, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="serves no QMP; start it with --qmp PATH"):
        find_qmp(start(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("run", "--qmp", "/run/a"),
        ("dirtylog", "migrate", "/run/a"),
        ("dirtylog",),
        ("otherdirtylog", "run", "--qmp", "/run/a"),
    ],
)
def test_other_process_is_no_machine(start: Start, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="is not a machine that 'dirtylog run' runs; name a process of"):
        find_qmp(start(*arguments))


@pytest.mark.parametrize("number", ["4194305", "99999999999999999999", "0"])
def test_number_of_no_process_is_told_so(number: str) -> None:
    with pytest.raises(UsageError, match=f"there is no process {number}"):
        find_qmp(number)


def test_process_that_may_not_be_looked_at_is_told_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    number = start("dirtylog", "run", "--qmp", "a.sock")

    def refuse(path: object) -> str:
        raise PermissionError

    monkeypatch.setattr(os, "readlink", refuse)
    with pytest.raises(HostError, match=f"no permission to look at process {number}; run as the user"):
        find_qmp(number)

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.forks import in_child, refused_with
from support.waiting import Task

from dirtylog.errors import ForkedError
from dirtylog.linux import process as process_module
from dirtylog.linux.process import MadeBy, ProcessName, thread_starved_ns

_WAITS = [sys.executable, "-c", "input()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its standard input is closed."""
    with subprocess.Popen(_WAITS, stdin=subprocess.PIPE) as process:
        yield process


def _name(process: subprocess.Popen[bytes]) -> ProcessName:
    return replace(ProcessName.own(), pid=process.pid, start_time=process_module._start_time(process.pid))


def test_own_name_stays_the_same() -> None:
    assert ProcessName.own() == ProcessName.own()
    assert ProcessName.own().pid == os.getpid()


def test_process_that_lives_is_not_gone(child: subprocess.Popen[bytes]) -> None:
    assert not _name(child).is_gone()
    assert not _name(child).is_gone(0.01)
    assert not ProcessName.own().is_gone()


def test_killed_process_is_gone_before_its_parent_has_asked(child: subprocess.Popen[bytes]) -> None:
    name = _name(child)
    child.kill()
    assert name.is_gone(30.0)


def test_killed_process_is_gone_after_its_parent_has_asked(child: subprocess.Popen[bytes]) -> None:
    name = _name(child)
    child.kill()
    child.wait()
    assert name.is_gone()


def test_process_that_ends_meanwhile_is_waited_for(child: subprocess.Popen[bytes]) -> None:
    name = _name(child)
    assert child.stdin is not None
    answers: list[bool] = []
    task = Task(lambda: answers.append(name.is_gone(30.0)))
    assert task.running
    child.stdin.close()
    task.join()
    assert answers == [True]


def test_number_that_was_given_to_another_process_does_not_deceive(child: subprocess.Popen[bytes]) -> None:
    name = _name(child)
    assert replace(name, start_time=name.start_time - 1).is_gone()


@pytest.mark.parametrize("boot_id", ["", "another boot", ProcessName.own().boot_id + "x"])
def test_nothing_is_certain_about_processes_out_of_sight(boot_id: str) -> None:
    assert not replace(ProcessName.own(), boot_id=boot_id, pid=(1 << 31) - 1).is_gone()


def test_number_that_no_process_has_is_gone() -> None:
    assert replace(ProcessName.own(), pid=(1 << 31) - 1).is_gone()


def test_nothing_is_certain_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert not replace(ProcessName.own(), pid=(1 << 31) - 1).is_gone()


@pytest.mark.parametrize("hidden", [FileNotFoundError, PermissionError])
def test_process_that_proc_hides_is_not_gone_while_it_lives(  # M1
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, hidden: type[OSError]
) -> None:
    name = _name(child)

    def refuse(pid: int) -> int:
        raise hidden

    monkeypatch.setattr(process_module, "_start_time", refuse)
    assert not name.is_gone()


def test_asking_leaves_no_descriptor(child: subprocess.Popen[bytes]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    name = _name(child)
    name.is_gone()
    replace(name, start_time=0).is_gone()
    assert set(os.listdir("/proc/self/fd")) == before


def test_starvation_is_the_kernels_count_for_the_thread_that_asks() -> None:
    def count() -> int:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])

    if not Path("/proc/thread-self/schedstat").exists():
        assert thread_starved_ns() == 0
        return
    before, asked, after = count(), thread_starved_ns(), count()
    assert 0 <= before <= asked <= after


def test_time_without_cpu_of_another_thread_can_be_asked_for() -> None:
    own = threading.get_native_id()
    before = thread_starved_ns()
    assert before <= thread_starved_ns(own) <= thread_starved_ns()
    assert thread_starved_ns(1 << 30) == 0  # no thread has such a number


def test_kernel_without_the_counter_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert thread_starved_ns() == 0


def test_maker_is_this_process_and_not_its_child() -> None:
    maker = MadeBy()
    maker.check("it")
    assert maker.is_this
    assert maker == MadeBy()
    assert in_child(lambda: not maker.is_this and maker != MadeBy())
    assert in_child(lambda: refused_with(ForkedError, lambda: maker.check("it")))


def test_refusal_names_the_maker_and_the_remedy() -> None:
    with pytest.raises(ForkedError, match="the watch was made by process 1 ") as caught:
        MadeBy(1).check("the watch")
    assert caught.value.remedy == "make a new one in the child"

"""``python -m tools.lab``: run tests on a second kernel, where guests have nested paging and soft-dirty exists."""

import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec
from rich.console import Console

from dirtylog.cli.main import exit_status
from dirtylog.cli.options import DURATION, SIZE
from dirtylog.errors import DirtylogError, HostError
from dirtylog.units import GIB
from tools.lab import contents, programs
from tools.lab.archive import Archive
from tools.lab.kernel import Kernel, fetch
from tools.lab.machine import PACKAGE, QEMU, Machine
from tools.lab.protocol import ORDER, Order
from tools.lab.results import Results

PATHS: Final = ("tests/testing/test_mechanisms.py", "tests/trackers", "tests/machine/kvm", "tests/linux")
UNRELATED: Final = (
    "tests/trackers/test_threads.py",
    "tests/trackers/test_schedules.py::test_no_write_is_lost_whoever_clears_when[",
    "tests/trackers/test_schedules.py::test_no_write_is_lost_on_long_walks[",
)
"""What is in these paths and long, but asks nothing of a kernel: nodes of pytest that start so."""

REQUIRED: Final = ("kvm", "soft-dirty", "userfaultfd")
"""What this kernel has, so that a test that misses it fails."""

CACHE: Final = contents.PROJECT / ".lab"
_MODULE: Final = "kvm-amd"
_CPUS: Final = 2
_PYTEST: Final = (
    *("-p", "tools.lab.reporter", "-p", "no:cacheprovider", "--no-header", "-rN", "--tb=short"),
    *("-o", "timeout=900"),  # emulation is slow
)
_PROMPT: Final = ["-i", "-c", "print('This is the second kernel. Ctrl-D ends it.')"]


def _say(text: str) -> None:
    click.echo(f"lab: {text}", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--path", "paths", multiple=True, default=PATHS, show_default=True, help="What to run; may be given several times."
)
@click.option(
    "--timeout", type=DURATION, default=1800.0, show_default="30min", help="When to end the machine if it still runs."
)
@click.option("--memory", type=SIZE, default=3 * GIB, show_default="3G", help="RAM of the machine.")
@click.option("--keep", is_flag=True, help="Leave the initramfs, the console's output and the events in .lab/last.")
@click.option("--shell", is_flag=True, help="Give a prompt of Python there, instead of running tests.")
@click.argument("pytest_arguments", nargs=-1)
@click.pass_context
def command(
    context: click.Context,
    paths: tuple[str, ...],
    timeout: float,
    memory: int,
    keep: bool,
    shell: bool,
    pytest_arguments: tuple[str, ...],
) -> None:
    """Run tests on Debian's cloud kernel in QEMU's software emulation.

    Arguments after -- are pytest's.
    """
    if platform.machine() != "x86_64":
        raise HostError(f"the second kernel is for x86_64, and this host's programs are for {platform.machine()}")
    qemu = programs.find(QEMU, PACKAGE)
    kernel = fetch(CACHE, _say)
    arguments = _PROMPT if shell else pytest_command(paths, pytest_arguments)
    with _folder(keep=keep) as folder:
        initramfs = folder / "initramfs"
        _pack(initramfs, kernel, arguments)
        machine = Machine(qemu, kernel.image, initramfs, folder, memory, _CPUS)
        _say(f"starting Linux {kernel.release}")
        if shell:
            machine.interact()
        else:
            context.exit(_run(machine, timeout))


def pytest_command(paths: tuple[str, ...], arguments: tuple[str, ...]) -> list[str]:
    """What is asked of Python there."""
    color = "--color=yes" if sys.stdout.isatty() else "--color=no"
    left_out = [f"--deselect={node}" for node in UNRELATED] if paths == PATHS else []
    return ["-m", "pytest", *_PYTEST, color, *left_out, *paths, *arguments]


@contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    if not keep:
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            yield Path(name)
        return
    folder = CACHE / "last"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder


def _pack(initramfs: Path, kernel: Kernel, arguments: Sequence[str]) -> None:
    modules = {f"/lab/{name}.ko": content for name, content in kernel.modules(_MODULE).items()}
    order = Order(
        [sys.executable, "-B", *arguments],
        directory=str(contents.PROJECT),
        environment=_environment(),
        modules=[*modules],
    )
    added = {"/init": contents.INIT, "/etc/hosts": contents.HOSTS, "/etc/passwd": contents.USERS}
    with initramfs.open("wb") as file:
        archive = Archive(file)
        contents.add_all(archive)
        for name, content in (added | modules | {ORDER: msgspec.json.encode(order)}).items():
            archive.add_bytes(Path(name), content, mode=0o755)
        archive.finish()


def _environment() -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": "/",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": str(shutil.get_terminal_size((100, 24)).columns),
        "DIRTYLOG_REQUIRE": ",".join(REQUIRED),
    }


def _run(machine: Machine, timeout: float) -> int:
    """Run the tests, and show what came of them; the exit status."""
    in_time = machine.run(timeout, _show)
    results = Results.of(machine.events())
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if results.tests:
        console.print(results.table())
    for title, lines in (("Skipped", results.skips()), ("Failed", results.failures())):
        if lines:
            console.print(f"{title}:", *(f"  {line}" for line in lines), sep="\n", markup=False, soft_wrap=True)
    problem = results.problem(in_time=in_time)
    console.print(f"lab: {problem or 'all went well'}", markup=False, soft_wrap=True)
    return int(problem is not None)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data.replace(b"\r", b""))
    sys.stdout.buffer.flush()


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, and so ends what was started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the given command line, or the process's own; the exit status."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        result = command.main(arguments, prog_name="python -m tools.lab", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return 128 + signal.SIGINT
    except DirtylogError as error:
        _say(f"error: {error}")
        return exit_status(error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

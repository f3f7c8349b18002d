"""Run every tracker of this package against writers that never rest, for as long as asked: `make soak`.

What is checked, and why it must hold, stands in `dirtylog.testing.stamps`.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from random import Random
from typing import Final, NoReturn

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dirtylog.cli.main import exit_status
from dirtylog.cli.options import DURATION
from dirtylog.errors import DirtylogError, HostError
from dirtylog.testing import ContractError, Stamps, Tally, Writing
from dirtylog.testing.mechanisms import MECHANISMS, Mechanism

SESSION_ROUNDS: Final = 1000
"""After so many the tracker is disarmed, and another one armed, for memory of another size."""
_ODD_SIZES: Final = (1, 2, 63, 64, 65, 127, 129)
_MOST_PAGES: Final = 3000
_SHOW_EVERY: Final = 200
_FILE_WIDTH: Final = 120
_FAILED: Final = 1
_INTERRUPTED: Final = 128 + signal.SIGINT


class Result(msgspec.Struct):
    """What came of one tracker with one kind of writers.

    Attributes:
        tracker: its name.
        writer: theirs.
        blind: whether the tracker does not see them, which then was checked.
        rounds: how many were checked.
        seconds: what they took.
        tally: what happened in them.
        missing: why it could not run here, if it could not.
        violation: what rule was broken, if one was.
        seed: of the session in which it was.
    """

    tracker: str
    writer: str
    blind: bool
    rounds: int = 0
    seconds: float = 0.0
    tally: Tally = msgspec.field(default_factory=Tally)
    missing: str = ""
    violation: str = ""
    seed: int | None = None

    @property
    def rate(self) -> float:
        """Rounds a second."""
        return self.rounds / self.seconds if self.seconds else 0.0

    def add(self, tally: Tally, seconds: float) -> None:
        """Add what one session did."""
        self.rounds += tally.rounds
        self.seconds += seconds
        for name in Tally.__dataclass_fields__:
            setattr(self.tally, name, getattr(self.tally, name) + getattr(tally, name))


class Soak:
    """Runs pairs of a mechanism and writers, one after the other, up to the first violation.

    Args:
        rounds: how many for each mechanism, shared by the writers that it sees.
        seconds: when to go on to the next pair at the latest.
        seed: of each pair's first session; each later one has the next.
        progress: shows what is done.

    Attributes:
        results: what came of the pairs that were begun.
    """

    def __init__(self, rounds: int, seconds: float, seed: int, progress: Progress) -> None:
        self._rounds = rounds
        self._seconds = seconds
        self._seed = seed
        self._progress = progress
        self.results: list[Result] = []

    def run(self, mechanism: Mechanism, writers: Sequence[Writing]) -> None:
        """Run all that go with one mechanism.

        Raises:
            ContractError: it broke its contract.
        """
        failure = mechanism.failure()
        sighted = sum(writing not in mechanism.differences.blind_to for writing in writers)
        for writing in writers:
            blind = writing in mechanism.differences.blind_to
            result = Result(mechanism.name, writing.value, blind, missing="" if failure is None else str(failure))
            self.results.append(result)
            if failure is None:
                share = min(self._rounds, SESSION_ROUNDS) if blind else -(-self._rounds // sighted)
                self._run_pair(mechanism, writing, share, result)
            if self._progress.disable:
                self._progress.console.print(f"{result.tracker} written by {result.writer}: {result.rounds:,} rounds")

    def _run_pair(self, mechanism: Mechanism, writing: Writing, rounds: int, result: Result) -> None:
        task = self._progress.add_task(f"{result.tracker} written by {result.writer}", total=rounds)
        deadline = time.monotonic() + self._seconds
        seed = self._seed
        while result.rounds < rounds and time.monotonic() < deadline and not result.missing:
            result.seed = seed
            self._run_session(mechanism, writing, min(SESSION_ROUNDS, rounds - result.rounds), result, task, deadline)
            seed += 1
        result.seed = None
        self._progress.remove_task(task)

    def _run_session(
        self, mechanism: Mechanism, writing: Writing, rounds: int, result: Result, task: TaskID, deadline: float
    ) -> None:
        seed = result.seed or 0
        with closing(mechanism.make(pages_of(seed))) as case:
            try:
                stamps = Stamps(case, mechanism.differences, writing, seed)
            except HostError as error:
                result.missing = str(error)
                return
            begin = time.monotonic()
            try:
                with stamps:
                    for some in _portions(rounds):
                        stamps.run(some)
                        self._progress.advance(task, some)
                        self._progress.refresh()
                        if time.monotonic() > deadline:
                            break
            except ContractError as error:
                result.violation = str(error)
                raise
            finally:
                result.add(stamps.tally, time.monotonic() - begin)


def pages_of(seed: int) -> int:
    """The size of a session's memory."""
    choice = Random(seed)  # noqa: S311 - the same in every run
    return choice.choice(_ODD_SIZES) if choice.random() < 0.2 else choice.randint(1, _MOST_PAGES)


def _portions(rounds: int) -> Iterator[int]:
    while rounds:
        yield min(rounds, _SHOW_EVERY)
        rounds -= min(rounds, _SHOW_EVERY)


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    shown = Table(box=None, header_style="bold")
    for heading, justify in (("tracker", "left"), ("writer", "left"), ("rounds", "right"), ("rounds/s", "right")):
        shown.add_column(heading, justify=justify)  # type: ignore[arg-type]  # a literal, which a tuple forgets
    shown.add_column("", overflow="fold")
    for result in results:
        numbers = (f"{result.rounds:,}", f"{result.rate:,.0f}") if result.rounds else ("", "")
        shown.add_row(result.tracker, result.writer, *numbers, _remark(result))
    return shown


def _remark(result: Result) -> str:
    if result.violation:
        return f"[bold red]broken[/]: {result.violation}"
    if result.missing:
        return f"not here: {result.missing}"
    if result.blind:
        return "not seen, as declared"
    tally = result.tally
    pages = tally.reported + tally.unreported
    share = f"{100 * tally.reported / pages:.0f} %" if pages else "none"
    return f"{share} of pages reported, {tally.raced:,} written while they were collected"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Rounds for each tracker, shared by the writers that it sees.",
)
@click.option(
    "--seconds", type=DURATION, metavar="DURATION", help="When to go on to the next writer at the latest, such as 10s."
)
@click.option("--tracker", "trackers", type=click.Choice(list(MECHANISMS)), multiple=True, help="Only these.")
@click.option(
    "--writer", "writers", type=click.Choice([kind.value for kind in Writing]), multiple=True, help="Only these."
)
@click.option("--seed", type=click.IntRange(min=0), help="What a failure named; else another in each run.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the results as JSON; alone, to stdout, if '-'.")
def command(
    rounds: int,
    seconds: float | None,
    trackers: tuple[str, ...],
    writers: tuple[str, ...],
    seed: int | None,
    json_path: str | None,
) -> int:
    """Check that trackers lose no write while threads, processes and guests write all the time.

    What cannot run on this host is listed with the reason. Ends at the first write that is lost, with status 1, and
    says how to repeat that.
    """
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    soak = Soak(rounds, float("inf") if seconds is None else seconds, seed, progress)
    status = 0
    try:
        with progress:
            for mechanism in (MECHANISMS[name] for name in trackers or MECHANISMS):
                soak.run(mechanism, [kind for kind in mechanism.writers if not writers or kind.value in writers])
    except ContractError:
        status = _FAILED
    except KeyboardInterrupt:
        status = _INTERRUPTED
    _show(soak.results, seed, json_path)
    return status


def _show(results: Sequence[Result], seed: int, json_path: str | None) -> None:
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode({"seed": seed, "results": results}), indent=2) + b"\n")
    if json_path != "-":
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(table(results))
    for broken in (result for result in results if result.violation):
        repeat = f"--tracker {broken.tracker} --writer {broken.writer} --seed {broken.seed}"
        click.echo(f"soak: {broken.tracker}: {broken.violation}; to repeat: tools/soak.py {repeat}", err=True)


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, and so ends who writes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments, or the process's own; the exit status."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        result = command.main(arguments, prog_name="soak.py", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return _INTERRUPTED
    except DirtylogError as error:
        click.echo(f"soak: error: {error}", err=True)
        return exit_status(error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

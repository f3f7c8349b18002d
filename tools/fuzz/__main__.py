"""``python -m tools.fuzz``: fuzz the parsers of what a peer or a file says, with atheris: `make fuzz`."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dirtylog.cli.options import DURATION
from tools.fuzz.record import CORPUS
from tools.fuzz.targets import TARGETS

PROJECT: Final = Path(__file__).parents[2]
FOUND: Final = PROJECT / ".fuzz"
"""What was found: inputs that reach new code, which the next run begins with; findings; the engine's output."""
LIMITS: Final = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=32768")
"""Seconds and memory that no input may take, and the longest input, in bytes."""
ROUND: Final = 1_000_000
"""Inputs of one engine. atheris 3.0 loses some 200 bytes with each: after millions that would be a finding."""
_INTERRUPTED: Final = 128 + signal.SIGINT
_STATISTICS: Final = {
    "inputs": re.compile(r"^stat::number_of_executed_units: +(\d+)", re.MULTILINE),
    "edges": re.compile(r" cov: (\d+) "),
    "memory": re.compile(r"^stat::peak_rss_mb: +(\d+)", re.MULTILINE),
}


class Result(msgspec.Struct):
    """What came of one target: inputs, seconds, edges of code reached, MiB taken, and the input that was a finding."""

    target: str
    inputs: int = 0
    seconds: float = 0
    edges: int = 0
    memory: int = 0
    finding: Path | None = None


def fuzz(target: str, seconds: int, runs: int, folder: Path) -> Result:
    """Fuzz a target for so many seconds, or so many inputs if ``runs`` is not 0, with one engine after the other."""
    result = Result(target)
    began = time.monotonic()
    while result.finding is None:
        limits = [f"-runs={min(ROUND, runs - result.inputs) if runs else ROUND}"]
        if not runs:
            limits.append(f"-max_total_time={max(1, round(began + seconds - time.monotonic()))}")
        _run_engine(result, limits, folder)
        result.seconds = time.monotonic() - began
        if result.inputs >= runs if runs else result.seconds >= seconds:
            break
    return result


def _run_engine(result: Result, limits: Sequence[str], folder: Path) -> None:
    target = result.target
    grown = folder / target
    grown.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob(f"{target}-*"))
    command = [sys.executable, "-m", "tools.fuzz.engine", target, *LIMITS, *limits, "-print_final_stats=1"]
    command.append(f"-artifact_prefix={folder}/{target}-")
    log = folder / f"{target}.log"
    with log.open("wb") as output:
        status = subprocess.run(
            [*command, str(grown), str(CORPUS / target)], cwd=PROJECT, stdout=output, stderr=output, check=False
        ).returncode
    text = log.read_text(errors="replace")
    numbers = {name: [int(number) for number in pattern.findall(text)] for name, pattern in _STATISTICS.items()}
    findings = set(folder.glob(f"{target}-*")) - before
    result.inputs += max(numbers["inputs"], default=0)
    result.edges = max(result.edges, *numbers["edges"], 0)
    result.memory = max(result.memory, *numbers["memory"], 0)
    result.finding = next(iter(findings), None)
    if not findings and (status or not numbers["inputs"]):
        raise click.ClickException(f"the engine ended with status {status}: see {log}")


def _show(results: Sequence[Result]) -> None:
    table = Table("target", "inputs", "seconds", "edges", "MiB", "finding")
    for result in results:
        numbers = (f"{number:,}" for number in (result.inputs, round(result.seconds), result.edges, result.memory))
        table.add_row(result.target, *numbers, "none" if result.finding is None else str(result.finding))
    Console().print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--target", "targets", type=click.Choice(list(TARGETS)), multiple=True, help="Only these.")
@click.option("--seconds", type=DURATION, default=60.0, show_default="60s", help="How long to fuzz each target.")
@click.option("--runs", type=click.IntRange(min=1), help="How many inputs of each, in the time that they take.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOUND, help="Where to keep what is found.")
def command(targets: Sequence[str], seconds: float, runs: int | None, folder: Path) -> int:
    """Fuzz the parsers. Status 1 says that there is a finding."""
    results = []
    for target in targets or TARGETS:
        result = fuzz(target, max(1, round(seconds)), runs or 0, folder.absolute())
        results.append(result)
        if result.finding is not None:
            repeat = f"python -m tools.fuzz.engine {target} {result.finding}"
            click.echo(f"fuzz: {target}: something is wrong; to repeat: {repeat}", err=True)
            break
    _show(results)
    return 1 if results[-1].finding is not None else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        return int(command.main(arguments, prog_name="python -m tools.fuzz", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # how click passes on KeyboardInterrupt
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

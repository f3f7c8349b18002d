"""``python -m tools.fuzz``: fuzz the parsers of what a peer or a file says, with atheris: `make fuzz`."""

import re
import signal
import subprocess
import sys
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
_INTERRUPTED: Final = 128 + signal.SIGINT
_STATISTICS: Final = {
    "inputs": re.compile(r"^stat::number_of_executed_units: +(\d+)", re.MULTILINE),
    "edges": re.compile(r" cov: (\d+) "),
    "memory": re.compile(r"^stat::peak_rss_mb: +(\d+)", re.MULTILINE),
}


class Result(msgspec.Struct):
    """What came of one target: inputs run, edges of code reached, MiB taken, and the input that was a finding."""

    target: str
    inputs: int
    edges: int
    memory: int
    finding: Path | None


def fuzz(target: str, seconds: int, runs: int, folder: Path) -> Result:
    """Fuzz a target for so many seconds, or so many inputs if ``runs`` is not negative."""
    grown = folder / target
    grown.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob(f"{target}-*"))
    command = [sys.executable, "-m", "tools.fuzz.engine", target, *LIMITS, "-print_final_stats=1"]
    command += [f"-max_total_time={seconds}", f"-runs={runs}", f"-artifact_prefix={folder}/{target}-"]
    log = folder / f"{target}.log"
    with log.open("wb") as output:
        status = subprocess.run(
            [*command, str(grown), str(CORPUS / target)], cwd=PROJECT, stdout=output, stderr=output, check=False
        ).returncode
    text = log.read_text(errors="replace")
    numbers = {name: [int(number) for number in pattern.findall(text)] for name, pattern in _STATISTICS.items()}
    findings = set(folder.glob(f"{target}-*")) - before
    if status and not findings:
        raise click.ClickException(f"the engine ended with status {status}: see {log}")
    return Result(
        target,
        inputs=max(numbers["inputs"], default=0),
        edges=max(numbers["edges"], default=0),
        memory=max(numbers["memory"], default=0),
        finding=next(iter(findings), None),
    )


def _show(results: Sequence[Result]) -> None:
    table = Table("target", "inputs", "edges", "MiB", "finding")
    for result in results:
        numbers = (f"{number:,}" for number in (result.inputs, result.edges, result.memory))
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
        result = fuzz(target, 0 if runs else max(1, round(seconds)), runs or -1, folder.absolute())
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

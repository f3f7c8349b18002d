"""Migrations by two programs in turn, and what came of them: what scripts that compare two have in common."""

import sys
from collections.abc import Sequence
from typing import Final

import click
from msgspec import Struct
from rich.console import Console

from benchmarks.support.measure import Run, Setup, measure
from benchmarks.support.peers import Peer
from benchmarks.support.report import Host, encode, line, tables
from dirtylog.errors import UsageError
from dirtylog.units import MIB

_FILE_WIDTH: Final = 140


def compare(
    options: Struct,
    setups: Sequence[Setup],
    runs: int,
    peers: Sequence[Peer],
    columns: tuple[str, str],
    json_path: str | None,
) -> None:
    """Measure each setup so many times with each peer, and show all of it.

    Args:
        options: what was asked for, for the JSON.
        setups: what is migrated, and how.
        runs: of each setup, with each peer.
        peers: who migrates.
        columns: the names of the two that the tables compare; one of them may not be among the peers.
        json_path: where to write every run as JSON; standard output, alone, if it is '-'.

    Raises:
        UsageError: a guest does not fit its memory.
    """
    for setup in setups:
        _check(setup)
    host = Host.this(peers)
    results = _run_all(setups, runs, peers)
    if json_path is not None:
        with click.open_file(json_path, "wb") as file:
            file.write(encode(host, options, results))
    if json_path != "-":
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
        console.print(tables(results, columns))
        console.print(str(host), soft_wrap=True)


def _check(setup: Setup) -> None:
    if setup.memory % MIB or not setup.memory:
        raise UsageError(f"{setup.memory} bytes of RAM are not whole MiB", remedy="give --memory like 1G or 512M")
    if setup.workload.end > setup.memory:
        raise UsageError(
            f"the guest cannot have memory up to {setup.workload.end:#x} in {setup.memory:#x} bytes of RAM",
            remedy="give more with --memory",
        )


def _run_all(setups: Sequence[Setup], runs: int, peers: Sequence[Peer]) -> list[Run]:
    """In turn, so that whatever else the host does strikes both."""
    progress = Console(stderr=True, highlight=False)
    results = []
    for setup in setups:
        for number in range(1, runs + 1):
            for peer in peers:
                run = measure(peer, setup)
                results.append(run)
                progress.print(f"{setup}, run {number} of {runs}: {line(run)}", soft_wrap=True)
    return results

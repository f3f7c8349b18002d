"""How long does it take to stop a running guest?

Pauses and resumes a guest that writes memory for ever, and beside it makes the same system calls by hand: a signal to a
thread that is in KVM_RUN, until that returns. See docs/benchmarks.md.
"""

import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

import msgspec

from benchmarks.support.report import Summary
from dirtylog.guests.dirtier import build
from dirtylog.linux.kvm import KICK_SIGNAL
from dirtylog.machine import KVMMachine, boot_sector
from dirtylog.units import MIB, format_duration

MEMORY = 64 * MIB


@click.command("pause.py")
@click.option("--runs", type=click.IntRange(min=1), default=500, show_default=True, help="How often to pause.")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON, in seconds.")
def command(runs: int, as_json: bool) -> None:
    """Pause a running guest again and again; show how long that took."""
    taken = {"raw system calls": raw(runs), "Machine.pause": paused(runs)}
    if as_json:
        click.echo(msgspec.json.encode(taken))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("until the guest stands still", "median", "99 %", "most"):
        table.add_column(name, justify="left" if name.startswith("until") else "right")
    for name, seconds in taken.items():
        ordered = sorted(seconds)
        summary = Summary.of(ordered)
        if summary is not None:
            high = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
            table.add_row(name, *map(format_duration, (summary.median, high, summary.high)))
    Console(highlight=False).print(table)


def paused(runs: int) -> list[float]:
    """Seconds that each `Machine.pause` took."""
    seconds = []
    with closing(KVMMachine(MEMORY)) as machine:
        boot_sector(machine, build(MIB, MEMORY))
        for _ in range(runs):
            machine.resume()
            let_run()
            began = time.perf_counter()
            machine.pause()
            seconds.append(time.perf_counter() - began)
    return seconds


def raw(runs: int) -> list[float]:
    """Seconds from a signal to a thread in KVM_RUN until the thread says that it is out of it."""
    seconds: list[float] = []
    entering, out = threading.Semaphore(0), threading.Semaphore(0)
    with closing(KVMMachine(MEMORY)) as machine:
        boot_sector(machine, build(MIB, MEMORY))
        vcpu = machine.boot_cpu

        def run() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
            vcpu.let_kick_through()
            for _ in range(runs):
                vcpu.request_exit(False)
                entering.release()
                vcpu.run()
                while signal.sigtimedwait((KICK_SIGNAL,), 0) is None:  # it was serial output, which is dropped
                    vcpu.run()
                out.release()

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(runs):
            entering.acquire()
            let_run()
            began = time.perf_counter()
            vcpu.request_exit(True)
            signal.pthread_kill(thread.ident or 0, KICK_SIGNAL)
            out.acquire()
            seconds.append(time.perf_counter() - began)
        thread.join()
    return seconds


def let_run() -> None:
    """Give the guest a millisecond."""
    time.sleep(0.001)


if __name__ == "__main__":
    command()

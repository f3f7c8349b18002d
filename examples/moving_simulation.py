"""Move a running numpy simulation to another process, or to another host, and lose no step.

Heat spreads through a rod: the temperature of a cell becomes the mean of its neighbours' and its own, again and again.
The rod is too large to be stepped at once, so a sweep goes through it piece by piece; where the sweep is, and how many
there were, is the state beside the memory.

Without an address, this starts the other process itself, moves the simulation there after a while, lets it go on, and
compares the outcome with that of an undisturbed one: exit status 0 if they are equal to the last bit. Between hosts:

    moving_simulation.py --receive tls:0.0.0.0:4444 --tls-creds DIR      # there, first
    moving_simulation.py --send tls:THAT-HOST:4444 --tls-creds DIR       # here

Who waits names an address at which the other host reaches it: without one, as in ``tls::4444``, only this host does.
``docs/security.md`` tells how to make the credentials, and what ``tcp:``, which needs none, shows to all on the way.
``two_hosts.py`` does it with two hosts made of one.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dirtylog.errors import DirtylogError, UsageError
from dirtylog.machine import Process
from dirtylog.migration import (
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Role,
    credentials_for,
    parse_address,
)
from dirtylog.units import format_duration, parse_size

PIECE = 1 << 16
"""Cells of one step: half a MiB, so that the simulation can stop at any time within a few milliseconds."""
RELAXATIONS = 32
"""Of a piece in one step. With more work on them, memory is written more slowly, and can be sent while it is."""


class Rod:
    """The simulation. It knows nothing of being moved but that it can be paused, and that its place can be told."""

    def __init__(self, cells: npt.NDArray[np.float64], steps: int) -> None:
        self.cells = cells
        self.steps = steps
        self.done = 0
        self.done_elsewhere = 0
        self._going = threading.Event()
        self._thread: threading.Thread | None = None

    def resume(self) -> None:
        """Go on in a thread of its own."""
        self._going.set()
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop between two steps; nothing is written after this."""
        self._going.clear()
        if self._thread is not None:
            self._thread.join()

    def run(self) -> None:
        """Step until there are enough, or until it is paused."""
        while self._going.is_set() and self.done < self.steps:
            self.step()

    def step(self) -> None:
        """One piece of the rod."""
        start = self.done * PIECE % self.cells.size
        piece = self.cells[start : start + PIECE + 2]
        for _ in range(RELAXATIONS):
            piece[1:-1] = (piece[:-2] + piece[1:-1] + piece[2:]) / 3
        self.done += 1

    def save(self) -> bytes:
        """What is not in the cells."""
        return self.done.to_bytes(8, "little")

    def load(self, state: bytes) -> None:
        """The reverse."""
        self.done = self.done_elsewhere = int.from_bytes(state, "little")


def simulation(size: int, steps: int) -> tuple[Rod, Process]:
    """A rod of so many bytes, as a machine that can be moved."""
    rod: Rod
    process = Process(
        {"cells": size},
        resume=lambda: rod.resume(),
        pause=lambda: rod.pause(),
        save=lambda: rod.save(),
        load=lambda state: rod.load(state),
    )
    rod = Rod(process.array("cells", size // 8), steps)
    return rod, process


def receive(uri: str, size: int, steps: int, creds: str) -> None:
    """Wait for a simulation, finish it, and print its digest."""
    rod, process = simulation(size, steps)
    address = parse_address(uri)
    listener = Listener(address, credentials_for(address, creds, Role.DESTINATION))
    print(f"waiting at {listener.address}", flush=True)
    IncomingMigration(process, listener).run()
    print(f"received at step {rod.done_elsewhere} of {steps}", flush=True)
    finish(rod)
    print(f"digest {digest(rod)}", flush=True)
    process.close()


def send(uri: str, size: int, steps: int, parameters: Parameters) -> None:
    """Start a simulation, and move it before it is done."""
    rod, process = simulation(size, steps)
    heat(rod.cells)
    process.resume()
    while rod.done < steps // 4:
        time.sleep(0.01)
    outgoing = OutgoingMigration(process, parse_address(uri), parameters)
    outgoing.run()
    took, stood = outgoing.statistics.total_seconds, outgoing.statistics.downtime
    print(
        f"moved in {format_duration(took)} at step {rod.done}; it stood still for {format_duration(stood)}", flush=True
    )
    process.close()
    if rod.done >= steps:
        raise UsageError("the simulation was over before it was moved", remedy="give it more --steps")


def heat(cells: npt.NDArray[np.float64]) -> None:
    """The beginning: hot and cold places at random."""
    for start in range(0, cells.size, PIECE):
        part = cells[start : start + PIECE]
        part[:] = np.random.default_rng(start).random(part.size)


def finish(rod: Rod) -> None:
    """Wait for the last step."""
    while rod.done < rod.steps:
        time.sleep(0.01)
    rod.pause()


def digest(rod: Rod) -> str:
    """Of all cells."""
    return hashlib.blake2b(rod.cells.data, digest_size=16).hexdigest()


def undisturbed(size: int, steps: int) -> str:
    """The digest of a simulation that nobody moves."""
    rod = Rod(np.empty(size // 8), steps)
    heat(rod.cells)
    for _ in range(steps):
        rod.step()
    return digest(rod)


def demonstrate(size: int, steps: int, parameters: Parameters) -> int:
    """Both sides, and an undisturbed simulation to compare with."""
    with tempfile.TemporaryDirectory(prefix="dirtylog-") as folder:
        uri = f"unix:{Path(folder) / 'simulation'}"
        options = ("--size", str(size), "--steps", str(steps))
        receiver = subprocess.Popen(
            [sys.executable, __file__, "--receive", uri, *options], stdout=subprocess.PIPE, text=True
        )
        try:
            next(iter(receiver.stdout or ()), "")  # it waits, or has ended
            send(uri, size, steps, parameters)
            words, _ = receiver.communicate()
        finally:
            receiver.kill()
            receiver.wait()
    print(words, end="")
    equal = f"digest {undisturbed(size, steps)}" in words
    print("an undisturbed simulation ends with the same cells" if equal else "an undisturbed one ends with OTHER cells")
    return 0 if equal else 1


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1G", help="memory of the simulation (default: 1G)")
    parser.add_argument("--steps", type=int, default=4096, help="of half a MiB each (default: 4096)")
    parser.add_argument("--local", action="store_true", help="hand the memory over instead of copying it")
    parser.add_argument("--tls-creds", metavar="DIR", default="", help="credentials for tls: addresses")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--receive", metavar="URI", help="only wait for a simulation there, and finish it")
    what.add_argument("--send", metavar="URI", help="only start one, and move it there")
    what.add_argument("--undisturbed", action="store_true", help="only run one that nobody moves")
    options = parser.parse_args()
    try:
        return run(options)
    except DirtylogError as error:
        raise SystemExit(f"moving_simulation.py: error: {error}") from error


def run(options: argparse.Namespace) -> int:
    """Do what the options say; the exit status."""
    size, steps = parse_size(options.size), options.steps
    parameters = Parameters(share_memory=options.local, tls_creds=options.tls_creds)
    if options.receive:
        receive(options.receive, size, steps, options.tls_creds)
    elif options.send:
        send(options.send, size, steps, parameters)
    elif options.undisturbed:
        print(f"digest {undisturbed(size, steps)}")
    else:
        return demonstrate(size, steps, parameters)
    return 0


if __name__ == "__main__":
    sys.exit(main())

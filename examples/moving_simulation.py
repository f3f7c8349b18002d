"""Move a running numpy simulation to another process, or to another host, and lose no step.

Heat spreads through a rod: each step replaces the temperature of every cell by the mean of its neighbours' and its own.
The rod is too large to be stepped at once, so a sweep goes through it piece by piece; where the sweep is, and how many
there were, is the state beside the memory.

Without an address, this starts the other process itself, moves the simulation there after a while, lets it go on, and
compares the outcome with that of an undisturbed one: exit status 0 if they are equal to the last bit. Between hosts:

    moving_simulation.py --receive tcp:0.0.0.0:4444          # there, first
    moving_simulation.py --send tcp:THAT-HOST:4444           # here
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

from dirtylog.errors import DirtylogError
from dirtylog.machine import Process
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Parameters, parse_address
from dirtylog.units import format_duration, parse_size

PIECE = 1 << 16
"""Cells of one step: half a MiB, so that the simulation can stop at any time within a millisecond."""


class Rod:
    """The simulation. It knows nothing of being moved but that it can be paused, and that its place can be told."""

    def __init__(self, cells: npt.NDArray[np.float64], steps: int) -> None:
        self.cells = cells
        self.steps = steps
        self.done = 0
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
        piece[1:-1] = (piece[:-2] + piece[1:-1] + piece[2:]) / 3
        self.done += 1

    def save(self) -> bytes:
        """What is not in the cells."""
        return self.done.to_bytes(8, "little")

    def load(self, state: bytes) -> None:
        """The reverse."""
        self.done = int.from_bytes(state, "little")


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


def receive(uri: str, size: int, steps: int) -> None:
    """Wait for a simulation, finish it, and print its digest."""
    rod, process = simulation(size, steps)
    IncomingMigration(process, Listener(parse_address(uri))).run()
    print(f"received at step {rod.done} of {steps}", flush=True)
    finish(rod)
    print(f"digest {digest(rod)}", flush=True)
    process.close()


def send(uri: str, size: int, steps: int, *, local: bool) -> None:
    """Start a simulation, and move it before it is done."""
    rod, process = simulation(size, steps)
    heat(rod.cells)
    process.resume()
    while rod.done < steps // 4:
        time.sleep(0.01)
    outgoing = OutgoingMigration(process, parse_address(uri), Parameters(share_memory=local))
    outgoing.run()
    took, stood = outgoing.statistics.total_seconds, outgoing.statistics.downtime
    print(f"moved in {format_duration(took)} at step {rod.done}; it stood still for {format_duration(stood)}")
    process.close()


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


def demonstrate(size: int, steps: int, *, local: bool) -> int:
    """Both sides, and an undisturbed simulation to compare with."""
    with tempfile.TemporaryDirectory(prefix="dirtylog-") as folder:
        uri = f"unix:{Path(folder) / 'simulation'}"
        options = ("--size", str(size), "--steps", str(steps))
        receiver = subprocess.Popen(
            [sys.executable, __file__, "--receive", uri, *options], stdout=subprocess.PIPE, text=True
        )
        try:
            while not Path(folder, "simulation").exists() and receiver.poll() is None:
                time.sleep(0.01)
            send(uri, size, steps, local=local)
            words, _ = receiver.communicate()
        finally:
            receiver.kill()
            receiver.wait()
    print(words, end="")
    alone = Rod(np.empty(size // 8), steps)
    heat(alone.cells)
    for _ in range(steps):
        alone.step()
    equal = f"digest {digest(alone)}" in words
    print("an undisturbed simulation ends with the same cells" if equal else "an undisturbed one ends with OTHER cells")
    return 0 if equal else 1


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1G", help="memory of the simulation (default: 1G)")
    parser.add_argument("--steps", type=int, default=12000, help="of half a MiB each (default: 12000)")
    parser.add_argument("--local", action="store_true", help="hand the memory over instead of copying it")
    parser.add_argument("--receive", metavar="URI", help="only wait for a simulation there")
    parser.add_argument("--send", metavar="URI", help="only start one, and move it there")
    options = parser.parse_args()
    size = parse_size(options.size)
    try:
        if options.receive:
            receive(options.receive, size, options.steps)
        elif options.send:
            send(options.send, size, options.steps, local=options.local)
        else:
            return demonstrate(size, options.steps, local=options.local)
    except DirtylogError as error:
        raise SystemExit(f"moving_simulation.py: error: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())

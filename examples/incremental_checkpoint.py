"""Checkpoint a simulation incrementally: only the pages that were written go to the file.

Two hot spots wander over a metal plate, and heat spreads around them. The first checkpoint is the whole plate; each
later one holds what was written since the one before, found by ``dirtylog.watch``. At the end the plate is restored
from the file as it was at every checkpoint, and compared.

``--plot FILE`` draws what was written when (needs ``pip install 'dirtylog[plot]'``). The picture in the tutorial::

    python examples/incremental_checkpoint.py --plot docs/images/incremental-checkpoint.png

Exit status 0 if everything restored is equal.
"""

import argparse
import hashlib
import math
import struct
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

import dirtylog
from dirtylog.errors import DirtylogError
from dirtylog.units import PAGE_SIZE, format_size

Plate = npt.NDArray[np.float64]

PIECE = struct.Struct("<qq")  # a piece of a checkpoint: its first row and how many, then the rows
END = PIECE.pack(-1, 0)
STEPS = 8  # of the simulation, from one checkpoint to the next
SPOT = 48  # rows and columns around a hot spot, at most, that a step computes


def main() -> int:
    """Run the simulation, restore all checkpoints, print and draw what they cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="of the plate, 4 KiB each (default: 4096)")
    parser.add_argument("--checkpoints", type=int, default=96, help=f"how many, {STEPS} steps apart (default: 96)")
    parser.add_argument("--file", type=Path, help="where the checkpoints go (default: a temporary file)")
    parser.add_argument("--tracker", default="auto", help="how writes are found (default: auto)")
    parser.add_argument("--plot", type=Path, help="draw what was written to this file (PNG, SVG or PDF)")
    options = parser.parse_args()
    if options.rows < 4 * SPOT or options.checkpoints < 1:
        parser.error(f"the plate has {4 * SPOT} rows at least, and there is one checkpoint at least")
    try:
        with options.file.open("w+b") if options.file else tempfile.TemporaryFile() as file:
            return demonstrate(file, options)
    except (DirtylogError, OSError) as error:
        raise SystemExit(f"incremental_checkpoint.py: error: {error}") from error


def demonstrate(file: IO[bytes], options: argparse.Namespace) -> int:
    """Simulate and checkpoint to a file, then restore from it and compare; the exit status."""
    plate: Plate = dirtylog.zeros((options.rows, PAGE_SIZE // 8))
    digests, history = [], []
    with dirtylog.watch(plate, options.tracker) as watch:
        print(f"a plate of {format_size(plate.nbytes)} is watched by {watch.tracker}")
        save(file, plate, [slice(0, len(plate))])
        digests.append(digest(plate))
        for number in range(options.checkpoints):
            for step in range(STEPS):
                simulate(plate, number + step / STEPS)
            written = watch.harvest()
            save(file, plate, written.slices())
            digests.append(digest(plate))
            history.append(written)

    report(file.tell(), plate.nbytes, history)
    file.seek(0)
    restored = [digest(state) for state in restore(file, plate.shape)]
    equal = restored == digests
    print(f"{len(restored)} checkpoints were restored: {'all are equal' if equal else 'NOT ALL ARE EQUAL'}")
    if options.plot:
        draw(options.plot, history)
        print(f"the picture is in {options.plot}")
    return 0 if equal else 1


def simulate(plate: Plate, time: float) -> None:
    """Two spots move on and heat what is around them. Nothing else is written."""
    for period, start in ((48, 0.0), (31, 0.5)):
        turn = math.tau * (time / period + start)
        reach = round(SPOT * (0.6 + 0.4 * math.sin(2 * turn)))
        row, column = (
            round(side / 2 + (side / 2 - SPOT) * math.sin(turn + phase))
            for side, phase in zip(plate.shape, (0.0, 1.0), strict=True)
        )
        around = plate[row - reach : row + reach, column - reach : column + reach]
        around[reach, reach] += 100.0
        inner = around[1:-1, 1:-1]
        inner += 0.2 * (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * inner)


def save(file: IO[bytes], plate: Plate, pieces: list[slice]) -> None:
    """Append a checkpoint: rows of the plate."""
    for piece in pieces:
        file.write(PIECE.pack(piece.start, piece.stop - piece.start))
        file.write(plate[piece].data)
    file.write(END)


def restore(file: IO[bytes], shape: tuple[int, ...]) -> Iterator[Plate]:
    """The plate at each checkpoint of a file, in order; one array, that changes."""
    plate = np.zeros(shape)
    while head := file.read(PIECE.size):
        if len(head) != PIECE.size:
            raise OSError("the file ends within a checkpoint")
        first, count = PIECE.unpack(head)
        if head == END:
            yield plate
        elif not 0 <= first < first + count <= len(plate):
            raise OSError(f"rows {first} to {first + count} are not on the plate: the file is damaged")
        else:
            rows = file.read(plate[:count].nbytes)
            if len(rows) != plate[:count].nbytes:
                raise OSError("the file ends within a checkpoint")
            plate[first : first + count] = np.frombuffer(rows).reshape(count, -1)


def digest(plate: Plate) -> bytes:
    """What tells one state of the plate from another."""
    return hashlib.blake2b(plate.data).digest()


def report(used: int, size: int, history: list[dirtylog.Written]) -> None:
    """What the checkpoints cost, and would have."""
    whole = size * (len(history) + 1)
    pages = [written.pages.count() for written in history]
    print(f"from one to the next, {min(pages)} to {max(pages)} of {history[0].pages.pages} pages were written")
    print(f"checkpoints take {format_size(used)}; whole ones would take {format_size(whole)}, {whole / used:.1f} times")


def draw(path: Path, history: list[dirtylog.Written]) -> None:
    """How many pages each step wrote, and below it where in the plate they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'dirtylog[plot]'") from error
    checkpoints, pages = len(history), history[0].pages.pages
    edges = np.linspace(0, pages, min(pages, 256) + 1).astype(int).tolist()
    shares = [
        [written.pages.count(low, high - low) / (high - low) for low, high in pairwise(edges)] for written in history
    ]

    figure = Figure(figsize=(8, 5), layout="constrained")
    count, strip = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    count.bar(range(1, checkpoints + 1), [written.pages.count() for written in history], width=1.0, color="#5b2a86")
    count.set(
        ylabel="pages written", title=f"What each checkpoint holds of {pages} pages ({format_size(pages * PAGE_SIZE)})"
    )
    image = strip.imshow(
        np.transpose(shares),
        aspect="auto",
        cmap="magma_r",
        interpolation="nearest",
        extent=(0.5, checkpoints + 0.5, pages, 0),
    )
    strip.set(xlabel="checkpoint", ylabel="page of the array")
    figure.colorbar(image, ax=strip, label="share written")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    raise SystemExit(main())

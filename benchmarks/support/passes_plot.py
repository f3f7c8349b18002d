"""A plot of what each pass of a migration leaves to be sent, as it came and as it was foreseen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.support.measure import Run
from benchmarks.support.report import completed
from dirtylog.errors import UsageError
from dirtylog.units import MIB, PAGE_SIZE, format_duration


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draw, for each peer, the run with the median total time.

    Raises:
        UsageError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib", remedy="pip install 'dirtylog[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, peer in enumerate(dict.fromkeys(run.peer for run in runs)):
        ended = sorted((run for run in completed(runs) if run.peer == peer), key=lambda run: run.total)
        if not ended:
            continue
        run, color = ended[len(ended) // 2], f"C{number}"
        first = run.x_passes[0].pages + run.x_passes[0].zero_pages
        real = [(one.seconds, one.dirtied) for one in run.x_passes[:-1]]
        axes.plot(
            *_curve(first, real), color=color, marker="o", markersize=3, label=f"{peer}: {format_duration(run.total)}"
        )
        if run.predicted is not None:
            foreseen = [(one.seconds, one.dirtied) for one in run.predicted.passes]
            label = f"foreseen: {format_duration(run.predicted.total)}"
            axes.plot(*_curve(first, foreseen), color=color, linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="seconds", ylabel="MiB to be sent", title="What each pass leaves", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _curve(first: int, passes: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """Seconds, and MiB left."""
    times = np.cumsum([0.0, *(seconds for seconds, _ in passes)])
    left = np.array([first, *(pages for _, pages in passes)]) * PAGE_SIZE / MIB
    return times.tolist(), left.tolist()

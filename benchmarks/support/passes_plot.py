"""A plot of what each pass of a migration leaves to be sent, as it came and as it was foreseen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.support.measure import Run
from benchmarks.support.report import completed
from dirtylog.cli.prediction_report import PredictionInfo
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
        label = f"{peer}: {format_duration(run.total)}"
        axes.plot(*_came(run), color=color, marker="o", markersize=3, label=label)
        if run.predicted is not None:
            label = f"foreseen: {format_duration(run.predicted.total)}"
            axes.plot(*_foreseen(run.predicted), color=color, linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="seconds", ylabel="MiB to be sent", title="What each pass leaves", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _came(run: Run) -> tuple[list[float], list[float]]:
    """Seconds, and MiB left. Of a migration with many passes only the last are known."""
    passes = [(one.seconds, one.dirtied) for one in run.x_passes[:-1]]
    if run.x_passes[0].number == 1:
        return _curve(0.0, [(0.0, run.x_passes[0].pages), *passes])
    return _curve(run.total - sum(one.seconds for one in run.x_passes), passes)


def _foreseen(predicted: PredictionInfo) -> tuple[list[float], list[float]]:
    passes = [(one.seconds, one.dirtied) for one in predicted.passes]
    return _curve(0.0, [(0.0, predicted.passes[0].pages), *passes])


def _curve(began: float, passes: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    times = began + np.cumsum([seconds for seconds, _ in passes])
    left = np.maximum([pages for _, pages in passes], 1) * PAGE_SIZE / MIB  # the scale has no 0
    return times.tolist(), left.tolist()

"""What was measured of trackers, drawn."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.support.timing import Samples
from benchmarks.support.tracker_report import collect_and_clear
from benchmarks.support.tracker_runs import IN_RUNS, SCATTERED, Measurement
from dirtylog.errors import HostError
from dirtylog.units import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES: Final = (8, 3.5)
_DOTS_PER_INCH: Final = 120


def draw(of_tracker: Sequence[Measurement], folder: Path) -> Path:
    """Draw one tracker's times of collecting and clearing over the pages written; the picture's path.

    Raises:
        HostError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostError(
            "charts need matplotlib, which is not installed", remedy="pip install 'dirtylog[plot]'"
        ) from error
    tracker, size = of_tracker[0].tracker, of_tracker[0].size
    figure = Figure(figsize=_INCHES, layout="constrained")
    figure.suptitle(f"{tracker}: collecting and clearing {format_size(size)}")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, layout in ((left, SCATTERED), (right, IN_RUNS)):
        _plot(axes, [measured for measured in of_tracker if measured.case.layout in ("", layout)])
        axes.set_title(f"pages {layout}", fontsize="medium")
        axes.set_xlabel("% of pages written")
    left.set_ylabel("ms")
    left.set_ylim(bottom=0)
    left.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tracker}.png"
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path


def _plot(axes: "Axes", measured: Sequence[Measurement]) -> None:
    for name, samples in (
        ("dirtylog", [collect_and_clear(one.ours) for one in measured]),
        ("C", [collect_and_clear(one.raw) for one in measured]),
    ):
        if all(samples):
            below, medians, above = _bars(samples)
            axes.errorbar(
                [one.case.percent for one in measured], medians, yerr=(below, above), label=name, marker="o", capsize=3
            )


def _bars(samples: Sequence[Samples]) -> tuple[list[float], list[float], list[float]]:
    """The medians in ms, and how far the extremes are from them."""
    medians = [statistics.median(times) for times in samples]
    below = [(median - min(times)) * 1e3 for median, times in zip(medians, samples, strict=True)]
    above = [(max(times) - median) * 1e3 for median, times in zip(medians, samples, strict=True)]
    return below, [median * 1e3 for median in medians], above

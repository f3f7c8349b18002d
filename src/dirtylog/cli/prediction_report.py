"""How forecasts of migrations are shown: a table, JSON, a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from rich.table import Table

from dirtylog.errors import HostError, UsageError
from dirtylog.migration.prediction import Prediction, Scenario
from dirtylog.units import MIB, PAGE_SIZE, format_duration, format_rate, format_size

AT_SYNC: Final = "at-sync"
"""In place of a size: the log is cleared as it is collected."""

_FOR_EVER: Final = "for ever"


class PredictedPassInfo(msgspec.Struct, frozen=True):
    """A pass as JSON: see `migration.prediction.PredictedPass`."""

    pages: int
    seconds: float
    dirtied: int


class PredictionInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """A forecast as JSON, with what it is for: seconds, bytes, bytes a second. No clear-chunk: cleared at the sync."""

    bandwidth: float
    first_bandwidth: float
    switchover_bandwidth: float
    guest_speed: float
    downtime_limit: float
    clear_chunk: int | None
    converges: bool
    total: float
    downtime: float | None
    bytes: int
    passes: list[PredictedPassInfo]


def info(scenario: Scenario, prediction: Prediction) -> PredictionInfo:
    """One forecast for programs."""
    return PredictionInfo(
        bandwidth=scenario.bandwidth,
        first_bandwidth=scenario.first_bandwidth or scenario.bandwidth,
        switchover_bandwidth=scenario.switchover_bandwidth or scenario.bandwidth,
        guest_speed=scenario.guest_speed,
        downtime_limit=scenario.downtime_limit,
        clear_chunk=scenario.clear_chunk if scenario.split else None,
        converges=prediction.converges,
        total=prediction.total,
        downtime=prediction.downtime if prediction.converges else None,
        bytes=prediction.bytes,
        passes=[PredictedPassInfo(one.pages, one.seconds, one.dirtied) for one in prediction.passes],
    )


def table(scenarios: Sequence[Scenario], predictions: Sequence[Prediction]) -> Table:
    """All of them for people, a row each; passes with the one while the guest stands still."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("bandwidth", "limit", "clear", "total", "downtime", "passes", "sent"):
        result.add_column(name, justify="right", no_wrap=True)
    for scenario, prediction in zip(scenarios, predictions, strict=True):
        result.add_row(*_scenario_texts(scenario), *_prediction_texts(prediction))
    return result


def draw(path: Path, scenarios: Sequence[Scenario], predictions: Sequence[Prediction], stored: int) -> None:
    """Draw what each pass leaves to be sent over time; ``stored`` pages are to be sent at first.

    Raises:
        UsageError: there is no matplotlib, or it does not know the kind of file.
        HostError: the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib", remedy="pip install 'dirtylog[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["turbo"](np.linspace(0.05, 0.95, len(scenarios))))
    for scenario, prediction in zip(scenarios, predictions, strict=True):
        times = np.cumsum([0.0, *(one.seconds for one in prediction.passes)])
        left = np.array([stored, *(one.dirtied for one in prediction.passes)]) * PAGE_SIZE / MIB
        end = format_duration(prediction.total) if prediction.converges else _FOR_EVER
        label = f"{', '.join(_scenario_texts(scenario))}: {end}"
        axes.plot(times, left, marker="o", markersize=3, label=label)
    axes.set(xlabel="seconds", ylabel="MiB to be sent", title="What each pass leaves")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="bandwidth, limit, clear: total", fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise HostError(
            f"cannot write the plot {path}: {error.strerror or error}", remedy="choose a place you may write to"
        ) from error
    except ValueError as error:
        raise UsageError(f"cannot draw {path}: {error}", remedy="use a name that ends in .png or .svg") from error


def _scenario_texts(scenario: Scenario) -> tuple[str, str, str]:
    clear = format_size(scenario.clear_chunk) if scenario.split else AT_SYNC
    return format_rate(scenario.bandwidth), format_duration(scenario.downtime_limit), clear


def _prediction_texts(prediction: Prediction) -> tuple[str, ...]:
    if not prediction.converges:
        return (_FOR_EVER,)
    return (
        format_duration(prediction.total),
        format_duration(prediction.downtime),
        f"{len(prediction.passes) + 1:,}",
        format_size(prediction.bytes),
    )

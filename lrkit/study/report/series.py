"""Curves over steps, of several seeds."""

import math
import statistics
from collections.abc import Iterator, Sequence

from lrkit.study.charts import Curve, thin
from lrkit.study.report.view import View
from lrkit.study.results import CellRecord

_POINTS = 160  # of a curve, at most

Series = Sequence[tuple[int, float]]
"""(step, value) of one run."""


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean over an odd window, cut off at the ends; NaN stays NaN, alone."""
    half = max(0, window // 2)
    out = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return out


def over_seeds(runs: Sequence[Series]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return step, mean, lowest and highest over the runs that have a finite value at the step; thinned."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, value in run:
            at.setdefault(step, [])
            if math.isfinite(value):
                at[step].append(value)
    steps = sorted(at)
    steps = [steps[i] for i in thin(len(steps), _POINTS)]
    of = [at[step] for step in steps]
    return (
        [float(step) for step in steps],
        [statistics.fmean(values) if values else math.nan for values in of],
        [min(values, default=math.nan) for values in of],
        [max(values, default=math.nan) for values in of],
    )


def curve_of(
    view: View,
    row: int,
    runs: Sequence[Series],
    crosses: Sequence[tuple[float, float, str]] = (),
    *,
    marks: bool = False,
) -> Curve:
    """Return a row's curve: the mean over its runs, and a band if there are several."""
    x, mean, low, high = over_seeds(runs)
    several = sum(1 for run in runs if run) > 1
    return Curve(
        label=view.label(row),
        style=view.styles[row],
        x=x,
        y=mean,
        low=low if several else (),
        high=high if several else (),
        crosses=crosses,
        marks=marks,
    )


def diverging(cell: CellRecord, smoothed: Sequence[float]) -> Iterator[tuple[float, float, str]]:
    """Find the step at which a run's loss stopped being a number."""
    steps = [step for step, _ in cell.losses]
    for i in range(1, len(steps)):
        if math.isfinite(smoothed[i - 1]) and not math.isfinite(smoothed[i]):
            yield float(steps[i - 1]), smoothed[i - 1], f"seed {cell.seed} diverged at step {steps[i]}"
            return

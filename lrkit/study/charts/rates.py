"""Scores over one setting that was tuned, such as the learning rate, with the chosen value and the default marked."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.study.charts.axes import Show, finite, framed, minus, spread
from lrkit.study.charts.canvas import Canvas
from lrkit.study.charts.curves import Curve, draw_curve
from lrkit.study.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = 3.0
"""Values that are positive and whose ends are at least so many times apart are drawn on a logarithmic axis."""


def is_log(values: Sequence[float]) -> bool:
    """Tell if values are drawn on a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= LOG


def rates(
    curves: Sequence[Curve],
    *,
    width: int = 320,
    height: int = 210,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    chosen: tuple[float, float] | None = None,
    default: float | None = None,
    show: Show = "{:.4g}".format,
) -> str:
    """Draw the score over a setting's values: a line for each combination of the other settings, bars from seed to seed.

    Args:
        curves: the lines; `Curve.low` and `Curve.high` are the ends of the bars, and a y of NaN is a run that diverged.
        width: in pixels.
        height: in pixels.
        x_label: below the x axis.
        y_label: above the y axis.
        x_range: lowest and highest value; that of the data if None.
        y_range: likewise.
        chosen: (x, y) of the point that was chosen, which gets a ring.
        default: the value without tuning, which gets an upright line.
        show: writes a y value in a tooltip.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    known = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if finite(x, y)]
    if not known:
        return ""
    values = [x for curve in curves for x in curve.x] + ([] if default is None else [default])
    values += [] if x_range is None else list(x_range)
    log = is_log(values)
    low, high = min(values), max(values)
    xs = (low / (high / low) ** 0.06, high * (high / low) ** 0.06) if log and high > low else spread(values, 0.08)
    edges = [v for curve in curves for v in (*curve.low, *curve.high) if math.isfinite(v)]
    ys = y_range or spread([y for _, y in known] + edges, 0.1)
    canvas = Canvas(width, height)
    shows = ("{:g}".format, None)
    axes = framed(canvas, xs, ys, right=14, labels=(x_label, y_label), shows=shows, x_log=log)
    if default is not None:
        (line,) = axes.plot([default, default], ys, color=LIGHT["soft"], linewidth=1.25, linestyle=(0, (4, 3)))
        canvas.tip(line, f"default: {default:g}")
    for curve in curves:
        for x, y, bottom, top in zip(curve.x, curve.y, curve.low or curve.y, curve.high or curve.y, strict=True):
            if finite(x, y, bottom, top) and bottom < top:
                axes.plot([x, x], [bottom, top], color=curve.style.hex, linewidth=1.25)
            elif finite(x) and not math.isfinite(y):
                (cross,) = axes.plot(
                    [x], [ys[0]], "x", color=LIGHT["bad"], markersize=8, markeredgewidth=2, clip_on=False
                )
                canvas.tip(cross, f"{curve.label}, {x_label} {x:g}: diverged".lstrip(", "))
        draw_curve(canvas, axes, attrs.evolve(curve, low=(), high=()))
        _mark_points(canvas, axes, curve, x_label, show)
    if chosen is not None and finite(*chosen):
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2}
        (mark,) = axes.plot(
            [chosen[0]],
            [chosen[1]],
            "o",
            markeredgecolor=LIGHT["ink"],
            clip_on=False,
            **ring,  # type: ignore[arg-type]
        )
        canvas.tip(mark, f"chosen: {x_label} {chosen[0]:g}, {minus(show(chosen[1]))}")
    return canvas.inline(f"{y_label or 'score'} over {x_label or 'a setting'}")


def _mark_points(canvas: Canvas, axes: "Axes", curve: Curve, x_label: str, show: Show) -> None:
    """Draw the points of a line, with tooltips that tell the ends of their bars."""
    points, titles = [], []
    for x, y, low, high in zip(curve.x, curve.y, curve.low or curve.y, curve.high or curve.y, strict=True):
        if finite(x, y):
            bar = f" ({minus(show(low))} to {minus(show(high))})" if finite(low, high) and low < high else ""
            points.append((x, y))
            titles.append(f"{curve.label}, {x_label} {x:g}: {minus(show(y))}{bar}".lstrip(", "))
    if points:
        drawn = {"color": curve.style.hex, "markersize": 5.0, "markeredgewidth": 0, "clip_on": False}
        (marks,) = axes.plot(*zip(*points, strict=True), "o", **drawn)  # type: ignore[arg-type]
        canvas.tip(marks, *titles)

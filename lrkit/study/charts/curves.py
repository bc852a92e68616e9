"""Lines over steps. Values that are not finite are left out."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.study.charts.axes import Show, finite, framed, minus, spread
from lrkit.study.charts.canvas import Canvas, cut, readable, width_of
from lrkit.study.charts.palette import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOOLTIPS = 40  # of a curve, at most


@attrs.frozen(kw_only=True)
class Curve:
    """One line of a line chart.

    Args:
        label: its name.
        style: how it is drawn.
        x: [n] ascending.
        y: [n]; NaN breaks the line.
        low: [n] lower edge of the band; empty for none.
        high: [n] upper edge.
        step: constant up to the next x.
        width: of the stroke.
        crosses: (x, y, tooltip) of events to mark, for example that a run diverged.
        marks: show the points themselves.
    """

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    step: bool = False
    width: float = 1.75
    crosses: Sequence[tuple[float, float, str]] = ()
    marks: bool = False


def thin(count: int, most: int) -> list[int]:
    """Return at most `most` indices into `count` points, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def lines(
    curves: Sequence[Curve],
    *,
    width: int = 320,
    height: int = 200,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    names: bool = False,
    show: Show | None = None,
) -> str:
    """Draw lines with bands over steps, for a page.

    Args:
        curves: the lines, drawn in order.
        width: in pixels.
        height: in pixels.
        x_label: below the x axis.
        y_label: above the y axis.
        x_range: of the x axis; that of the data if None.
        y_range: of the y axis; that of the data if None.
        names: name the lines at their right ends.
        show: writes a y value in a tooltip.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    known = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if finite(x, y)]
    if not known:
        return ""
    edges = [v for c in curves for v in (*c.low, *c.high) if math.isfinite(v)]
    canvas = Canvas(width, height)
    room = min(0.25 * width, 12 + max(width_of(readable(c.label)) for c in curves)) if names else 18.0
    axes = framed(
        canvas,
        x_range or spread([x for x, _ in known], 0.0),
        y_range or spread([y for _, y in known] + edges),
        right=room,
        labels=(x_label, y_label),
    )
    for curve in curves:
        draw_curve(canvas, axes, curve, show=show or (lambda value: minus(f"{value:.4g}")), x_label=x_label)
    if names:
        _name_ends(axes, curves, room - 8)
    return canvas.inline(f"{y_label or 'lines'} over {x_label or 'x'}")


def draw_curve(canvas: Canvas, axes: "Axes", curve: Curve, *, show: Show | None = None, x_label: str = "") -> None:
    """Draw one line with its band and crosses, and with tooltips if there is a way to write their values."""
    colour, y = curve.style.hex, [value if math.isfinite(value) else math.nan for value in curve.y]
    if curve.low and curve.high:
        low, high = ([v if math.isfinite(v) else math.nan for v in edge] for edge in (curve.low, curve.high))
        how = "post" if curve.step else None
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.13, linewidth=0, step=how)  # type: ignore[arg-type]
    kind = "steps-post" if curve.step else "default"
    drawn = {"linewidth": curve.width, "linestyle": curve.style.line, "drawstyle": kind}
    axes.plot(curve.x, y, color=colour, solid_joinstyle="round", **drawn)  # type: ignore[arg-type]
    for at, value, told in curve.crosses:
        if finite(at, value):
            (cross,) = axes.plot([at], [value], "x", color=colour, markersize=8, markeredgewidth=2, clip_on=False)
            canvas.tip(cross, told)
    if show is None:
        return
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    points, titles = [], []
    for i in thin(len(curve.x), _TOOLTIPS):
        if finite(curve.x[i], y[i]) and left <= curve.x[i] <= right and bottom <= y[i] <= top:
            band = f" ({show(curve.low[i])} to {show(curve.high[i])})" if curve.low and curve.high else ""
            points.append((curve.x[i], y[i]))
            titles.append(f"{curve.label}, {x_label} {curve.x[i]:g}: {show(y[i])}{band}")
    if points:
        seen = {"markersize": 5.0} if curve.marks else {"markersize": 12.0, "alpha": 0.0}
        (marks,) = axes.plot(
            *zip(*points, strict=True),
            "o",
            color=colour,
            markeredgewidth=0,
            clip_on=False,
            **seen,  # type: ignore[arg-type]
        )
        canvas.tip(marks, *titles)


def _name_ends(axes: "Axes", curves: Sequence[Curve], room: float) -> None:
    """Write each line's name beside its right end, no two over each other."""
    box = axes.get_window_extent()
    ends = []
    for curve in curves:
        last = [value for value in curve.y if math.isfinite(value)]
        if last:
            ends.append((float(axes.transData.transform((axes.get_xlim()[1], last[-1]))[1]), curve))
    for at, curve in _apart(ends, 14, box.y0 + 4, box.y1 - 4):
        place = axes.transAxes.inverted().transform((box.x1 + 6, at))
        name = cut(curve.label, room)
        how: dict[str, Any] = {"va": "center_baseline", "transform": axes.transAxes}
        axes.text(float(place[0]), float(place[1]), name, color=curve.style.hex, **how)


def _apart(items: Sequence[tuple[float, Curve]], gap: float, low: float, high: float) -> list[tuple[float, Curve]]:
    """Move labels until they are `gap` apart, as near to their places as that allows, within [low, high]."""
    placed: list[tuple[float, Curve]] = []
    for at, item in sorted(items, key=lambda pair: pair[0]):
        placed.append((max(at, placed[-1][0] + gap) if placed else max(at, low), item))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = (min(placed[i][0], limit), placed[i][1])
        limit = placed[i][0] - gap
    return placed

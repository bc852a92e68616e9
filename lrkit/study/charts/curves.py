"""Lines over steps, and marks with two coordinates. Values that are not finite are left out."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.study.charts.canvas import CHARACTER, OVER, TEXT, Canvas, cut, readable
from lrkit.study.charts.palette import LIGHT, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Show = Callable[[float], str]
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


@attrs.frozen(kw_only=True)
class Point:
    """One mark of a scatter chart: x, y ± error. It is drawn full if it lies on the front, and hollow if not."""

    label: str
    style: Style
    x: float
    y: float
    error: float | None = None
    front: bool = False
    title: str = ""


def thin(count: int, most: int) -> list[int]:
    """Return at most `most` indices into `count` points, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def minus(text: str) -> str:
    """Write a number's text with a true minus sign."""
    return text.replace("-", "−")


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
    finite = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if _finite(x, y)]
    if not finite:
        return ""
    edges = [v for c in curves for v in (*c.low, *c.high) if math.isfinite(v)]
    canvas = Canvas(width, height)
    room = min(0.25 * width, 12 + max(len(c.label) for c in curves) * CHARACTER) if names else 12.0
    axes = _framed(
        canvas,
        x_range or _spread([x for x, _ in finite], 0.0),
        y_range or _spread([y for _, y in finite] + edges),
        right=room,
        labels=(x_label, y_label),
    )
    for curve in curves:
        draw_curve(canvas, axes, curve, show=show or (lambda value: minus(f"{value:.4g}")), x_label=x_label)
    if names:
        _name_ends(axes, curves, int((room - 10) / CHARACTER))
    return canvas.inline(", ".join(filter(None, (y_label, x_label and f"over {x_label}"))) or "lines")


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
        if _finite(at, value):
            (cross,) = axes.plot([at], [value], "x", color=colour, markersize=8, markeredgewidth=2, clip_on=False)
            canvas.tip(cross, told)
    if show is None:
        return
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    points, titles = [], []
    for i in thin(len(curve.x), _TOOLTIPS):
        if _finite(curve.x[i], y[i]) and left <= curve.x[i] <= right and bottom <= y[i] <= top:
            band = f" ({show(curve.low[i])} to {show(curve.high[i])})" if curve.low and curve.high else ""
            points.append((curve.x[i], y[i]))
            titles.append(f"{curve.label}, {x_label} {curve.x[i]:g}: {show(y[i])}{band}")
    if points:
        seen = {"markersize": 5.0} if curve.marks else {"markersize": 12.0, "alpha": 0.0}
        (marks,) = axes.plot(
            *zip(*points, strict=True), "o", color=colour, markeredgewidth=0, clip_on=False, **seen  # type: ignore[arg-type]
        )
        canvas.tip(marks, *titles)


def scatter(
    points: Sequence[Point],
    *,
    width: int = 640,
    height: int = 360,
    x_label: str = "",
    y_label: str = "",
    x_show: Show = "{:g}".format,
    y_show: Show | None = None,
    x_log: bool = False,
    front: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw marks with error bars, their names beside them, and a front, for a page.

    Args:
        points: the marks. On a logarithmic axis those with x <= 0 cannot be drawn: ask for a linear one.
        width: in pixels.
        height: in pixels.
        x_label: below the x axis.
        y_label: above the y axis.
        x_show: writes an x tick.
        y_show: writes a y tick.
        x_log: logarithmic x.
        front: corners (x, y) of the front, x ascending; drawn as stairs.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    shown = [p for p in points if _finite(p.x, p.y) and (p.x > 0 or not x_log)]
    if not shown:
        return ""
    xs = [p.x for p in shown]
    left, right = (min(xs) / 1.35, max(xs) * 1.35) if x_log else _spread(xs, 0.12)
    left = max(left, 0.0) if min(xs) >= 0 and not x_log else left
    ys = _spread([p.y + s * (p.error or 0.0) for p in shown for s in (-1, 1)], 0.08)
    canvas = Canvas(width, height)
    axes = _framed(
        canvas, (left, right), ys, right=14, labels=(x_label, y_label), shows=(x_show, y_show), x_log=x_log
    )
    if front:
        corners = [(front[0][0], ys[0]), *front, (right, front[-1][1])]
        (stairs,) = axes.step(
            *zip(*corners, strict=True), where="post", color=LIGHT["soft"], linestyle=(0, (5, 4)), linewidth=1
        )
        canvas.tip(stairs, "Pareto front")
    for p in shown:
        colour = p.style.hex
        if p.error:
            axes.errorbar(p.x, p.y, p.error, color=colour, elinewidth=1.25, capsize=4, capthick=1.25)
        inside = colour if p.front else LIGHT["paper"]
        (mark,) = axes.plot(
            [p.x], [p.y], p.style.marker, color=inside, markeredgecolor=colour, markersize=9, markeredgewidth=1.75
        )
        canvas.tip(mark, p.title or p.label)
    _name_marks(axes, shown)
    return canvas.inline(f"{y_label} against {x_label}")


def _framed(
    canvas: Canvas,
    xs: tuple[float, float],
    ys: tuple[float, float],
    *,
    right: float,
    labels: tuple[str, str],
    shows: tuple[Show | None, Show | None] = (None, None),
    x_log: bool = False,
) -> "Axes":
    """Add axes for a page: labels above and below, ticks, and as much room on the left as the ticks take."""
    x_label, y_label = labels
    axes = canvas.axes(40, 36 if x_label else 22, right, 24 if y_label else 8)
    limit(axes, xs, ys, x_log=x_log, tick_every=(70, 48), shows=shows)
    texts = axes.yaxis.get_major_formatter().format_ticks(
        [t for t in axes.yaxis.get_major_locator()() if ys[0] <= t <= ys[1]]
    )
    left = 10 + max((len(text) for text in texts), default=1) * 6.4
    axes.set_position(
        (
            left / canvas.width,
            axes.get_position().y0,
            (canvas.width - left - right) / canvas.width,
            axes.get_position().height,
        )
    )
    canvas.figure.text(1 - right / canvas.width, 3 / canvas.height, readable(x_label), ha="right", color=LIGHT["soft"])
    canvas.figure.text(
        1 / canvas.width, 1 - 2 / canvas.height, readable(y_label), va="top", color=LIGHT["soft"]
    ) if y_label else None
    return axes


def limit(
    axes: "Axes",
    xs: tuple[float, float],
    ys: tuple[float, float],
    *,
    x_log: bool = False,
    tick_every: tuple[float, float] = (70, 48),
    shows: tuple[Show | None, Show | None] = (None, None),
) -> None:
    """Set the ranges of axes, their grid, and round ticks so many pixels apart.

    Args:
        axes: to set.
        xs: range of x, whole steps unless it is logarithmic.
        ys: range of y.
        x_log: logarithmic x.
        tick_every: pixels from one tick to the next, about.
        shows: write an x and a y tick; matplotlib's own if None.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    box = axes.get_window_extent()
    across, up = max(2, int(box.width / tick_every[0])), max(3, int(box.height / tick_every[1]))
    if x_log:
        axes.set_xscale("log")
        decades = math.log10(xs[1] / xs[0])
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(across, integer=shows[0] is None, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(up, steps=[1, 2, 5, 10]))
    for axis, show in zip((axes.xaxis, axes.yaxis), shows, strict=True):
        if show is not None:
            axis.set_major_formatter(FuncFormatter(lambda value, _, show=show: show(value)))
        elif hasattr(axis.get_major_formatter(), "set_useOffset"):
            axis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
    axes.set_xlim(*xs)
    axes.set_ylim(*ys)
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0, pad=4)
    axes.tick_params(axis="x", length=4, pad=2)


def _name_ends(axes: "Axes", curves: Sequence[Curve], most: int) -> None:
    """Write each line's name beside its right end, no two over each other."""
    box = axes.get_window_extent()
    ends = []
    for curve in curves:
        last = [value for value in curve.y if math.isfinite(value)]
        if last:
            ends.append((float(axes.transData.transform((axes.get_xlim()[1], last[-1]))[1]), curve))
    for at, curve in _apart(ends, 14, box.y0 + 4, box.y1 - 4):
        place = axes.transAxes.inverted().transform((box.x1 + 6, at))
        axes.text(
            *place, cut(curve.label, most), color=curve.style.hex, va="center_baseline", transform=axes.transAxes
        )


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


Box = tuple[float, float, float, float]


def _name_marks(axes: "Axes", points: Sequence[Point]) -> None:
    """Write each mark's name at a place beside it that covers nothing, if there is one."""
    at = [tuple(map(float, axes.transData.transform((p.x, p.y)))) for p in points]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in at]
    for p, (x, _) in zip(points, at, strict=True):
        if p.error:
            ends = [float(axes.transData.transform((p.x, p.y + s * p.error))[1]) for s in (-1, 1)]
            taken.append((x - 2, ends[0], x + 2, ends[1]))
    within = axes.get_window_extent()
    for p, (x, y) in zip(points, at, strict=True):
        spot = _spot(x, y, len(p.label) * CHARACTER, taken, (within.x0, within.y0, within.x1, within.y1))
        if spot is not None:
            taken.append(spot)
            place = axes.transData.inverted().transform((spot[0], spot[1] + 3))
            axes.text(*place, readable(p.label), color=p.style.hex, fontsize=TEXT).set_gid(OVER)


def _spot(x: float, y: float, wide: float, taken: Sequence[Box], within: Box) -> Box | None:
    """Find a place for a label beside a mark; None if each of them covers something."""
    tall = TEXT + 2
    places = [(10.0, -7.0), (-10 - wide, -7.0), (8, 7.0), (8, -21.0), (-8 - wide, 7.0), (-8 - wide, -21.0)]
    places += [(-wide / 2, 10.0), (-wide / 2, -24.0), (10, 20.0), (10, -34.0)]
    for dx, dy in places:
        box = (x + dx, y + dy, x + dx + wide, y + dy + tall)
        inside = box[0] >= within[0] and box[2] <= within[2] and box[1] >= within[1] and box[3] <= within[3] + 8
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return box
    return None


def _spread(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """Return the lowest and the highest with a little air; constant data stand in the middle of a range."""
    low, high = min(values), max(values)
    air = (high - low) * pad if high > low else abs(high) * 0.05 or 1.0
    return low - air, high + air


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)

"""Axes: ranges, round ticks, a grid, and labels outside of what is drawn."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lrkit.study.charts.canvas import TICK, Canvas, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Show = Callable[[float], str]
"""Writes a number."""


def minus(text: str) -> str:
    """Write a number's text with a true minus sign."""
    return text.replace("-", "−")


def framed(
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
    limit(axes, xs, ys, x_log=x_log, shows=shows)
    texts = axes.yaxis.get_major_formatter().format_ticks(
        [t for t in axes.yaxis.get_major_locator()() if ys[0] <= t <= ys[1]]
    )
    left = 8 + max((width_of(text, TICK) for text in texts), default=0.0)
    place, wide = axes.get_position(), (canvas.width - left - right) / canvas.width
    axes.set_position((left / canvas.width, place.y0, wide, place.height))
    canvas.label(-right, -4, x_label)
    canvas.label(1, 2, y_label)
    return axes


def limit(
    axes: "Axes",
    xs: tuple[float, float],
    ys: tuple[float, float],
    *,
    x_log: bool = False,
    shows: tuple[Show | None, Show | None] = (None, None),
) -> None:
    """Set the ranges of axes, their grid, and round ticks, about 70 pixels apart on x and 48 on y.

    Args:
        axes: to set.
        xs: range of x, whole steps unless it is logarithmic.
        ys: range of y.
        x_log: logarithmic x.
        shows: write an x and a y tick; matplotlib's own if None.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    box = axes.get_window_extent()
    across, up = max(2, int(box.width / 70)), max(3, int(box.height / 48))
    if x_log:
        axes.set_xscale("log")
        decades = math.log10(xs[1] / xs[0])
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(across, integer=shows[0] is None, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(up + 2, steps=[1, 2, 5, 10]))
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


def spread(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """Return the lowest and the highest with a little air; constant data stand in the middle of a range."""
    low, high = min(values), max(values)
    air = (high - low) * pad if high > low else abs(high) * 0.05 or 1.0
    return low - air, high + air


def finite(*values: float) -> bool:
    """Return True if no value is NaN or infinite."""
    return all(math.isfinite(value) for value in values)

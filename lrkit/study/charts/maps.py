"""Cells, bars, intervals, and a row's own mark. Values that are not finite are left out."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.study.charts.canvas import OVER, TICK, Canvas, cut, readable, width_of
from lrkit.study.charts.palette import LIGHT, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@attrs.frozen
class Cell:
    """One cell of a heat map: a value (NaN if the cell exists and has none), the text in it, and its tooltip."""

    value: float
    text: str
    title: str = ""


@attrs.frozen(kw_only=True)
class Bar:
    """One bar: its value as a length and as text; `second` is a thinner one below it."""

    label: str
    style: Style
    value: float
    text: str
    second: float | None = None
    second_text: str = ""
    title: str = ""


def grid_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Take layers' names apart into module and block: the block is the last number, and the module the rest behind it.

    For example ``bert.encoder.layer.3.output.dense`` is the module ``output.dense`` of block 3.
    """
    places = {}
    for name in names:
        match = re.match(r"(?:.*\.)?(\d+)\.(.+)$", name)
        places[name] = (match.group(2), int(match.group(1))) if match else (name, 0)
    return places


def heat_map(cells: Mapping[str, Cell], *, top: float, colour: str = "heat") -> str:
    """Draw cells by module and block for a page: the fuller the colour, the nearer to `top`.

    Args:
        cells: layer's name to its cell.
        top: the value of the full colour; 0 has none.
        colour: name of the colour.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    if not cells:
        return ""
    places = grid_of(list(cells))
    modules, blocks = _modules(places), sorted({block for _, block in places.values()})
    names = _short_names(modules)
    longest = max(width_of(cell.text, TICK) for cell in cells.values())
    wide = min(44, max(22 if len(blocks) > 8 else 34, math.ceil(longest) + 4))
    margin = math.ceil(8 + max(width_of(readable(name), TICK) for name in names))
    x_label = "transformer block" if len(blocks) > 1 else ""
    right = max(2.0, width_of(x_label) + 4 - margin - wide * len(blocks))
    canvas = Canvas(math.ceil(margin + wide * len(blocks) + right), 22 * len(modules) + 38)
    axes = canvas.axes(margin, 38, right, 0)
    draw_cells(canvas, axes, cells, top=top, colour=colour, size=(wide, 22), names=names)
    if x_label:
        canvas.label(-2, -4, x_label)
    return canvas.inline("heat map")


def draw_cells(
    canvas: Canvas,
    axes: "Axes",
    cells: Mapping[str, Cell],
    *,
    top: float,
    colour: str,
    size: tuple[float, float] = (44, 22),
    names: Sequence[str] = (),
) -> None:
    """Draw cells into axes, modules from top to bottom and blocks from left to right.

    Args:
        canvas: of the axes.
        axes: to draw into.
        cells: layer's name to its cell.
        top: the value of the full colour.
        colour: name of the colour.
        size: of a cell in pixels, with which texts are compared; they are left out if they are wider.
        names: shown for the modules; their own if there are none.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    places = grid_of(list(cells))
    modules, blocks = _modules(places), sorted({block for _, block in places.values()})
    squares, colours, edges = [], [], []
    gaps = 1 / size[0], 1 / size[1]
    for name, cell in cells.items():
        module, block = places[name]
        i, j = blocks.index(block), modules.index(module)
        known = math.isfinite(cell.value)
        share = min(1.0, max(0.0, cell.value / top)) if known and top > 0 else 0.0
        x, y = (i + gaps[0], i + 1 - gaps[0]), (j + gaps[1], j + 1 - gaps[1])
        squares.append([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])])
        colours.append((*to_rgba(LIGHT[colour])[:3], share))
        edges.append("solid" if known else (0, (2, 2)))
        if cell.text and width_of(cell.text, TICK) <= size[0]:
            ink = LIGHT["paper"] if share > 0.6 else LIGHT["ink"]
            axes.text(i + 0.5, j + 0.55, cell.text, ha="center", va="center", color=ink, fontsize=TICK)
    drawn = PolyCollection(squares, facecolors=colours, edgecolors=LIGHT["rule"], linestyles=edges, linewidths=1)
    axes.add_collection(drawn, autolim=False)
    if len(cells) > 1 and any(cell.title for cell in cells.values()):
        canvas.tip(drawn, *(cell.title for cell in cells.values()))
    elif cells:
        canvas.tip(drawn, next(iter(cells.values())).title)
    axes.set_xlim(0, len(blocks))
    axes.set_ylim(len(modules), 0)
    fits = [block for block in blocks if width_of(str(block), TICK) <= size[0]]
    axes.set_xticks([blocks.index(block) + 0.5 for block in fits], [str(block) for block in fits])
    axes.set_yticks([j + 0.5 for j in range(len(modules))], [readable(name) for name in names or modules])
    axes.tick_params(length=0, pad=4)
    axes.spines[:].set_visible(False)


def _modules(places: Mapping[str, tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(module for module, _ in places.values()))


def _short_names(modules: Sequence[str]) -> list[str]:
    """Return each module's last part, or all but the last, or all: the first of these that tells them apart."""
    ways: list[Callable[[str], str]] = [
        lambda m: m.rpartition(".")[2],
        lambda m: m.rpartition(".")[0] or m,
        lambda m: m,
    ]
    names = [[way(module) for way in ways] for module in modules]
    every = Counter(name for options in names for name in set(options))
    return [next((option for option in options if every[option] == 1), options[-1]) for options in names]


def bars(items: Sequence[Bar], *, width: int = 320, reference: float | None = None) -> str:
    """Draw horizontal bars from zero for a page, the name above each, its value at the end.

    Args:
        items: the bars, top to bottom; a NaN has its name and text alone.
        width: in pixels.
        reference: a value to draw a line at.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    lengths = [v for item in items for v in (item.value, item.second) if v is not None and math.isfinite(v)]
    if not lengths:
        return ""
    room = 12 + max(width_of(readable(text), TICK) for item in items for text in (item.text, item.second_text))
    top = max(*lengths, reference or 0.0, 0.0) or 1.0
    height = 4 + sum(36 if item.second is None else 45 for item in items)
    canvas = Canvas(width, height)
    axes = canvas.axes(1, 0, 0, 0)
    axes.set_xlim(0, top * (width - 1) / (width - 1 - room))
    axes.set_ylim(height, 0)
    axes.axis("off")
    gap = axes.get_xlim()[1] * 5 / width
    y = 2.0
    for item in items:
        axes.text(0, y + 10, cut(item.label, width - 4), zorder=3)
        y += 14
        for value, text, tall in ((item.value, item.text, 11), (item.second, item.second_text, 7)):
            if value is None:
                continue
            end = max(0.0, value) if math.isfinite(value) else 0.0
            opacity = 0.85 if tall == 11 else 0.45
            (bar,) = axes.barh(y + tall / 2, end, tall, color=item.style.hex, alpha=opacity, linewidth=0)
            canvas.tip(bar, item.title or item.label)
            axes.text(
                end + gap, y + tall / 2 + 4, readable(text), color=LIGHT["soft"], fontsize=TICK, zorder=3
            ).set_gid(OVER)
            y += tall + (3 if tall == 11 else 2)
        y += 8
    if reference is not None:  # behind the bars
        axes.plot([reference] * 2, [16, height - 8], color=LIGHT["soft"], linestyle=(0, (2, 2)), linewidth=1, zorder=0)
    return canvas.inline("bars")


def interval(
    low: float | None,
    middle: float,
    high: float | None,
    *,
    bounds: tuple[float, float],
    style: Style,
    margin: float | None = None,
    width: int = 96,
) -> str:
    """Draw a mark with its interval, a line at zero, and a band of what does not matter: one line of a forest plot.

    An interval that has no width is left out, since it says how coarse the scores are, and not how certain they are.

    Args:
        low: lower end; None for none.
        middle: the mark.
        high: upper end.
        bounds: left and right end of the scale.
        style: of the mark.
        margin: half the width of the band around zero; None for none.
        width: in pixels.
    """
    left, right = bounds
    if not all(map(math.isfinite, (middle, left, right))):
        return ""
    if not right > left:
        left, right = left - 1, right + 1
    canvas = Canvas(width, 18)
    axes = canvas.axes(6, 0, 6, 0)
    axes.axis("off")
    axes.set_xlim(left, right)
    axes.set_ylim(0, 18)
    if margin is not None:
        band = [max(-margin, left), min(margin, right)]
        axes.plot(
            [sum(band) / 2] * 2,
            [0, 18],
            color=LIGHT["rule"],
            linewidth=(band[1] - band[0]) / (right - left) * (width - 12),
        )
    if left <= 0 <= right:
        axes.plot([0, 0], [0, 18], color=LIGHT["soft"], linestyle=(0, (2, 2)), linewidth=1)
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high) and low < high:
        axes.plot([low, high], [9, 9], color=style.hex, linewidth=1.25)
    axes.plot([middle], [9], style.marker, color=style.hex, markersize=8, markeredgewidth=0, clip_on=False)
    return canvas.inline("difference and interval")


def chip(style: Style) -> str:
    """Draw a row's mark, which stands beside its name: a dash of its line with its marker."""
    canvas = Canvas(22, 12)
    axes = canvas.axes(0, 0, 0, 0)
    axes.axis("off")
    axes.set_xlim(0, 22)
    axes.set_ylim(0, 12)
    axes.plot([0, 22], [6, 6], color=style.hex, linewidth=1.75, linestyle=style.line)
    axes.plot([11], [6], style.marker, color=style.hex, markersize=8, markeredgewidth=0)
    return canvas.inline("")

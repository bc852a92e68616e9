"""Marks with two coordinates, for example score against parameters. Values that are not finite are left out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.study.charts.axes import Show, finite, framed, spread
from lrkit.study.charts.canvas import OVER, TEXT, Canvas, readable, width_of
from lrkit.study.charts.palette import LIGHT, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def scatter(
    points: Sequence[Point],
    *,
    width: int = 640,
    height: int = 360,
    x_label: str = "",
    y_label: str = "",
    x_show: Show = "{:g}".format,
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
        x_log: logarithmic x.
        front: corners (x, y) of the front, x ascending; drawn as stairs.

    Returns:
        An ``svg`` element; empty if there is nothing to show.
    """
    shown = [p for p in points if finite(p.x, p.y) and (p.x > 0 or not x_log)]
    if not shown:
        return ""
    xs = [p.x for p in shown]
    left, right = (min(xs) / 1.35, max(xs) * 1.35) if x_log else spread(xs, 0.12)
    left = max(left, 0.0) if min(xs) >= 0 and not x_log else left
    ys = spread([p.y + s * (p.error or 0.0) for p in shown for s in (-1, 1)], 0.08)
    canvas = Canvas(width, height)
    axes = framed(canvas, (left, right), ys, right=24, labels=(x_label, y_label), shows=(x_show, None), x_log=x_log)
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


Box = tuple[float, float, float, float]


def _name_marks(axes: "Axes", points: Sequence[Point]) -> None:
    """Write each mark's name at a place beside it that covers nothing, if there is one."""
    at = [tuple(map(float, axes.transData.transform((p.x, p.y)))) for p in points]
    taken = _Taken((x - 7, y - 7, x + 7, y + 7) for x, y in at)
    for p, (x, _) in zip(points, at, strict=True):
        if p.error:
            ends = [float(axes.transData.transform((p.x, p.y + s * p.error))[1]) for s in (-1, 1)]
            taken.add((x - 2, ends[0], x + 2, ends[1]))
    within = axes.get_window_extent()
    for p, (x, y) in zip(points, at, strict=True):
        spot = _spot(x, y, width_of(readable(p.label)), taken, (within.x0, within.y0, within.x1, within.y1))
        if spot is not None:
            taken.add(spot)
            place = axes.transData.inverted().transform((spot[0], spot[1] + 3))
            axes.text(float(place[0]), float(place[1]), readable(p.label), color=p.style.hex, fontsize=TEXT).set_gid(
                OVER
            )


class _Taken:
    """Boxes that are taken, by the tiles that they lie in: of thousands of marks, only the near ones are looked at."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        self._tiles: dict[tuple[int, int], list[Box]] = {}
        for box in boxes:
            self.add(box)

    def add(self, box: Box) -> None:
        """Take a box."""
        for tile in self._tiles_of(box):
            self._tiles.setdefault(tile, []).append(box)

    def meets(self, box: Box) -> bool:
        """Tell if a box covers part of one that is taken."""
        near = (each for tile in self._tiles_of(box) for each in self._tiles.get(tile, ()))
        return any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in near)

    def _tiles_of(self, box: Box) -> Iterator[tuple[int, int]]:
        left, low, right, top = (int(max(0.0, min(side / 24, 200.0))) for side in box)
        return ((x, y) for x in range(left, right + 1) for y in range(low, top + 1))


def _spot(x: float, y: float, wide: float, taken: "_Taken", within: Box) -> Box | None:
    """Find a place for a label beside a mark; None if each of them covers something."""
    tall = TEXT + 2
    places = [(10.0, -7.0), (-10 - wide, -7.0), (8, 7.0), (8, -21.0), (-8 - wide, 7.0), (-8 - wide, -21.0)]
    places += [(-wide / 2, 10.0), (-wide / 2, -24.0), (10, 20.0), (10, -34.0)]
    for dx, dy in places:
        box = (x + dx, y + dy, x + dx + wide, y + dy + tall)
        inside = box[0] >= within[0] and box[2] <= within[2] and box[1] >= within[1] and box[3] <= within[3] + 8
        if inside and not taken.meets(box):
            return box
    return None

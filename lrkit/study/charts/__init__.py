"""Charts for the report's page and for the pictures of runs, drawn by matplotlib.

- `lrkit.study.charts.palette`: colours by name, on light paper and on dark, and how a row is told apart from others.
- `lrkit.study.charts.canvas`: a drawing area, and how it becomes part of a page or a file.
- `lrkit.study.charts.axes`: ranges, ticks and labels.
- `lrkit.study.charts.curves`, `scatter`, `maps`: lines; marks; cells, bars and intervals.

A chart is drawn in the colours of light paper. In a page each of these becomes the CSS variable of its name, so that one
drawing fits both; see `Canvas.inline`.
"""

from lrkit.study.charts.axes import minus
from lrkit.study.charts.canvas import Canvas, drawing
from lrkit.study.charts.curves import Curve, lines, thin
from lrkit.study.charts.maps import Bar, Cell, bars, chip, grid_of, heat_map, interval
from lrkit.study.charts.palette import DARK, LIGHT, Style, styles
from lrkit.study.charts.scatter import Point, scatter

__all__ = [
    "DARK",
    "LIGHT",
    "Bar",
    "Canvas",
    "Cell",
    "Curve",
    "Point",
    "Style",
    "bars",
    "chip",
    "drawing",
    "grid_of",
    "heat_map",
    "interval",
    "lines",
    "minus",
    "scatter",
    "styles",
    "thin",
]

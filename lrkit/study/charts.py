"""Charts as SVG text: pure functions from numbers to strings, for a page that brings its own colours.

A chart takes its size in pixels and is never scaled, so that text is as large as it says: 12 px, ticks 11 px. Colours
are the page's: what belongs to a row has the row's CSS class, which sets ``color``, and is drawn in ``currentColor``;
everything else has a class of its own (``axis``, ``tick``, ``soft``, ``heat``). Values can be read off: each mark carries
a ``<title>``. What is NaN is left out; a chart with nothing to show is the empty string.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

import attrs

Show = Callable[[float], str]

_CHARACTER = 7.2  # widest usual mean width of a character at 12 px, in pixels: room for labels is reckoned with it
_TICK = 6.0  # the same at 11 px


@attrs.frozen
class Style:
    """How a row is drawn: a CSS class that sets its colour, and for what shares the colour a dash and a marker."""

    css: str
    dash: str = ""
    shape: int = 0


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
        crosses: (x, y, what) of events to mark.
        marks: whether the points themselves are drawn.
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
    """One mark of a scatter chart: x, y ± error, and whether it lies on the front (drawn full)."""

    label: str
    style: Style
    x: float
    y: float
    error: float | None = None
    front: bool = False
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


# ---- scales ---------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers in [low, high], about so many: steps of 1, 2 or 5 times a power of ten; one if low == high.

    Args:
        low: the lower end.
        high: the upper end.
        about: how many.
        whole: whole numbers alone.
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    # A step wider than half the range may have no multiple in it: then the next finer one.
    finer = [m * power * f for f in (1, 0.1) for m in (10, 5, 2, 1) if m * power * f <= step * 1.001]
    for each in [s for s in finer if s >= 1] or [1.0] if whole else finer:
        first, last = math.ceil(low / each - 1e-9), math.floor(high / each + 1e-9)
        if first <= last:
            break
    return [round(i * each, 12 - math.floor(math.log10(each))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten in [low, high]; where they are few also 3 times them, or 2 and 5 times."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= about - 2:
            break
    return found


def plain(values: Sequence[float]) -> Show:
    """Writes numbers with as many decimals as tell these apart."""
    gaps = [abs(b - a) for a, b in pairwise(values) if b != a]
    places = max(0, math.ceil(-math.log10(min(gaps)) - 1e-9)) if gaps else 2
    return lambda value: minus(f"{value:.{min(places, 8)}f}")


def minus(text: str) -> str:
    """A number's text with a true minus sign."""
    return text.replace("-", "−")


@attrs.frozen
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def _range(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """Lowest and highest with a little air; constant data in the middle of a range."""
    low, high = min(values), max(values)
    air = (high - low) * pad or abs(high) * 0.05 or 1.0
    return low - air, high + air


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


# ---- curves ---------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over an odd window, cut off at the ends; NaN stays NaN, and is in no mean of others."""
    half = max(0, window // 2)
    out = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return out


def thin(count: int, most: int) -> list[int]:
    """At most `most` indices into `count` points, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


# ---- charts ---------------------------------------------------------------------------------------------------------


def lines(
    curves: Sequence[Curve],
    *,
    width: int = 340,
    height: int = 200,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    names: bool = False,
    show: Show | None = None,
) -> str:
    """A line chart with bands, over steps.

    Args:
        curves: the lines, drawn in order.
        width: in pixels.
        height: in pixels.
        x_label: under the x axis.
        y_label: above the y axis.
        x_range: of the x axis; None for that of the data.
        y_range: of the y axis; None for that of the data.
        names: name the lines at their right ends.
        show: writes a y value in a tooltip.
    """
    every = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if _finite(x, y)]
    if not every:
        return ""
    edges = [v for c in curves for v in (*c.low, *c.high) if math.isfinite(v)]
    low, high = y_range or _range([y for _, y in every] + edges)
    left, right = x_range or (min(x for x, _ in every), max(x for x, _ in every))
    if left == right:
        left, right = left - 1, right + 1
    y_ticks = ticks(low, high, max(2, height // 48))
    write = plain(y_ticks)
    show = show or (lambda value: minus(f"{value:.4g}"))
    margin = 8 + max(len(write(t)) for t in y_ticks) * _TICK
    room = 10.0
    if names:
        room = min(0.25 * width, 12 + max(len(c.label) for c in curves) * _CHARACTER)
    x = _Scale(left, right, margin, width - room)
    y = _Scale(low, high, height - 34, 22 if y_label else 8)
    parts = _frame(
        x, y, ticks(left, right, max(2, int(x.end - x.start) // 70), whole=True), y_ticks, write, x_label, y_label
    )
    for curve in curves:
        parts.append(f'<g class="{escape(curve.style.css)}">{_band(curve, x, y)}{_path(curve, x, y)}')
        for at, value, what in curve.crosses:
            if _finite(at, value):
                cross = f"M{x(at) - 4:.1f} {y(value) - 4:.1f}l8 8m0 -8l-8 8"
                parts.append(f'<path class="cross" d="{cross}"><title>{escape(what)}</title></path>')
        for i in thin(len(curve.x), 40):
            if _finite(curve.x[i], curve.y[i]):
                band = f" ({show(curve.low[i])} to {show(curve.high[i])})" if curve.low and curve.high else ""
                title = escape(f"{curve.label}, {x_label} {curve.x[i]:g}: {show(curve.y[i])}{band}")
                seen = "dot" if curve.marks else "hover"
                parts.append(
                    f'<circle class="{seen}" cx="{x(curve.x[i]):.1f}" cy="{y(curve.y[i]):.1f}" '
                    f'r="{2.5 if curve.marks else 6}"><title>{title}</title></circle>'
                )
        parts.append("</g>")
    if names:
        ends = []
        for curve in curves:
            last = [value for value in curve.y if math.isfinite(value)]
            if last:
                ends.append((y(last[-1]), curve))
        for at, curve in _apart(ends, 14, y.end, y.start):
            text = _cut(curve.label, int((room - 10) / _CHARACTER))
            parts.append(_text(f"name {curve.style.css}", x.end + 6, at + 4, text, curve.label))
    return _svg(width, height, parts, ", ".join(filter(None, (y_label, x_label and f"over {x_label}"))))


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
    """A scatter chart with error bars, names at the marks, and a front.

    Args:
        points: the marks. On a logarithmic axis those with x <= 0 cannot be drawn: ask for a linear one.
        width: in pixels.
        height: in pixels.
        x_label: under the x axis.
        y_label: above the y axis.
        x_show: writes an x tick.
        x_log: logarithmic x.
        front: corners (x, y) of the front, x ascending; drawn as stairs.
    """
    shown = [p for p in points if _finite(p.x, p.y) and (p.x > 0 or not x_log)]
    if not shown:
        return ""
    low, high = _range([p.y + s * (p.error or 0.0) for p in shown for s in (-1, 1)], 0.08)
    xs = [p.x for p in shown]
    if x_log:
        left, right = min(xs) / 1.35, max(xs) * 1.35
        x_ticks = log_ticks(left, right, max(3, width // 110))
    else:
        left, right = _range(xs, 0.12)
        left = max(left, 0.0) if min(xs) >= 0 else left
        x_ticks = ticks(left, right, max(2, width // 110))
    y_ticks = ticks(low, high, max(2, height // 50))
    write = plain(y_ticks)
    margin = 8 + max(len(write(t)) for t in y_ticks) * _TICK
    x = _Scale(left, right, margin, width - 12, x_log)
    y = _Scale(low, high, height - 36, 24)
    parts = _frame(x, y, x_ticks, y_ticks, write, x_label, y_label, x_show)
    if front:
        stairs = f"M{x(front[0][0]):.1f} {y.start:.1f}V{y(front[0][1]):.1f}"
        stairs += "".join(f"H{x(a):.1f}V{y(b):.1f}" for a, b in front[1:]) + f"H{x.end:.1f}"
        parts.append(f'<path class="front" d="{stairs}"><title>Pareto front</title></path>')
    taken = [(x(p.x) - 7, y(p.y) - 7, x(p.x) + 7, y(p.y) + 7) for p in shown]
    bars = [(x(p.x) - 2, y(p.y + p.error), x(p.x) + 2, y(p.y - p.error)) for p in shown if p.error]
    for p in shown:
        parts.append(f'<g class="{escape(p.style.css)}">')
        if p.error:
            top, bottom = y(p.y + p.error), y(p.y - p.error)
            parts.append(
                f'<path class="error" d="M{x(p.x):.1f} {top:.1f}V{bottom:.1f}m-4 0h8M{x(p.x) - 4:.1f} {top:.1f}h8"/>'
            )
        full = "full" if p.front else "hollow"
        parts.append(
            f'<path class="{full}" d="{marker(p.style.shape, x(p.x), y(p.y))}">'
            f"<title>{escape(p.title or p.label)}</title></path></g>"
        )
    for p in shown:
        spot = _spot(x(p.x), y(p.y), len(p.label) * _CHARACTER, taken + bars, (x.start, y.end, x.end, y.start))
        if spot is not None:
            taken.append(spot)
            parts.append(_text(f"name {p.style.css}", spot[0], spot[3] - 3, p.label))
    return _svg(width, height, parts, f"{y_label} against {x_label}")


def heat_map(
    values: Mapping[tuple[str, str], tuple[float, str, str]],
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    *,
    top: float,
    css: str = "heat",
    x_label: str = "",
) -> str:
    """A heat map: the fuller the colour, the nearer to `top`.

    Args:
        values: (row, column) to (value, text in the cell, tooltip); NaN for a cell that exists and has no value.
        rows: (key, name shown), top to bottom.
        columns: keys, which are shown, left to right.
        top: the value of the full colour; 0 has none.
        css: class that sets the colour.
        x_label: under the columns.
    """
    if not values:
        return ""
    longest = max((len(text) for _, text, _ in values.values()), default=0)
    wide = min(44, max(22 if len(columns) > 8 else 34, math.ceil(longest * _TICK) + 4))
    tall, margin = 22, 5 + max(len(name) for _, name in rows) * _TICK
    width, height = math.ceil(margin + wide * len(columns)), tall * len(rows) + 38
    parts = [f'<g class="{escape(css)}">']
    for j, (key, name) in enumerate(rows):
        parts.append(_text("tick end", margin - 6, tall * j + 16, name, key))
        for i, column in enumerate(columns):
            if (key, column) not in values:
                continue
            value, text, title = values[key, column]
            share = min(1.0, max(0.0, value / top)) if _finite(value) and top > 0 else 0.0
            at = f'x="{margin + wide * i:.0f}" y="{tall * j + 2}" width="{wide - 2}" height="{tall - 2}"'
            kind = "cell" if _finite(value) else "cell none"
            parts.append(f'<rect class="{kind}" {at} fill-opacity="{share:.2f}"><title>{escape(title)}</title></rect>')
            if text and len(text) * _TICK <= wide:
                ink = "tick mid in" if share > 0.75 else "tick mid on"
                parts.append(_text(ink, margin + wide * (i + 0.5) - 1, tall * j + 16, text))
    under = tall * len(rows) + 16
    parts += [
        _text("tick mid", margin + wide * (i + 0.5) - 1, under, column)
        for i, column in enumerate(columns)
        if len(column) * _TICK <= wide
    ]
    if x_label:
        parts.append(_text("soft end", width - 2, under + 17, x_label))
    return _svg(width, height, [*parts, "</g>"], "heat map")


def bars(items: Sequence[Bar], *, width: int = 340, reference: float | None = None) -> str:
    """Horizontal bars from zero, the name above each, its value at the end.

    Args:
        items: the bars, top to bottom; a NaN has its name and text alone.
        width: in pixels.
        reference: a value to draw a line at.
    """
    lengths = [v for item in items for v in (item.value, item.second) if v is not None and math.isfinite(v)]
    if not lengths:
        return ""
    room = 10 + max(len(text) for item in items for text in (item.text, item.second_text)) * _TICK
    top = max(*lengths, reference or 0.0, 0.0) or 1.0
    x = _Scale(0.0, top, 1.0, width - room)
    parts, y = [], 0.0
    for item in items:
        name = _cut(item.label, int(width / _CHARACTER))
        parts.append(f'<g class="{escape(item.style.css)}"><title>{escape(item.title or item.label)}</title>')
        parts.append(_text("over", 1, y + 12, name))
        y += 17
        for value, text, tall in ((item.value, item.text, 11), (item.second, item.second_text, 7)):
            if value is None:
                continue
            end = x(max(0.0, value)) if math.isfinite(value) else x.start
            css = "bar" if tall == 11 else "bar second"
            parts.append(f'<rect class="{css}" x="1" y="{y:.0f}" width="{max(0.0, end - 1):.1f}" height="{tall}"/>')
            parts.append(_text("tick over", end + 5, y + tall / 2 + 4, text))
            y += tall + (3 if tall == 11 else 2)
        parts.append("</g>")
        y += 5
    if reference is not None:  # behind the bars
        parts.insert(0, f'<path class="reference" d="M{x(reference):.1f} 16V{y - 4:.0f}"/>')
    return _svg(width, math.ceil(y), parts, "bars")


def interval(
    low: float | None, middle: float, high: float | None, *, bounds: tuple[float, float], style: Style, width: int = 96
) -> str:
    """A mark with its interval on a scale of its own, with a line at zero: one line of a forest plot."""
    left, right = bounds
    if not _finite(middle, left, right):
        return ""
    x = _Scale(left, right, 5, width - 5) if right > left else _Scale(left - 1, right + 1, 5, width - 5)
    parts = [f'<path class="reference" d="M{x(0.0):.1f} 0V18"/>'] if left <= 0 <= right else []
    parts.append(f'<g class="{escape(style.css)}">')
    if low is not None and high is not None and _finite(low, high):
        parts.append(f'<path class="error" d="M{x(low):.1f} 9H{x(high):.1f}"/>')
    parts.append(f'<path class="full" d="{marker(style.shape, x(middle), 9)}"/></g>')
    return _svg(width, 18, parts, "difference and interval")


def stacked(parts: Sequence[tuple[str, str, float]], *, width: int = 340) -> str:
    """One bar in shares: (CSS class, tooltip, amount)."""
    total = sum(amount for _, _, amount in parts)
    if total <= 0:
        return ""
    out, x = [], 0.0
    for css, title, amount in parts:
        wide = width * amount / total
        tip = f"<title>{escape(title)}</title>"
        out.append(f'<rect class="{escape(css)}" x="{x:.1f}" y="0" width="{wide:.1f}" height="8">{tip}</rect>')
        x += wide
    return _svg(width, 8, out, "progress")


def chip(style: Style, *, dashed: bool = True) -> str:
    """A row's mark beside its name: a dash of its line with its marker."""
    dash = f' stroke-dasharray="{style.dash}"' if style.dash and dashed else ""
    return (
        f'<svg class="chip {escape(style.css)}" width="22" height="12" aria-hidden="true">'
        f'<path class="line" d="M0 6H22"{dash}/><path class="full" d="{marker(style.shape, 11, 6)}"/></svg>'
    )


def marker(shape: int, x: float, y: float) -> str:
    """The outline of a marker about (x, y): a disc, a square, a triangle or a diamond."""
    if shape % 4 == 0:
        return f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"
    if shape % 4 == 1:
        return f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"
    if shape % 4 == 2:
        return f"M{x:.1f} {y - 5:.1f}l5 9h-10z"
    return f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"


# ---- parts ----------------------------------------------------------------------------------------------------------


def _svg(width: int, height: int, parts: Sequence[str], name: str) -> str:
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(css: str, x: float, y: float, text: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<text class="{escape(css)}" x="{x:.1f}" y="{y:.1f}">{escape(text)}{tip}</text>'


def _frame(
    x: _Scale,
    y: _Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    write: Show,
    x_label: str,
    y_label: str,
    x_show: Show | None = None,
) -> list[str]:
    """Axes with ticks and labels."""
    x_show = x_show or plain(x_ticks)
    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{x.start:.1f} {y(tick):.1f}H{x.end:.1f}"/>')
        parts.append(_text("tick end", x.start - 5, y(tick) + 4, write(tick)))
    parts.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    for tick in x_ticks:
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {y.start:.1f}v4"/>')
        text = x_show(tick)
        # the outermost must not run out of the picture
        half = len(text) * _TICK / 2
        at = min(x(tick), x.end + 10 - half)
        parts.append(_text("tick mid", at, y.start + 16, text))
    if x_label:
        parts.append(_text("soft end", x.end, y.start + 31, x_label))
    if y_label:
        parts.append(_text("soft", 1, 12, y_label))
    return parts


def _path(curve: Curve, x: _Scale, y: _Scale) -> str:
    d, drawing = [], False
    for a, b in zip(curve.x, curve.y, strict=True):
        if not _finite(a, b):
            drawing = False
            continue
        if drawing and curve.step:
            d.append(f"H{x(a):.1f}V{y(b):.1f}")
        else:
            d.append(f"{'L' if drawing else 'M'}{x(a):.1f} {y(b):.1f}")
        drawing = True
    dash = f' stroke-dasharray="{curve.style.dash}"' if curve.style.dash else ""
    return f'<path class="line" stroke-width="{curve.width:g}"{dash} d="{"".join(d)}"/>'


def _band(curve: Curve, x: _Scale, y: _Scale) -> str:
    if not curve.low or not curve.high:
        return ""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for a, low, high in zip(curve.x, curve.low, curve.high, strict=True):
        if _finite(a, low, high):
            runs[-1].append((a, low, high))
        elif runs[-1]:
            runs.append([])
    d = []
    for run in runs:
        if len(run) > 1:
            over = "L".join(f"{x(a):.1f} {y(high):.1f}" for a, _, high in run)
            under = "L".join(f"{x(a):.1f} {y(low):.1f}" for a, low, _ in reversed(run))
            d.append(f"M{over}L{under}Z")
    return f'<path class="band" d="{"".join(d)}"/>' if d else ""


def _apart(items: Sequence[tuple[float, Curve]], gap: float, top: float, bottom: float) -> list[tuple[float, Curve]]:
    """Labels moved along y until they are `gap` apart, as near to their places as that allows, within the chart."""
    placed: list[tuple[float, Curve]] = []
    for at, item in sorted(items, key=lambda pair: pair[0]):
        placed.append((max(at, placed[-1][0] + gap) if placed else max(at, top), item))
    limit = bottom
    for i in reversed(range(len(placed))):
        placed[i] = (min(placed[i][0], limit), placed[i][1])
        limit = placed[i][0] - gap
    return placed


Box = tuple[float, float, float, float]


def _spot(x: float, y: float, wide: float, taken: Sequence[Box], within: Box) -> Box | None:
    """A place for a label beside a mark that covers nothing; None where there is none."""
    tall = 14.0
    places = [(10.0, -7.0), (-10 - wide, -7.0), (8, -21.0), (8, 7.0), (-8 - wide, -21.0), (-8 - wide, 7.0)]
    places += [(-wide / 2, -24.0), (-wide / 2, 10.0), (10, -34.0), (10, 20.0)]
    for dx, dy in places:
        box = (x + dx, y + dy, x + dx + wide, y + dy + tall)
        inside = box[0] >= within[0] and box[2] <= within[2] and box[1] >= within[1] - 8 and box[3] <= within[3]
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return box
    return None


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"

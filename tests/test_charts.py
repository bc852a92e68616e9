"""Charts: drawn where the numbers say, inside of their box, readable as part of a page and as a file."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkit.study import charts
from lrkit.study.charts import DARK, LIGHT, Bar, Canvas, Cell, Curve, Point, Style, thin
from lrkit.study.report.series import smooth

STYLE = Style("h0")
BAD = '<script>alert("1")</script>&amp;'


@pytest.fixture(autouse=True)
def _drawing() -> Iterator[None]:
    with charts.drawing():
        yield


def curve(y: list[float], **changes: Any) -> Curve:
    return Curve(**({"label": BAD, "style": STYLE, "x": range(1, len(y) + 1), "y": y} | changes))


def line_of(svg: str, colour: str = "h0") -> str:
    """The path of the one line in a colour."""
    (path,) = re.findall(rf'<path d="([^"]*)" style="fill: none; stroke: var\(--{colour}\)', svg)
    return str(path)


def texts(svg: str) -> list[tuple[str, float, float]]:
    found = [node for node in ElementTree.fromstring(svg).iter() if node.tag == "text"]
    return [("".join(node.itertext()), float(node.get("x", "nan")), float(node.get("y", "nan"))) for node in found]


DATA: dict[str, list[float]] = {
    "point": [0.5],
    "constant": [0.5] * 5,
    "zero": [0.0] * 5,
    "gap": [0.1, math.nan, 0.3, 0.4, math.inf, 0.2],
    "large": [1e12, 3e12],
    "small": [1e-9, 2e-9],
    "negative": [-1.0, -2.0, 3.0],
}


@pytest.mark.parametrize("name", DATA)
def test_odd_data_stay_inside(name: str) -> None:
    """Whatever the numbers, every coordinate is finite and in the picture, and a name is text."""
    y = DATA[name]
    drawn = [
        charts.lines([curve(y, low=y, high=y)], x_label=BAD, y_label=BAD, names=True),
        charts.scatter([Point(label=BAD, style=STYLE, x=abs(v), y=v, error=abs(v)) for v in y]),
        charts.scatter([Point(label=BAD, style=STYLE, x=abs(v), y=v) for v in y], x_log=True),
        charts.heat_map({f"{BAD}.{i}.a": Cell(v, f"{v:.0f}", BAD) for i, v in enumerate(y)}, top=1),
        charts.bars([Bar(label=BAD, style=STYLE, value=abs(v), text=BAD, second=abs(v)) for v in y], reference=1.0),
        charts.interval(min(y), y[0], max(y), bounds=(min(y), max(y)), style=STYLE),
    ]
    for svg in drawn:
        if svg:
            inside(svg)
            assert BAD not in svg


def inside(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    assert width > 0 < height
    shapes = {id(node) for defs in root.iter("defs") for node in defs.iter()}
    for node in root.iter():
        if id(node) in shapes or node.tag in ("svg", "title"):
            continue
        for name, most in (("x", width), ("y", height)):
            if name in node.attrib:
                assert -0.5 <= float(node.attrib[name]) <= most + 0.5, node.attrib
        for x, y in re.findall(r"[ML](-?[\d.]+|nan|inf) (-?[\d.]+|nan|inf)", node.get("d", "")):
            assert -8 <= float(x) <= width + 8
            assert -8 <= float(y) <= height + 8


def test_nothing_to_draw_is_nothing() -> None:
    """A chart without a finite value is the empty string."""
    assert charts.lines([]) == charts.lines([curve([])]) == charts.lines([curve([math.nan])]) == ""
    assert charts.scatter([]) == charts.heat_map({}, top=1) == charts.bars([]) == ""
    assert charts.scatter([Point(label="a", style=STYLE, x=0.0, y=1.0)], x_log=True) == ""
    assert charts.interval(None, math.nan, None, bounds=(0, 1), style=STYLE) == ""


def test_a_gap_breaks_the_line() -> None:
    """A NaN in the middle makes two pieces, straight or in steps."""
    y = [0.1, 0.2, math.nan, 0.3, 0.4]
    assert re.sub(r"[-\d. ]", "", line_of(charts.lines([curve(y)]))) == "MLML"
    stairs = line_of(charts.lines([curve(y, step=True)]))
    assert stairs.count("M") == 2
    places = [tuple(map(float, place)) for place in re.findall(r"[ML]([\d.]+) ([\d.]+)", stairs.split("M")[1] + "M")]
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(places))  # along x, then along y


def test_values_are_in_tooltips() -> None:
    """Each mark can be read off."""
    svg = charts.lines([curve([0.25, 0.5], label="a", low=[0.2, 0.4], high=[0.3, 0.6])], x_label="step")
    assert "<title>a, step 2: 0.5 (0.4 to 0.6)</title>" in svg
    svg = charts.bars([Bar(label="a", style=STYLE, value=2.0, text="2", title="a: two")])
    assert "<title>a: two</title>" in svg
    svg = charts.heat_map({"l.0.q": Cell(1.0, "1", "one"), "l.1.q": Cell(math.nan, "–", "none")}, top=1)
    assert re.findall(r"<path[^>]*fill: ([^;]*);[^>]*><title>(\w+)</title>", svg) == [
        ("var(--heat)", "one"),
        ("none", "none"),
    ]


def test_lines_are_to_scale() -> None:
    """Equal steps are equally far apart, up is more, and the ticks stand beside the values that they name."""
    svg = charts.lines([curve([0.0, 5.0, 10.0])], y_range=(0.0, 10.0), x_range=(1, 3))
    places = re.findall(r"([\d.]+) ([\d.]+)", line_of(svg))
    (x1, y1), (x2, y2), (x3, y3) = [(float(x), float(y)) for x, y in places]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)
    assert y1 > y3
    ticks = {text: y for text, x, y in texts(svg) if x < x1}
    middle = (ticks["0"] + ticks["10"]) / 2
    assert ticks["0"] - ticks["10"] == pytest.approx(y1 - y3, abs=0.21)
    assert middle - (y1 + y3) / 2 == pytest.approx(4, abs=1.5)  # a figure's base is below its middle


def test_decades_are_equal() -> None:
    """On a logarithmic axis ten times as much is as far again."""
    points = [Point(label="", style=STYLE, x=x, y=0.5, title="mark") for x in (1e3, 1e4, 1e5)]
    marks = re.findall(r'<g><title>mark</title>.*?<use href="[^"]*" x="([\d.]+)"', charts.scatter(points, x_log=True))
    a, b, c = map(float, marks)
    assert b - a == pytest.approx(c - b, abs=0.21)


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_names_keep_apart(end: float) -> None:
    """Seven lines that end at one place have seven names below each other, inside of the picture."""
    curves = [curve([0.0, 1.0], label="row"), *(curve([0.5, end + i / 1000], label=f"row {i}") for i in range(6))]
    svg = charts.lines(curves, width=780, height=340, names=True)
    at = sorted(y for text, _, y in texts(svg) if text.startswith("row"))
    assert len(at) == 7
    assert at[0] > 10
    assert at[-1] < 330
    assert min(b - a for a, b in itertools.pairwise(at)) >= 13.9


@settings(max_examples=20)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_can_be_told_apart(low: float, span: float) -> None:
    """There are two or more, no two are written alike, and none is cut off at the left."""
    with charts.drawing():
        svg = charts.lines([curve([low, low + span], label="a")])
    ticks = [(text, x) for text, x, y in texts(svg) if x < 200 and y < 186]
    assert len(ticks) >= 2
    assert len({text for text, _ in ticks}) == len(ticks)
    assert all(x >= len(text) * 6 for text, x in ticks)


def test_a_dollar_is_a_dollar() -> None:
    """A name is no formula, and a letter that no font has, or half of one, raises nothing."""
    svg = charts.lines([curve([0.0, 1.0], label="$x$ 漢\ud800\x00")], names=True)
    assert "$x$ 漢��" in [text for text, _, _ in texts(svg)]


def test_colours_follow_the_page() -> None:
    """In a page every colour is a variable that both papers have; no two of one paper are equal."""
    svg = charts.lines([curve([0.0, 1.0], style=style) for style in charts.styles(9, 0)], y_label="y", x_label="x")
    assert not re.search(r"#[0-9a-f]{6}\b(?!m)", re.sub(r'href="[^"]*"', "", svg))
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(LIGHT)
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("paper", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_stand_out(paper: dict[str, str]) -> None:
    """A line has a contrast of 3:1 to its paper, a text 4.5:1 (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(name: str) -> float:
        a, b = sorted((luminance(paper[name]), luminance(paper["paper"])))
        return (b + 0.05) / (a + 0.05)

    assert min(contrast(name) for name in ("base", "heat", "warm", *(f"h{i}" for i in range(7)))) >= 3
    assert min(contrast(name) for name in ("ink", "soft", "link", "bad")) >= 4.5


def test_equal_charts_are_equal() -> None:
    """Drawn again, a chart is the same text, and its ids are not those of another chart."""
    first, again = (charts.lines([curve([0.0, 1.0])]) for _ in range(2))
    other = charts.lines([curve([0.0, 2.0])])
    assert first == again
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_own_settings_are_kept_out() -> None:
    """A matplotlibrc changes no chart, and is in force again afterwards."""
    import matplotlib

    plain = charts.lines([curve([0.0, 1.0])], y_label="y")
    with matplotlib.rc_context({"lines.linestyle": ":", "font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        with charts.drawing():
            assert charts.lines([curve([0.0, 1.0])], y_label="y") == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_files_are_of_three_kinds(tmp_path: Path) -> None:
    """A picture is written as PNG, SVG and PDF, and an SVG reader and PIL open them."""
    from PIL import Image

    canvas = Canvas(300, 200)
    canvas.axes(30, 30, 10, 10).plot([0, 1], [0, 1])
    paths = canvas.save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", "a.svg", "a.pdf"]
    with Image.open(paths[0]) as image:
        assert image.size == (600, 400)
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    assert paths[2].read_bytes().startswith(b"%PDF-")


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(2, 50))
def test_thinning_keeps_both_ends(count: int, most: int) -> None:
    """Thinned points are in order, as many as asked for, the first and the last among them."""
    found = thin(count, most)
    assert found == sorted(set(found))
    assert len(found) == min(count, most)
    if count:
        assert (found[0], found[-1]) == (0, count - 1)


def test_smoothing_by_hand() -> None:
    """A running mean of three is cut off at the ends, and a NaN is in no mean but its own."""
    assert smooth([1, 2, 6, 3], 3) == [1.5, 3, 11 / 3, 4.5]
    smoothed = smooth([1, math.nan, 3], 3)
    assert (smoothed[0], smoothed[2]) == (1, 3)
    assert math.isnan(smoothed[1])
    assert smooth([], 3) == []


@pytest.mark.parametrize("row", range(4))
def test_markers_are_centred(row: int) -> None:
    """A row's mark stands in the middle of its dash."""
    svg = charts.chip(Style("h0", (), row))
    ((x, y),) = re.findall(r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)"', svg)
    assert (float(x), float(y)) == (11, 6)
    shape = re.findall(r'<defs><path d="([^"]*)"', svg)[0]
    seen = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", shape)]
    assert (min(x for x, _ in seen) + max(x for x, _ in seen)) / 2 == pytest.approx(0, abs=0.51)
    assert all(abs(x) < 6 and abs(y) < 6 for x, y in seen)

"""The report: well-formed, self-contained, escaped, complete; and the charts in it, drawn where the numbers say."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import studies
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrkit import LrkitError
from lrkit.study import charts
from lrkit.study.charts import Bar, Curve, Point, Style
from lrkit.study.report import write_report

STYLE = Style("h0")
BAD = '<script>alert("1")</script>&amp;'
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's tags, checked for balance, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"] and self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def report_of(folder: Path) -> Page:
    write_report(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def small(folder: Path, **changes: Any) -> Path:
    chosen: dict[str, Any] = {"seeds": (0, 1), "steps": 24, "layers": 2, "evaluate": 8}
    return studies.write_study(folder, **(chosen | changes))


ODD: dict[str, dict[str, Any]] = {
    "complete": {},
    "one cell": {"labels": ["base"], "seeds": (0,), "evaluate": 0, "costs": False},
    "nothing yet": {"missing": [(r, "movies", s) for r in range(4) for s in (0, 1)], "costs": False},
    "running": {"running": [(1, "movies", 0), (2, "movies", 1)], "missing": [(3, "movies", 0)]},
    "failed": {"failed": [(1, "movies", s) for s in (0, 1)], "error": BAD},
    "diverged": {"diverged": [(1, "movies", 0), (1, "movies", 1), (2, "movies", 1)]},
    "tasks": {"tasks": ["rte", BAD], "labels": ["base", "aflora", "lora"]},
    "base in the middle": {"base": 2},
    "bad names": {"labels": [BAD, "metric=" + BAD, "aflora" + BAD], "title": BAD, "note": BAD, "error": BAD},
    "twenty rows": {"labels": ["base", *(f"metric=m{i}" for i in range(19))]},
    "constant": {"score": lambda *place: 0.75},
    "same label": {"labels": ["base", "twin", "twin"]},
}


@pytest.mark.parametrize("name", ODD)
def test_every_report_is_whole_and_alone(tmp_path: Path, name: str) -> None:
    settings = ODD[name]
    folder = small(tmp_path / "s", **settings)
    page = report_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|\ssrc=|@import|url\(", text.replace("src=x", ""))
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        target = attributes.get("href") or ""
        if target:
            assert tag == "a"
            assert not target.startswith(("/", ".", "#"))
            if target.startswith("cells/"):
                assert (folder / target).is_dir()
    for label in settings.get("labels", ("adalora", "metric=magnitude", "scheduler=linear", "lora")):
        assert label in page.words
    assert "nan" not in re.sub(r"NaN", "", page.words).lower()
    assert not re.search(
        r'"[^"<>]*\b(nan|inf)\b[^"<>]*"', "".join(re.findall(r"<(?:path|rect|circle|text)[^>]*>", text))
    )


def test_the_one_script_is_the_page_s_own(tmp_path: Path) -> None:
    folder = small(tmp_path / "s", **ODD["bad names"])
    page = report_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert [tag for tag, _ in page.tags].count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = [a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert page.words.count('<script>alert("1")</script>') > 10  # shown as text


def test_the_files(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    paths = write_report(folder)
    assert [path.name for path in paths] == ["report.html", "table.csv", "table.md", "table.tex", "cells.csv"]
    assert all(path.parent == folder for path in paths)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(folder)] == first
    assert not list(folder.glob(".*"))
    with (folder / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in rows[:3]] == [
        ("adalora", "0"),
        ("adalora", "1"),
        ("metric=magnitude", "0"),
    ]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(tmp_path / "s")
    write_report(folder)
    before = (folder / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lrkit.study.report.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(LrkitError, match="holds no study"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_running_study_says_what_is_missing(tmp_path: Path) -> None:
    folder = small(tmp_path / "s", **ODD["running"])
    words = report_of(folder).words
    assert "5 of 8 cells done, 2 running or interrupted, 1 not begun." in words
    assert "metric=magnitude: seed 0 (at step 12) running or interrupted" in words
    assert "lora: seed 0 not begun" in words
    assert "Fewer than six pairs" in words
    assert "What is missing" not in report_of(small(tmp_path / "t")).words


def test_failures_stand_folded_with_their_traceback(tmp_path: Path) -> None:
    folder = small(tmp_path / "s", **ODD["failed"])
    page = report_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    folded = re.findall(r"<details><summary>(.*?)</summary><pre>(.*?)</pre>", text, re.DOTALL)
    assert len(folded) == 2
    summary, traceback = folded[0]
    assert html.unescape(traceback) == f'Traceback (most recent call last):\n  File "run.py", line 3\n{BAD}'
    assert html.escape(BAD) in summary
    assert "2 failed" in page.words


def test_changes_against_the_base(tmp_path: Path) -> None:
    words = report_of(small(tmp_path / "s")).words
    assert "metricsensitivity-uncertainty→magnitude" in words
    assert "parameterization.rank12→8" in words
    from lrkit.study.report import _value

    also = [{"metric": None, "scheduler": {"name": "cubic", "target": 2}, "action": {"name": "freeze"}}]
    assert _value(also) == "[(metric=none, scheduler=cubic(target=2), action=freeze)]"
    assert "The base, adalora, in fullactionprune" in words


def test_heat_maps_hold_the_means(tmp_path: Path) -> None:
    from lrkit.study.records import read_study

    folder = small(tmp_path / "s", labels=["adalora", "aflora", "lora"])
    text = html.unescape(report_of(folder).words)
    record = read_study(folder)
    results = [cell.result for cell in record.cells_of(0) if cell.result]
    for i, layer in enumerate(results[0].layers):
        ranks = [result.layers[i].rank or 0 for result in results]
        assert f"{layer.name}: {sum(ranks) / 2:.2f} on average ({ranks[0]}, {ranks[1]})" in text
    frozen = [{n: d.step for d in cell.decisions for n in d.lost} for cell in record.cells_of(1)]
    for name in ("bert.encoder.layer.0.attention.self.query.A", "bert.encoder.layer.1.output.dense.B"):
        mean = sum(steps[name] for steps in frozen) / 2
        assert f"{name}: froze at step {mean:.1f} on average (2 of 2 seeds)" in text
    assert "lora keeps rank 8 in every layer." in text


def test_matrices_that_freeze_together_are_found_by_their_layer(tmp_path: Path) -> None:
    folder = small(tmp_path / "s", labels=["base", "together"])
    text = report_of(folder).words
    for matrix in "AB":
        assert re.search(rf"layer.1.output.dense.{matrix}: froze at step [\d.]+ on average \(2 of 2 seeds\)", text)


def test_the_pareto_front(tmp_path: Path) -> None:
    # aflora has a third of the parameters of the base, lora more than it. Scores: base .80, aflora .78, lora .79
    folder = small(
        tmp_path / "s", labels=["base", "aflora", "lora"], score=lambda row, task, seed: (0.80, 0.78, 0.79)[row]
    )
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    wide = re.findall(r'<div class="scroll wide">(.*?)</div>', text, re.DOTALL)[0]
    marks = {label: kind for kind, label in re.findall(r'class="(full|hollow)"[^>]*><title>(\w+):', wide)}
    assert marks == {"base": "full", "aflora": "full", "lora": "hollow"}


def test_a_row_has_one_colour_everywhere(tmp_path: Path) -> None:
    folder = small(tmp_path / "s", labels=["base", *(f"m{i}" for i in range(19))])
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    for label in ("m0", "m7", "m18"):
        chips = re.findall(r'<span class="row">((?:(?!</svg>).)*</svg>)<span>' + label + "</span>", text)
        assert len(chips) > 3
        assert len(set(chips)) == 1
    every = set(re.findall(r'<span class="row">(<svg.*?</svg>)', text))
    assert len(every) == 20


def test_the_page_stays_small(tmp_path: Path) -> None:
    labels = ["adalora", *(f"metric=m{i}" for i in range(7)), "aflora", "lora"]
    folder = studies.write_study(tmp_path / "s", labels=labels, steps=800, interval=4, layers=12)
    write_report(folder)
    assert (folder / "report.html").stat().st_size < 2_000_000


# ---- charts ---------------------------------------------------------------------------------------------------------


def curve(y: list[float], **changes: Any) -> Curve:
    return Curve(**({"label": BAD, "style": STYLE, "x": range(1, len(y) + 1), "y": y} | changes))


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
def test_charts_draw_odd_data_inside_their_box(name: str) -> None:
    y = DATA[name]
    drawn = [
        charts.lines([curve(y, low=y, high=y)], x_label=BAD, y_label=BAD, names=True),
        charts.scatter([Point(label=BAD, style=STYLE, x=abs(v), y=v, error=abs(v)) for v in y]),
        charts.scatter([Point(label=BAD, style=STYLE, x=abs(v), y=v) for v in y], x_log=True),
        charts.heat_map(
            {(BAD, str(i)): (v, f"{v:.0f}", BAD) for i, v in enumerate(y)}, [(BAD, BAD)], ["0", "1"], top=1
        ),
        charts.bars([Bar(label=BAD, style=STYLE, value=abs(v), text=BAD, second=abs(v)) for v in y], reference=1.0),
        charts.interval(min(y), y[0], max(y), bounds=(min(y), max(y)), style=STYLE),
    ]
    for svg in drawn:
        if svg:
            inside(svg)
            assert BAD not in svg


def inside(svg: str) -> None:
    """Every absolute coordinate is finite and in the picture."""
    page = Page(svg)
    (width, height) = [float(page.tags[0][1][name] or 0) for name in ("width", "height")]
    assert width > 0 < height
    for tag, attributes in page.tags:
        for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            if name in attributes:
                assert -0.5 <= float(attributes[name] or "nan") <= most + 0.5, (tag, attributes)
        for x, y in re.findall(r"[ML](-?[\d.]+|nan|inf) (-?[\d.]+|nan|inf)", attributes.get("d") or ""):
            assert -8 <= float(x) <= width + 8
            assert -8 <= float(y) <= height + 8
        if tag == "rect":
            assert float(attributes["width"] or "nan") >= 0


def test_nothing_to_draw_is_nothing() -> None:
    assert charts.lines([]) == charts.lines([curve([])]) == charts.lines([curve([math.nan])]) == ""
    assert charts.scatter([]) == charts.heat_map({}, [], [], top=1) == charts.bars([]) == charts.stacked([]) == ""
    assert charts.scatter([Point(label="a", style=STYLE, x=0.0, y=1.0)], x_log=True) == ""
    assert charts.interval(None, math.nan, None, bounds=(0, 1), style=STYLE) == ""


def test_a_gap_breaks_the_line() -> None:
    svg = charts.lines([curve([0.1, 0.2, math.nan, 0.3, 0.4])])
    (path,) = re.findall(r'class="line"[^>]* d="([^"]*)"', svg)
    assert re.sub(r"[-\d. ]", "", path) == "MLML"
    svg = charts.lines([curve([0.1, 0.2, math.nan, 0.3, 0.4], step=True)])
    (path,) = re.findall(r'class="line"[^>]* d="([^"]*)"', svg)
    assert re.sub(r"[-\d. ]", "", path) == "MHVMHV"


def test_values_are_in_the_tooltips() -> None:
    svg = charts.lines([curve([0.25, 0.5], label="a", low=[0.2, 0.4], high=[0.3, 0.6])], x_label="step")
    assert "<title>a, step 2: 0.5 (0.4 to 0.6)</title>" in svg
    svg = charts.bars([Bar(label="a", style=STYLE, value=2.0, text="2", title="a: two")])
    assert "<title>a: two</title>" in svg


def test_lines_are_drawn_to_scale() -> None:
    svg = charts.lines([curve([0.0, 5.0, 10.0])], y_range=(0.0, 10.0), x_range=(1, 3))
    (path,) = re.findall(r'class="line"[^>]* d="([^"]*)"', svg)
    (x1, y1), (x2, y2), (x3, y3) = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)
    assert y1 > y3  # up is more
    ticks = {float(t): float(y) for y, t in re.findall(r'class="tick end" x="[\d.]+" y="([\d.]+)">(\d+)<', svg)}
    assert ticks[0] - 4 == pytest.approx(y1, abs=0.11)
    assert ticks[10] - 4 == pytest.approx(y3, abs=0.11)


def test_a_logarithmic_axis_has_equal_decades() -> None:
    points = [Point(label="", style=STYLE, x=x, y=0.5) for x in (1e3, 1e4, 1e5)]
    marks = re.findall(r'class="hollow" d="M([\d.]+) ', charts.scatter(points, x_log=True))
    a, b, c = map(float, marks)
    assert b - a == pytest.approx(c - b, abs=0.11)


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_names_keep_apart_and_inside(end: float) -> None:
    curves = [curve([0.0, 1.0]), *(curve([0.5, end + i / 1000], label=f"row {i}") for i in range(6))]
    svg = charts.lines(curves, width=780, height=340, names=True)
    at = sorted(float(y) for y in re.findall(r'class="name h0" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(at) == 7
    assert at[0] > 10
    assert at[-1] < 330
    assert min(b - a for a, b in itertools.pairwise(at)) >= 13.9


@settings(max_examples=60)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@example(1.0, 400401.0, 2)
def test_ticks_are_round_even_and_inside(low: float, span: float, about: int) -> None:
    high = low + span
    found = charts.ticks(low, high, about)
    assert 1 <= len(found) <= 2 * about + 2
    slack = 1e-8 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 1:
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3
    texts = [charts.plain(found)(tick) for tick in found]
    assert len(set(texts)) == len(texts)
    assert all(tick == round(tick) for tick in charts.ticks(low, high, about, whole=True))


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(2, 50))
def test_thinning_keeps_both_ends(count: int, most: int) -> None:
    found = charts.thin(count, most)
    assert found == sorted(set(found))
    assert len(found) == min(count, most)
    if count:
        assert (found[0], found[-1]) == (0, count - 1)


def test_smoothing_by_hand() -> None:
    assert charts.smooth([1, 2, 6, 3], 3) == [1.5, 3, 11 / 3, 4.5]
    smoothed = charts.smooth([1, math.nan, 3], 3)
    assert (smoothed[0], smoothed[2]) == (1, 3)
    assert math.isnan(smoothed[1])
    assert charts.smooth([], 3) == []


@pytest.mark.parametrize("shape", range(4))
def test_markers_are_centred(shape: int) -> None:
    path = charts.marker(shape, 50.0, 50.0)
    x, y = 0.0, 0.0
    seen = []
    for command, numbers in re.findall(r"([Mlhva])([-\d. ]*)", path):
        values = [float(v) for v in numbers.split()]
        if command == "M":
            x, y = values
        elif command == "h":
            x += values[0]
        elif command == "v":
            y += values[0]
        else:
            x, y = x + values[-2], y + values[-1]
        seen.append((x, y))
    assert (min(x for x, _ in seen) + max(x for x, _ in seen)) / 2 == pytest.approx(50, abs=0.51)
    assert all(abs(x - 50) < 6 and abs(y - 50) < 6 for x, y in seen)

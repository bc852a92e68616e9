"""The report: well-formed, self-contained, escaped, complete."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import studies
from hypothesis import given
from hypothesis import strategies as st

from lrkit import LrkitError
from lrkit.loop.history import Decision
from lrkit.study.comebacks import comebacks
from lrkit.study.report import write_report

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
def test_whole_and_alone(tmp_path: Path, name: str) -> None:
    """Every report is balanced HTML that asks for nothing, links into its own folder alone and shows no NaN."""
    settings = ODD[name]
    folder = small(tmp_path / "s", **settings)
    page = report_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|\ssrc=|@import|url\(", text.replace("src=x", ""))
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        target = attributes.get("href") or ""
        if target:
            if tag == "use":  # a mark of a chart, whose shape stands in the page once
                assert any(attributes.get("id") == target.removeprefix("#") for _, attributes in page.tags)
                continue
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


def test_only_its_own_script(tmp_path: Path) -> None:
    """The one script is the one whose hash the security policy allows; a bad name is text."""
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


def test_five_files(tmp_path: Path) -> None:
    """The files are those that are told, the same when written again, and nothing else is left behind."""
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


def test_old_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a report cannot be written the old one stays, and no draft."""
    folder = small(tmp_path / "s")
    write_report(folder)
    before = (folder / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_no_study(tmp_path: Path) -> None:
    """A folder without a study is refused, and stays empty."""
    with pytest.raises(LrkitError, match="holds no study"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_is_said(tmp_path: Path) -> None:
    """A running study says which cells are done, at which step others are, and which have not begun."""
    folder = small(tmp_path / "s", **ODD["running"])
    words = report_of(folder).words
    assert "5 of 8 cells done, 2 running or interrupted, 1 not begun." in words
    assert "metric=magnitude: seed 0 (at step 12) running or interrupted" in words
    assert "lora: seed 0 not begun" in words
    assert "Fewer than six pairs" in words
    assert "What is missing" not in report_of(small(tmp_path / "t")).words


def test_failures_are_folded(tmp_path: Path) -> None:
    """A failure shows its last line, and unfolded the whole traceback, escaped."""
    folder = small(tmp_path / "s", **ODD["failed"])
    page = report_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    folded = re.findall(r"<details><summary>(.*?)</summary><pre[^>]*>(.*?)</pre>", text, re.DOTALL)
    assert len(folded) == 2
    summary, traceback = folded[0]
    assert html.unescape(traceback) == f'Traceback (most recent call last):\n  File "run.py", line 3\n{BAD}'
    assert BAD in html.unescape(summary)
    assert "<script" not in summary
    assert "2 failed" in page.words


def test_changes_are_shown(tmp_path: Path) -> None:
    """Each row's changes are shown, a component by its name with its settings."""
    words = report_of(small(tmp_path / "s")).words
    assert "metricsensitivity-uncertainty→magnitude" in words
    assert "parameterization.rank12→8" in words
    from lrkit.study.setting_texts import setting

    also = [{"metric": None, "scheduler": {"name": "cubic", "target": 2}, "action": {"name": "freeze"}}]
    assert setting(also) == "[(metric=none, scheduler=cubic(target=2), action=freeze)]"
    assert "The base, adalora, in fullactionprune" in words


def test_maps_hold_means(tmp_path: Path) -> None:
    """A cell of a map is the mean over the seeds, which its tooltip lists."""
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


@given(st.lists(st.frozensets(st.sampled_from("abcd")), min_size=1, max_size=6))
def test_comebacks_counted(kept: list[frozenset[str]]) -> None:
    """Who was lost, came back and stayed, against the sets of kept units themselves."""
    sets = [frozenset("abcd"), *kept]
    history = [
        Decision(step, 0, 4, len(now), 4, None, tuple(sorted(before - now)), tuple(sorted(now - before)))
        for step, (before, now) in enumerate(itertools.pairwise(sets), 1)
    ]
    rows = {unit: "".join("+-"[unit not in each] for each in sets) for unit in "abcd"}
    lost = [unit for unit, row in rows.items() if "-" in row]
    back = [unit for unit in lost if "-+" in rows[unit]]
    assert comebacks(history) == (len(lost), len(back), sum(rows[unit].endswith("+") for unit in back))


def test_comebacks_shown(tmp_path: Path) -> None:
    """The map of ranks says how many components came back, if a row has decided more than once."""
    from lrkit.study.records import read_study

    folder = small(tmp_path / "s", labels=["adalora", "lora"])
    words = report_of(folder).words
    runs = [cell.decisions for cell in read_study(folder).cells_of(0)]
    lost = [{name for d in run for name in d.lost} for run in runs]
    back = [{name for d in run for name in d.returned} for run in runs]
    told = (
        f"adalora lost {sum(map(len, lost)) / len(runs):.1f} components, of which {sum(map(len, back)) / len(runs):.1f}"
    )
    assert told in words and "lora lost" not in words.replace("adalora lost", "")


def test_ranks_decided_before_step_1(tmp_path: Path) -> None:
    """The map of a row that decided at step 0 alone says so."""
    folder = small(tmp_path / "s", labels=["adalora", "metric=magnitude"])
    for path in folder.glob("cells/01*/history.jsonl"):
        first = json.loads(path.read_text().splitlines()[0])
        path.write_text(json.dumps({**first, "step": 0}) + "\n")
    shown = re.findall(r"mean [\d.]+ of 8(, decided before step 1)?", report_of(folder).words)
    assert shown == ["", ", decided before step 1"]


def test_frozen_together(tmp_path: Path) -> None:
    """Matrices that freeze together stand in the history by their layer's name, and both are found."""
    folder = small(tmp_path / "s", labels=["base", "together"])
    text = report_of(folder).words
    for matrix in "AB":
        assert re.search(rf"layer.1.output.dense.{matrix}: froze at step [\d.]+ on average \(2 of 2 seeds\)", text)


def test_pareto_front(tmp_path: Path) -> None:
    """Full marks are of rows that no other row beats in both score and parameters."""
    # aflora has a third of the parameters of the base, lora more than it. Scores: base .80, aflora .78, lora .79
    folder = small(
        tmp_path / "s", labels=["base", "aflora", "lora"], score=lambda row, task, seed: (0.80, 0.78, 0.79)[row]
    )
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    wide = re.findall(r'<div class="wide">(.*?)</div>', text, re.DOTALL)[0]
    marks = re.findall(r"<g><title>(\w+): .*?</title>.*?fill: var\(--(\w+)\)", wide)
    kinds = {label: "hollow" if colour == "paper" else "full" for label, colour in marks}
    assert kinds == {"base": "full", "aflora": "full", "lora": "hollow"}


def test_one_colour_each(tmp_path: Path) -> None:
    """A row has one mark in the whole page, and no two rows have the same."""
    folder = small(tmp_path / "s", labels=["base", *(f"m{i}" for i in range(19))])
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    for label in ("m0", "m7", "m18"):
        chips = re.findall(r'<span class="row">((?:(?!</svg>).)*</svg>)<span>' + label + "</span>", text)
        assert len(chips) > 3
        assert len(set(chips)) == 1
    every = set(re.findall(r'<span class="row">(<svg.*?</svg>)', text))
    assert len(every) == 20


def test_page_stays_small(tmp_path: Path) -> None:
    """A study of ten rows, 800 steps and 12 layers is a page below 2 MB."""
    labels = ["adalora", *(f"metric=m{i}" for i in range(7)), "aflora", "lora"]
    folder = studies.write_study(tmp_path / "s", labels=labels, steps=800, interval=4, layers=12)
    write_report(folder)
    assert (folder / "report.html").stat().st_size < 2_000_000

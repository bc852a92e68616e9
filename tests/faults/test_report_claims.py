"""A table or report that claims more than it knows: certainty, learning, or that rows are of one size."""

from __future__ import annotations

import html
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import studies

from lrkit.study.comparison import effect_size
from lrkit.study.records import read_study
from lrkit.study.report import write_report
from lrkit.study.scores import scale_of
from lrkit.study.sizes import target_of, unequal_sizes
from lrkit.study.statistics import compare
from lrkit.study.table import Table

SMALL: dict[str, Any] = {"labels": ["base", "b", "c"], "seeds": range(6), "steps": 4, "interval": 2, "layers": 1}


def forms(folder: Path) -> tuple[Table, dict[str, str]]:
    """The table, and every text that is made of it."""
    write_report(folder)
    table = compare(read_study(folder))
    page = (folder / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    page = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return table, {"text": str(table), "md": table.to_markdown(), "tex": table.to_latex(), "page": page}


def test_no_better_than_a_guess(tmp_path: Path) -> None:
    """A row at or below the best trivial answers, 52 %, is marked in the table and named below it; one above is not."""
    scores = (0.8, 0.52, 0.521)
    table, texts = forms(
        studies.write_study(tmp_path / "s", score=lambda r, t, s: scores[r] + 1e-4 * s * (r != 1), **SMALL)
    )
    assert [row.warning for row in table.rows] == ["", "not above the trivial answers", ""]
    assert [row.guess for row in table.rows] == pytest.approx([0.52] * 3)
    for name, text in texts.items():
        mark = r"$\dagger$" if name == "tex" else "†"
        lines = [line for line in text.splitlines() if f"52.00 {'$' if name == 'tex' else ''}" in line and mark in line]
        assert lines, name
        assert "not above the best trivial answers" in " ".join(text.split())
        assert not re.search(rf"(80\.0\d|52\.1\d)[^\n]*{re.escape(mark)}", text), name


def test_no_width_is_not_shown(tmp_path: Path) -> None:
    """Equal differences have no interval to show, no bar in the forest plot and no effect size."""
    score = lambda row, task, seed: 0.8 + 0.01 * row + 0.002 * seed  # noqa: E731
    table, texts = forms(studies.write_study(tmp_path / "s", score=score, **SMALL))
    assert [row.effect for row in table.rows] == [None] * 3
    for text in texts.values():
        assert "no width" in text
        assert "+1.00, +1.00" not in text
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    forests = re.findall(r'<td class="forest">(.*?)</td>', page, re.DOTALL)
    assert len(forests) == 3
    assert all("<use" in plot and plot.count("<path d=") == plot.count("<defs>") + 1 for plot in forests[1:])


def test_effect_size_by_hand() -> None:
    """Differences 1 to 5 have mean 3 and standard deviation √2.5; one difference, or equal ones, have no spread."""
    assert effect_size([1, 2, 3, 4, 5]) == pytest.approx(3 / 2.5**0.5)
    assert effect_size([-0.02, 0.01]) == pytest.approx(-0.005 / statistics.stdev([-0.02, 0.01]))
    assert effect_size([0.3]) is effect_size([]) is effect_size([0.83 - 0.81, 0.73 - 0.71]) is None


def test_percent_as_percent(tmp_path: Path) -> None:
    """Shares are written in percent, other scores as they are; files for machines keep the plain numbers."""
    table, texts = forms(studies.write_study(tmp_path / "s", score=lambda r, t, s: 0.8 + 0.02 * r + 0.001 * s, **SMALL))
    for text in texts.values():
        assert re.search(r"accuracy, %|Score, \\%", text)
        assert "82.25" in text
        assert "0.8225" not in text
    assert table.frame()["mean"].tolist() == pytest.approx([0.8025, 0.8225, 0.8425])
    assert scale_of(["matthews"], [0.5]).text(0.5) == "0.5000"
    assert scale_of(["accuracy"], [83.0]).text(83.0) == "83.00"  # somebody's own percent stay what they are
    assert scale_of(["accuracy_mm"], [0.83]).text(0.83) == "83.00 %"
    assert scale_of(["f1", "pearson"], [0.83]).unit == ""


def test_rows_of_unequal_size(tmp_path: Path) -> None:
    """Rows that aim at one target and end with 334,368 and 221,184 parameters are named; a tenth more is let pass."""
    method = lambda target: {"scheduler": {"name": "cubic", "target": target}}  # noqa: E731
    lora = {"parameterization": {"name": "lora", "rank": 4}, "scheduler": None}
    methods = [method(4), method(4), lora, method(2)]
    (note,) = unequal_sizes(methods, ["a", "b", "lora", "other"], [334_368, 221_184, 331_776, 50_000])
    assert note.startswith("Rows of one target (4) end with 221,184 (b) to 334,368 (a) trainable parameters")
    assert list(unequal_sizes(methods[:2], ["a", "b"], [110, 100])) == []
    assert list(unequal_sizes(methods[:2], ["a", "b"], [111, 100])) != []
    assert list(unequal_sizes(methods[:2], ["a", "b"], [110, None])) == []
    assert target_of({"parameterization": {"name": "full"}}) is target_of({}) is None
    folder = studies.write_study(tmp_path / "s", **(SMALL | {"labels": ["base", "lora"]}))
    data = json.loads((folder / "study.json").read_text())
    for row in data["rows"]:
        row["method"] = lora
    (folder / "study.json").write_text(json.dumps(data))
    table, texts = forms(folder)
    assert table.rows[0].parameters_final != table.rows[1].parameters_final
    for text in texts.values():
        assert "their scores are not of one size" in " ".join(text.split())


def test_latex_can_be_listed(tmp_path: Path) -> None:
    """The caption is the title alone, notes stand below the last table, and the best mean of each table is bold."""
    folder = studies.write_study(tmp_path / "s", score=lambda r, t, s: 0.8 + 0.02 * (r == 1) + 0.001 * s, **SMALL)
    text = compare(read_study(folder)).to_latex()
    assert re.findall(r"\\caption{(.*)}", text) == ["A made-up study."]
    assert text.rindex(r"\end{tabular}") < text.index("Bold: the best mean.") < text.index(r"\end{table}")
    assert re.findall(r"\\textbf{([^}]*)}", text) == ["82.25"]
    (line,) = [line for line in text.splitlines() if r"\textbf" in line]
    assert line.startswith("b & ")
    equal = compare(read_study(studies.write_study(tmp_path / "t", score=lambda *_: 0.8, **SMALL))).to_latex()
    assert r"\textbf" not in equal


def test_hyperparameters_of_each_row(tmp_path: Path) -> None:
    """The page has each row's parts with their settings, its rates, and its parameters at first, on average, at the end."""
    folder = studies.write_study(tmp_path / "s", **(SMALL | {"labels": ["base", "lora"]}))
    data = json.loads((folder / "study.json").read_text())
    data["rows"][1]["method"] = {"parameterization": {"name": "lora", "rank": 8, "alpha": 16.0}}
    data["rows"][1]["rates"] = {"movies": {"lr": 5e-4, "head_lr": 1e-3}}
    (folder / "study.json").write_text(json.dumps(data))
    _, texts = forms(folder)
    page = " ".join(texts["page"].split())
    assert "lora(rank=8, alpha=16.0)" in page
    assert "lr 0.0005, head_lr 0.001" in page
    assert "36.9 k throughout" in page
    assert re.search(r"36\.9 k at first, [\d.]+ k on average, [\d.]+ k at the end", page)


def test_penalty_beside_the_loss(tmp_path: Path) -> None:
    """The penalty has a chart of its own, of the rows that have one, and the loss is called the task's."""
    folder = studies.write_study(tmp_path / "s", **(SMALL | {"steps": 12}))
    write_report(folder)
    assert "penalty over step" not in (folder / "report.html").read_text(encoding="utf-8")
    for cell in read_study(folder).cells_of(1):
        path = cell.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(x | ({"penalty": 0.5 / x["step"]} if "loss" in x else {})) + "\n" for x in lines)
        )
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    (chart,) = re.findall(r'<div class="wide"><svg[^>]*aria-label="penalty over step">(.*?)</svg>', page, re.DOTALL)
    assert "<title>b, step 2: 0.25 (0.25 to 0.25)</title>" in chart
    assert "<title>base, step" not in chart
    assert 'aria-label="task loss over step"' in page
    assert read_study(folder).cells_of(1)[0].penalties[:2] == ((1, 0.5), (2, 0.25))

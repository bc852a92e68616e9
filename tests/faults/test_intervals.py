"""An interval that covers less than it says, contradicts the p beside it, or is taken for a certainty."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import coverage_of_intervals as simulation
import numpy as np
import pytest
import studies
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkit.study.paired import interval, sign_flip_p
from lrkit.study.records import read_study
from lrkit.study.report import write_report
from lrkit.study.statistics import compare

SAMPLES = 2_000


@pytest.mark.parametrize("n", [6, 7, 9, 12])
@pytest.mark.parametrize("kind", [kind for kind in simulation.KINDS if "skewed" not in kind])
def test_covers_what_it_says(kind: str, n: int) -> None:
    """Of 2,000 samples with a fixed seed 95 % hold the mean, to within three standard errors."""
    error = math.sqrt(0.95 * 0.05 / SAMPLES)
    assert simulation.coverage(kind, n, SAMPLES, "inverted") >= 0.95 - 3 * error


@pytest.mark.parametrize("n", [6, 9, 12])
def test_covers_no_less_than_t(n: int) -> None:
    """Of very skewed differences no interval of so few pairs holds 95 %; this one is no worse than Student's t."""
    ours, t, bca = (simulation.coverage("skewed (exponential)", n, SAMPLES, which) for which in simulation.INTERVALS)
    assert ours >= t - 0.01
    assert ours >= bca


@settings(max_examples=200)
@given(st.lists(st.integers(-30, 30), min_size=1, max_size=9), st.sampled_from([1.0, 277.0, 872.0]))
def test_never_contradicts_p(hits: list[int], rows: float) -> None:
    """It leaves out 0 exactly if p < 0.05, also where rounded scores tie but for their last bits."""
    differences = [(200 + h) / rows - 200 / rows for h in hits]
    found = interval(differences)
    low, high = found or (-math.inf, math.inf)
    assert (low > 0 or high < 0) == (sign_flip_p(differences) < 0.05)


@pytest.mark.parametrize("n", [12, 16, 17, 25])
def test_ends_are_where_p_is(n: int) -> None:
    """A hair within an end p is at least 0.05, a hair beyond it less; past 16 pairs, where sign patterns are drawn, too."""
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    low, high = interval(differences.tolist()) or (math.nan, math.nan)
    for end, outwards in ((low, -1e-6), (high, 1e-6)):
        assert sign_flip_p((differences - end + outwards).tolist()) >= 0.05
        assert sign_flip_p((differences - end - outwards).tolist()) < 0.05


def test_few_pairs_are_unbounded(tmp_path: Path) -> None:
    """With five pairs there is no 95 % interval, and every form of the table says so."""
    folder = studies.write_study(tmp_path / "s", labels=["base", "b"], seeds=range(5), steps=4, layers=1)
    table = compare(read_study(folder))
    assert (table.rows[1].low, table.rows[1].high) == (None, None)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (str(table), table.to_markdown(), table.to_latex(), page):
        assert text.count("unbounded") >= 2  # in the column and below it


def test_no_width_is_no_certainty(tmp_path: Path) -> None:
    """Equal differences give an interval of one point; the table and the report say what that is worth."""
    same = lambda row, task, seed: 0.8 + 0.01 * row  # noqa: E731
    folder = studies.write_study(tmp_path / "s", labels=["base", "b"], seeds=range(6), steps=4, layers=1, score=same)
    table = compare(read_study(folder))
    assert table.rows[1].low == table.rows[1].high == pytest.approx(0.01)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (str(table), table.to_markdown(), table.to_latex(), page):
        assert "is no certainty" in " ".join(text.split())


def test_tasks_are_not_pooled(tmp_path: Path) -> None:
    """A row that is better on one task and worse on another, by the same on each seed, is told apart from chance."""
    score = lambda row, task, seed: (  # noqa: E731
        (0.8 if task == "a" else 0.5) + 0.001 * seed + row * (0.02 if task == "a" else -0.02)
    )
    settings = {"labels": ["base", "b"], "seeds": range(6), "steps": 4, "layers": 1, "score": score}
    table = compare(read_study(studies.write_study(tmp_path / "s", tasks=["a", "b"], **settings)))
    found = {row.task: (row.difference, row.p) for row in table.rows if not row.is_base}
    assert found == {"a": (pytest.approx(0.02), 2 / 64), "b": (pytest.approx(-0.02), 2 / 64)}


def test_pooling_rejects_too_often() -> None:
    """Why: tasks whose true differences have mean zero, six seeds each, tested as twelve pairs, against tasks by mean."""
    rng = np.random.default_rng(0)
    effects = rng.normal(0.0, 1.0, (200, 2, 1))
    pooled = (effects + rng.normal(0.0, 0.5, (200, 2, 6))).reshape(200, 12)
    assert np.mean([sign_flip_p(row) < 0.05 for row in pooled.tolist()]) > 0.3


def test_columns_of_files_are_numbers(tmp_path: Path) -> None:
    """In table.csv an unbounded end is empty, not a word: the column can be read as numbers."""
    folder = studies.write_study(tmp_path / "s", labels=["base", "b"], seeds=range(3), steps=4, layers=1)
    frame = compare(read_study(folder)).frame()
    assert frame[["low", "high"]].isna().all(axis=None)
    assert list(itertools.chain(frame["row"])) == ["base", "b"]

"""The report of a tuned study: what was tried and chosen, at what cost, and the rows at the settings given."""

import attrs
import pytest
import studies

from lrkit.errors import LrkitError
from lrkit.study.charts import Curve, Style, drawing
from lrkit.study.charts.rates import is_log, rates
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import read_study
from lrkit.study.report import tuning
from lrkit.study.report.page import page as page_of
from lrkit.study.report.view import View, alpha_over_rank
from lrkit.study.statistics import compare
from lrkit.study.tuned import Choice, TrialRecord

RATES, SCALES = (1e-3, 3e-3, 1e-2), (4.0, 32.0)


def tried(record, row, task):
    """Six trials with scores that a formula gives: the second rate is best, and the larger scale."""
    grid = [(lr, alpha) for lr in RATES for alpha in SCALES]
    found = []
    for number, (lr, alpha) in enumerate(grid):
        mean = 0.8 - 0.02 * abs(RATES.index(lr) - 1) + 0.01 * SCALES.index(alpha) - 0.01 * row
        scores = {101: mean - 0.005, 102: mean + 0.005}
        stopped = 40 if number == 0 else None
        found.append(
            TrialRecord(
                number=number, settings={"run.lr": lr, "alpha": alpha}, scores=scores, mean=mean, stopped=stopped
            )
        )
    return tuple(found)


def choice(record, row, task):
    if row == 1:
        return None
    given = {"run.lr": 1e-3, "alpha": 8.0}
    return Choice(
        trial=3, settings={"run.lr": 3e-3, "alpha": 32.0}, default=given, edges=("alpha",), widen="--tune alpha=4,32,64"
    )


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "trials_of", tried)
    monkeypatch.setattr(tuning, "chosen_of", choice)
    record = read_study(studies.write_study(tmp_path / "study", labels=("adalora", "lora"), seeds=(0, 1, 2), layers=1))
    trials = [attrs.evolve(cell, number=0) for cell in record.cells]
    other = read_study(
        studies.write_study(
            tmp_path / "given", labels=("adalora", "lora"), seeds=(0, 1, 2), layers=1, score=lambda *_: 0.5
        )
    )
    return attrs.evolve(record, tune={"space": {}}, trials=tuple(trials), untuned=other.cells)


def test_page_shows_tuning(record):
    """A panel for each row and setting, the choice, the command that widens an edge, the trials, and both tables."""
    page = page_of(record, compare(record))

    assert page.count("chosen: 0.003") == 1 and page.count("chosen: 32") == 1
    assert (
        "--tune alpha=4,32,64" in page
        and "at the edge of what was tried: alpha 32" in page
        and "solid: alpha 4; dashed: alpha 32." in page
    )
    assert "6 (3 of 3 cells, 1 stopped early)" in page and "not all trials are done" in page
    assert "lr 0.003, alpha 32" in page and "81.0" in page and "default: 0.001" in page
    assert "At the settings given" in page and "50.0" in page
    assert "chosen on validation" in page


def test_plain_study_says_nothing(tmp_path):
    """A study that is not tuned has no section on it, and best steps only if it was scored on the way."""
    record = read_study(
        studies.write_study(tmp_path / "study", labels=("adalora", "lora"), seeds=(0,), layers=1, evaluate=0)
    )
    page = page_of(record, compare(record))
    assert (
        'id="tuning"' not in page and 'id="untuned"' not in page and 'id="best"' not in page and "chosen on" not in page
    )


def test_best_beside_last(record):
    """The best score is the greatest of those on the way and the last one, seed by seed."""
    view_of = View(record=record, table=compare(record), styles=(), chips=())
    found = tuning.best(view_of, "movies")
    cells = record.cells_of(0)
    tops = [max([s["accuracy"] for _, s in c.evaluations] + [c.score]) for c in cells]

    assert found.rows[0].best == f"{100 * sum(tops) / 3:.1f}" or found.rows[0].best == f"{100 * sum(tops) / 3:.2f}"
    assert float(found.rows[0].gain) >= 0


def test_chart_of_rates():
    """A logarithmic axis from three times on; a ring on the choice, an upright at the default, a cross for a divergence."""
    nan = float("nan")
    curve = Curve(
        label="", style=Style("heat"), x=[1e-3, 1e-2], y=[1.0, nan], low=[0.9, nan], high=[1.1, nan], marks=True
    )
    with drawing():
        svg = rates([curve], x_label="run.lr", chosen=(1e-3, 1.0), default=5e-3)
        assert rates([attrs.evolve(curve, y=[nan, nan])]) == ""
    assert "chosen: run.lr 0.001, 1" in svg and "default: 0.005" in svg and "run.lr 0.01: diverged" in svg
    assert is_log([1, 3]) and not is_log([1, 2]) and not is_log([0, 4])


def test_scale_beside_rate():
    """α/r of a method in plain data, if it has one rank for all layers."""
    assert alpha_over_rank({"parameterization": {"alpha": 16, "rank": 8}}) == "2"
    assert alpha_over_rank({"parameterization": {"alpha": 16, "rank": {"a": 8}}}) == ""
    assert alpha_over_rank({"parameterization": {"name": "ia3"}}) == alpha_over_rank({}) == ""


def published(**values):
    return study_from(
        {"base": "lora", "swap": {"rank": [2]}, "published": {"source": "A Paper, Table 1", "values": values}}
    )


def test_published_is_shown(record):
    """Published values are shown as printed, with their source, and leave every test as it is."""
    stated = published(lora={"movies": "95.80", "glue/rte": 7}).published
    plain, shown = compare(record), compare(attrs.evolve(record, published=stated))

    assert [row.published for row in shown.rows] == ["", "95.80"]
    assert [attrs.evolve(row, published="") for row in shown.rows] == list(plain.rows)
    assert "95.80" in shown.to_markdown() and "95.80" in shown.to_csv() and "A Paper, Table 1" in str(shown)
    assert "Published" in shown.to_latex() and "Published" not in plain.to_latex()
    assert "published" in page_of(attrs.evolve(record, published=stated), shown)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lroa": {"movies": 1}}, 'did you mean "lora"'),
        ({"lora": {"movies": 1}, "rnak=2": {"movies": 1}}, 'did you mean "rank=2"'),
        ({"lora": {"movies": [1]}}, "as it is printed"),
    ],
)
def test_odd_published_refused(values, told):
    """A published value of no row, or that is no value, is refused in one line."""
    with pytest.raises(LrkitError, match=told):
        lay_out(published(**values))


def test_published_of_rows_left_out():
    """Values of rows that are not in the study, as a profile's, are taken and not shown."""
    plan = lay_out(published(**{"lora": {"movies": 1}, "rank=2": {"movies": 2}, "adalora": {"movies": 3}}))
    assert plan.study.published.of("adalora", "movies") == "3"

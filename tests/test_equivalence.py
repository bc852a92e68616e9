"""Effect sizes, equivalence, several tasks together and seeds needed: against hand computation, brute force, scipy."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import studies
from command_line import ask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import lrkit
from lrkit.cli import main
from lrkit.study import seeds_needed
from lrkit.study.asked import study_from
from lrkit.study.combined import combined_p, standardized
from lrkit.study.comparison import differences_of
from lrkit.study.effects import corrected, correction, effect_interval, effect_size
from lrkit.study.equivalence import equivalence_p, verdict_of
from lrkit.study.graph import jobs_of
from lrkit.study.ledger import write_plan
from lrkit.study.paired import interval, sign_flip_p
from lrkit.study.plan import lay_out
from lrkit.study.power import power_of
from lrkit.study.records import read_study
from lrkit.study.report import write_report
from lrkit.study.spreads import spreads_of
from lrkit.study.statistics import Table, compare
from lrkit.study.study_file import TaskRecord

# ---- effect sizes ----------------------------------------------------------------------------------------------------


def test_correction_by_hand() -> None:
    """J is Γ(ν/2) / (√(ν/2) Γ((ν-1)/2)): with three pairs, ν = 2, it is 1/√π; with five, ν = 4, it is √(2/π)."""
    assert correction(3) == pytest.approx(1 / math.sqrt(math.pi))  # Γ(1) / (1 · Γ(1/2))
    assert correction(5) == pytest.approx(math.sqrt(2 / math.pi))  # Γ(2) / (√2 · Γ(3/2)), Γ(3/2) = √π/2
    assert correction(40) == pytest.approx(1 - 3 / (4 * 39 - 1), abs=1e-4)  # Hedges' approximation
    assert corrected([1, 2, 3, 4, 5]) == pytest.approx(math.sqrt(2 / math.pi) * 3 / math.sqrt(2.5))
    assert corrected([0.01, 0.03]) is corrected([0.02] * 6) is None


def test_correction_has_no_bias() -> None:
    """Over 20,000 samples of five the corrected effect is the true one on average; d itself is a quarter too large."""
    data = np.random.default_rng(0).normal(1.0, 1.0, (20_000, 5))
    mean = float((data.mean(axis=1) / data.std(axis=1, ddof=1)).mean())
    assert mean == pytest.approx(1.25, abs=0.03)
    assert correction(5) * mean == pytest.approx(1.0, abs=0.025)


@pytest.mark.parametrize("n", [3, 6, 12])
@pytest.mark.parametrize("effect", [-1.5, -0.2, 0.0, 0.4, 2.0])
def test_effect_interval_inverts(n: int, effect: float) -> None:
    """At each end a d as far out has a probability of 2.5 %, by scipy's own distribution."""
    base = np.random.default_rng(n).normal(0.0, 1.0, n)
    data = ((base - base.mean()) / base.std(ddof=1) + effect).tolist()
    assert effect_size(data) == pytest.approx(effect)
    low, high = effect_interval(data) or (math.nan, math.nan)
    t = effect * math.sqrt(n)
    ends = (low, high) if effect >= 0 else (-high, -low)
    tails = [
        stats.nct.sf(abs(t), n - 1, ends[0] * math.sqrt(n)),
        stats.nct.cdf(abs(t), n - 1, ends[1] * math.sqrt(n)),
    ]
    assert tails == pytest.approx([0.025, 0.025], abs=1e-5)


def test_effect_interval_mirrors() -> None:
    """Opposite differences have the opposite interval, and two or equal ones have none."""
    low, high = effect_interval([1, 2, 4, -1, 3]) or (math.nan, math.nan)
    assert effect_interval([-1, -2, -4, 1, -3]) == (-high, -low)
    assert effect_interval([1.0, 2.0]) is effect_interval([0.02] * 7) is None


# ---- equivalence -----------------------------------------------------------------------------------------------------


def brute_force(differences: Sequence[Fraction], bound: Fraction) -> float:
    """One-sided p of "the mean is `bound` or more": the share of sign patterns of d - bound with a sum as low."""
    moved = [d - bound for d in differences]
    patterns = list(itertools.product((1, -1), repeat=len(moved)))
    low = sum(sum(s * m for s, m in zip(signs, moved, strict=True)) <= sum(moved) for signs in patterns)
    return low / len(patterns)


@pytest.mark.parametrize(
    ("differences", "margin", "p"),
    [
        ([0, 0, 0, 0, 0], 1, 1 / 32),  # -1 five times: only no flip is as low; as many pairs as it takes
        ([0, 0, 0, 0], 1, 1 / 16),
        ([1, 0, 0, 0, 0, 0], 2, 1 / 64),
        ([1, -1, 1, -1, 1, -1], 1, 1 / 8),  # 0 -2 0 -2 0 -2: three zeros double each pattern
        ([2, 0, 0, 0, 0, 0], 1, 7 / 64),  # 1 -1 -1 -1 -1 -1: sum -4; -6 for one pattern, -4 for the six with one + left
        ([3, 3, 3], 1, 15 / 16),  # beyond the margin: a bound alone
    ],
)
def test_equivalence_by_hand(differences: list[int], margin: float, p: float) -> None:
    """p of a few differences, counted by hand."""
    found = equivalence_p(differences, margin)
    assert found == p if p < 0.5 else found >= 0.5


@settings(max_examples=40)
@given(st.lists(st.integers(-12, 12), min_size=1, max_size=8), st.integers(1, 14), st.sampled_from([1, 100, 277, 872]))
@example([1, 1, 1, 1, 1, 1], 1, 100)  # 0.82 - 0.81 is a margin of 0.01, though not to the last bit
@example([2, 0, -2, 1, 1, 0], 2, 872)
def test_equivalence_brute_force(hits: list[int], margin: int, rows: int) -> None:
    """Scores are hits / rows; what ties in whole numbers ties here, and p below 0.5 is the exact one."""
    whole = [Fraction(h) for h in hits]
    wanted = max(brute_force(whole, Fraction(margin)), brute_force([-h for h in whole], Fraction(margin)))
    base = round(0.81 * rows)
    found = equivalence_p([(base + h) / rows - base / rows for h in hits], margin / rows)
    assert found == wanted if wanted < 0.5 else found >= 0.5


@settings(max_examples=100)
@given(st.lists(st.integers(-12, 12), min_size=1, max_size=9), st.integers(1, 14), st.sampled_from([1.0, 100.0, 872.0]))
def test_equivalent_is_interval_inside(hits: list[int], margin: int, rows: float) -> None:
    """p is below 0.05 exactly if the 90 % interval is inside the margin; with four pairs it never is."""
    found = interval([h / rows for h in hits], 0.9)
    inside = found is not None and all(abs(end) * rows < margin - 1e-6 for end in found)
    assert (equivalence_p([h / rows for h in hits], margin / rows) < 0.05) == inside
    assert (found is None) == (len(hits) < 5)


@pytest.mark.parametrize("n", [17, 24])
def test_equivalence_of_many(n: int) -> None:
    """Beyond 16 pairs, too, a margin a hair outside the 90 % interval is shown, and one a hair inside is not."""
    data = np.random.default_rng(n).normal(0.1, 1.0, n).tolist()
    low, high = interval(data, 0.9) or (math.nan, math.nan)
    end = max(abs(low), abs(high))
    assert equivalence_p(data, end + 1e-6) < 0.05 <= equivalence_p(data, end - 1e-6)


def test_verdicts() -> None:
    """Both p decide, each at 0.05."""
    assert verdict_of(0.01, None) == verdict_of(0.01, 0.05) == "different"
    assert verdict_of(0.05, 0.049) == "equivalent"
    assert verdict_of(0.049, 0.01) == "negligible"
    assert verdict_of(0.05, None) == verdict_of(0.05, 0.05) == "open"


# ---- several tasks together ------------------------------------------------------------------------------------------


def test_combined_by_hand() -> None:
    """Task a: 1, 1 (rms 1). Task b: 30, -10, 10, 10 (rms √300). Statistic (1 + 10/√300) / 2."""
    a, b = [1.0, 1.0], [30.0, -10.0, 10.0, 10.0]
    assert standardized([a, b]) == pytest.approx((1 + 10 / math.sqrt(300)) / 2)
    # Weights .25 .25 and .0722 times 3 -1 1 1: the sum seen is .5 + .2887. As far or farther: both of a alike (2 ways), and
    # b at 4 or 6 of 3 1 1 1 in its direction: 6 (one pattern) and 4 (three): 2 · (1 + 3) of 64.
    assert combined_p([a, b]) == 8 / 64


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), min_size=2, max_size=3),
    st.sampled_from([1e-3, 1.0, 500.0]),
)
def test_combined_brute_force(tasks: list[list[int]], unit: float) -> None:
    """p is the share of sign patterns as far out, and the unit of one task changes nothing."""

    def statistic(signed: Sequence[Sequence[float]]) -> float:
        parts = [statistics.fmean(t) / (math.sqrt(statistics.fmean(d * d for d in t)) or 1.0) for t in signed]
        return statistics.fmean(parts)

    sizes = [len(task) for task in tasks]
    seen, far = abs(statistic(tasks)), 0
    for signs in itertools.product((1, -1), repeat=sum(sizes)):
        rest = iter(signs)
        far += abs(statistic([[next(rest) * d for d in task] for task in tasks])) >= seen - 1e-9
    assert combined_p(tasks) == far / 2 ** sum(sizes)
    assert combined_p([[unit * d for d in tasks[0]], *tasks[1:]]) == far / 2 ** sum(sizes)


def test_one_task_weighs_alone() -> None:
    """Of one task it is the test of that task."""
    differences = [0.3, -0.1, 0.2, 0.25, 0.4, 0.1]
    assert combined_p([differences]) == sign_flip_p(differences)


# ---- seeds needed ----------------------------------------------------------------------------------------------------


def test_power_is_the_tests() -> None:
    """The share of samples in which the study's own tests show it: a difference with two rows, and equivalence."""
    rng = np.random.default_rng(5)
    data = rng.normal(0.0, 1.0, (2_000, 8))
    different = np.mean([sign_flip_p(row) < 0.025 for row in (data + 1.2).tolist()])
    equivalent = np.mean([equivalence_p(row, 1.0) < 0.05 for row in data.tolist()])
    assert power_of(8, spread=1, size=1.2, rows=2) == pytest.approx(different, abs=0.04)
    assert power_of(8, spread=1, size=0, margin=1) == pytest.approx(equivalent, abs=0.04)


def test_few_pairs_see_nothing() -> None:
    """Five pairs show no difference and four no equivalence, however large the effect; three rows need more."""
    assert power_of(5, spread=1, size=1e6) == power_of(4, spread=1, size=0, margin=1e6) == 0.0
    assert (seeds_needed(spread=1, size=1e6), seeds_needed(spread=1, margin=1e6)) == (6, 5)
    assert (seeds_needed(spread=1, size=1e6, rows=3), seeds_needed(spread=1, margin=1e6, rows=3)) == (7, 6)


def test_many_pairs_are_t() -> None:
    """Beyond twelve seeds the answer is the t test's, by the noncentral t distribution."""
    seeds = seeds_needed(spread=1.0, size=0.5)
    assert seeds is not None

    def exact(n: int) -> float:
        limit = stats.t.ppf(0.975, n - 1)
        return float(stats.nct.sf(limit, n - 1, 0.5 * math.sqrt(n)) + stats.nct.cdf(-limit, n - 1, 0.5 * math.sqrt(n)))

    assert abs(exact(seeds) - 0.8) < 0.01
    assert abs(seeds - 34) <= 1  # the sample size of tables of the paired t test
    assert seeds_needed(spread=1.0, size=0.01) is None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"spread": 0, "size": 1}, "spread"),
        ({"spread": 1}, "size"),
        ({"spread": 1, "size": 2, "margin": 1}, "inside"),
        ({"spread": 1, "size": 1, "power": 1}, "power"),
        ({"spread": 1, "size": 1, "rows": 0}, "rows"),
    ],
)
def test_what_cannot_be_asked(what: dict[str, Any], said: str) -> None:
    """A number out of its range is refused in one line."""
    with pytest.raises(lrkit.LrkitError, match=said):
        seeds_needed(**what)


# ---- a study with a margin -------------------------------------------------------------------------------------------

NOISE = (0.004, -0.003, 0.001, -0.002, 0.003, -0.004, 0.002, -0.001)
SMALL: dict[str, Any] = {"labels": ["base", "far", "same", "noisy"], "seeds": range(8), "steps": 4, "layers": 1}


def score(row: int, task: str, seed: int) -> float:
    return 0.8 + 0.01 * (seed % 3) + (0.0, 0.03 + NOISE[seed], NOISE[seed], 5 * NOISE[seed])[row]


def with_margin(folder: Path, margin: float | None = 0.01, **given: Any) -> Path:
    """A study whose margin is in its study.json."""
    studies.write_study(folder, **{"score": score, "interval": 2, "evaluate": 0} | SMALL | given)
    study = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(study | {"margin": margin}))
    return folder


def table_of(folder: Path) -> Table:
    return compare(read_study(folder))


def test_table_with_margin(tmp_path: Path) -> None:
    """Each verdict of a table, with its numbers, and every text says them."""
    folder = with_margin(tmp_path / "s")
    table = table_of(folder)
    assert [row.verdict for row in table.rows] == ["", "different", "equivalent", "open"]
    base, far, same, noisy = table.rows
    assert (base.margin, base.p_equivalent, base.low_90) == (None, None, None)
    assert (far.p, far.p_holm) == (2 / 256, 6 / 256)
    assert same.p_equivalent == 1 / 256  # all eight are inside: no pattern is as far out but the one seen
    assert same.p_equivalent_holm == 3 / 256
    assert (same.low_90, same.high_90) == interval(differences_of(read_study(folder), 2, "movies")[0], 0.9)
    assert noisy.notes == ("open: no difference is shown, and the 90 % interval is not inside ±1.00.",)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="effects"' in page
    for text in (str(table), table.to_markdown(), table.to_latex(), page):
        assert "Margin: ±1.00 points" in text.replace("$\\pm$", "±").replace("\n", " ")
        assert all(word in text for word in ("equivalent", "different", "open"))
    assert list(table.frame()["verdict"]) == ["", "different", "equivalent", "open"]


def test_table_without_margin(tmp_path: Path) -> None:
    """Without a margin no text speaks of equivalence, and p, intervals and notes are as they were."""
    table = table_of(with_margin(tmp_path / "s", None))
    beside = table_of(with_margin(tmp_path / "t"))
    assert not any("margin" in text.lower() or "equivalent" in text for text in (str(table), table.to_latex()))
    assert [row.verdict for row in table.rows] == ["", "different", "open", "open"]
    new = {"margin", "p_equivalent", "p_equivalent_holm", "verdict", "notes"}
    for own, other in zip(table.rows, beside.rows, strict=True):
        assert attrs.asdict(own, filter=lambda a, _: a.name not in new) == attrs.asdict(
            other, filter=lambda a, _: a.name not in new
        )


def test_few_pairs_said(tmp_path: Path) -> None:
    """With four pairs nothing can be shown, and the table says why."""
    table = table_of(with_margin(tmp_path / "s", seeds=range(4)))
    assert [row.verdict for row in table.rows] == ["", "open", "open", "open"]
    assert table.rows[1].notes[0].startswith("open: with 4 pairs no one-sided p is below 1/2^4 = 0.0625")


def test_tasks_together_in_table(tmp_path: Path) -> None:
    """Two tasks have a combined p per row, corrected over the rows, in each text; one task has none."""
    folder = with_margin(tmp_path / "s", tasks=("rte", "movies"), missing=[(1, "rte", 7)])
    record = read_study(folder)
    table = compare(record)
    assert [(c.label, c.tasks, c.pairs) for c in table.combined] == [("far", 2, 15), ("same", 2, 16), ("noisy", 2, 16)]
    found = [combined_p([differences_of(record, row, task)[0] for task in table.tasks]) for row in (1, 2, 3)]
    assert [c.p for c in table.combined] == found
    assert table.combined[0].p_holm == 3 * found[0]
    for text in (str(table), table.to_markdown(), table.to_latex()):
        assert "nothing about tasks that are not here" in " ".join(text.split())
        assert "of all" in text
    assert table_of(with_margin(tmp_path / "one")).combined == ()


def test_spread_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The spread is the root of the rows' mean variance, and `lrkit power` reads it, the rows and the margin."""
    folder = with_margin(tmp_path / "s")
    (found,) = spreads_of(read_study(folder))
    variance = statistics.variance(NOISE)
    assert found.spread == pytest.approx(math.sqrt(variance * (1 + 1 + 25) / 3))
    assert (found.pairs, found.freedom) == (24, 21)
    told = ask(capsys, "power", folder, "--size", 0.02)
    assert (told["margin"], told["rows"]) == (0.01, 3)
    wanted = {"size": 0.02}, {"margin": 0.01}
    each = told["seeds"][0]
    assert [each["difference"], each["equivalence"]] == [
        seeds_needed(spread=found.spread, rows=3, **what) for what in wanted
    ]


def planned(folder: Path, margin: float | None) -> tuple[float | None, list[Path]]:
    """Write a study's plan, as `ablate` does before its first cell: the margin there is, and the cells' folders."""
    plan = lay_out(study_from({"base": "lora", "swap": {"rank": [1]}, "seeds": 1, "margin": margin}))
    jobs = jobs_of(plan)
    write_plan(plan, jobs, {"movies": TaskRecord(name="movies")}, folder)
    return read_study(folder).margin, [folder / "cells" / job.key for job in jobs]


def test_margin_is_kept(tmp_path: Path) -> None:
    """It is written before the first cell; another one is refused then, and no margin asked for leaves it."""
    margin, cells = planned(tmp_path / "s", 0.02)
    assert margin == json.loads((tmp_path / "s" / "study.json").read_text())["margin"] == 0.02
    cells[0].mkdir(parents=True)
    assert planned(tmp_path / "s", 0.02)[0] == planned(tmp_path / "s", None)[0] == 0.02
    with pytest.raises(
        lrkit.LrkitError, match=r"has the margin 0\.02, stated before its first test cell, and not 0\.03"
    ):
        planned(tmp_path / "s", 0.03)
    assert read_study(tmp_path / "s").margin == 0.02


def test_margin_comes_first(tmp_path: Path) -> None:
    """A study without a margin takes one until its first cell is begun, and none afterwards."""
    assert planned(tmp_path / "early", None)[0] is None
    margin, cells = planned(tmp_path / "early", 0.02)
    assert margin == 0.02
    assert planned(tmp_path / "late", None)[0] is None
    (tmp_path / "late" / "cells" / cells[0].name).mkdir(parents=True)
    with pytest.raises(lrkit.LrkitError, match=r"a margin of 0\.02 must be stated before the first test cell"):
        planned(tmp_path / "late", 0.02)


@pytest.mark.parametrize("n", [3, 6, 12])
def test_intervals_far_out(n: int) -> None:
    """Nearly equal differences have an interval at once, and where both ways can be computed they agree."""
    spread = np.linspace(-1, 1, n)
    for far in (1e3, 1e7, 1e8):
        low, high = effect_interval([1.0 + each / far for each in spread]) or (0.0, 0.0)
        d = effect_size([1.0 + each / far for each in spread]) or 0.0
        chi = [math.sqrt(stats.chi2.ppf(p, n - 1) / (n - 1)) for p in (0.025, 0.975)]
        assert (low, high) == pytest.approx((d * chi[0], d * chi[1]), rel=1e-6)
    near = effect_interval([1.0 + each / 80 for each in spread])
    d = effect_size([1.0 + each / 80 for each in spread]) or 0.0
    assert near == pytest.approx([d * c for c in chi], rel=0.02)


def test_margin_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study file, the command line and Python have it, and the command line's replaces the file's."""
    asked = []

    def stop(plan: Any, *_: Any, **__: Any) -> None:
        asked.append(plan.study.margin)
        raise lrkit.LrkitError("the first step")

    # both modules first: one that is imported meanwhile would keep the stand-in for good
    modules = [importlib.import_module(f"lrkit.study.{name}") for name in ("ablate", "execute")]
    for module in modules:
        monkeypatch.setattr(module, "execute", stop)
    (tmp_path / "s.toml").write_text('base = "lora"\nmargin = 0.02\nseeds = 7\nswap = {rank = [1]}\n')
    for options in ([], ["--margin", "0.03"]):
        with pytest.raises(SystemExit):
            main(["ablate", str(tmp_path / "s.toml"), *options, "--out", str(tmp_path / "out")])
    for how in ({"base": str(tmp_path / "s.toml")}, {"base": "lora", "margin": 0.01, "seeds": 7}):
        with pytest.raises(lrkit.LrkitError, match="first step"):
            lrkit.ablate(**how, out=tmp_path / "out")
    assert asked == [0.02, 0.03, 0.02, 0.01]


@pytest.mark.parametrize("margin", [0, -0.01, math.inf, "wide"])
def test_no_such_margin(tmp_path: Path, margin: Any) -> None:
    """A margin is a number above 0."""
    with pytest.raises(lrkit.LrkitError, match="margin"):
        lrkit.ablate("lora", {"rank": [1]}, out=tmp_path / "s", margin=margin)

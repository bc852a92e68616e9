"""The ablation table against hand computation, brute force and properties."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import pytest
import studies
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrkit.study.paired import holm, interval, sign_flip_p, smallest_p
from lrkit.study.records import read_study
from lrkit.study.statistics import Table, compare
from lrkit.study.texts import compact, latex, memory, probability

few = settings(max_examples=40)
counts = st.lists(st.integers(-30, 30), min_size=1, max_size=9)


def brute_force(differences: Sequence[int]) -> float:
    """The share of sign patterns whose sum is at least as far from zero, in whole numbers."""
    seen = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    far = sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen for signs in patterns)
    return float(Fraction(far, len(patterns)))


# ---- the sign-flip test ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 1, 1, 1, 1, 1], 2 / 64),  # only all + and all - are as far out
        ([1, 2, 3], 2 / 8),
        ([1, 2, -3], 1.0),  # the sum is 0, and no pattern is nearer to zero
        # sum 6. |±1 ±2 ±4 ±1| is 8 for 2 patterns and 6 for 4 (one of the two 1s flipped, and the mirror): 6 of 16
        ([1, 2, 4, -1], 6 / 16),
        ([5], 1.0),
        ([0, 0, 0], 1.0),
        ([0, 0, 1], 1.0),  # a zero has no sign to flip: every pattern has sum ±1
    ],
)
def test_sign_flip_by_hand(differences: list[int], p: float) -> None:
    """p of a few differences, counted by hand."""
    assert sign_flip_p(differences) == p


@few
@given(counts, st.sampled_from([1.0, 872.0, 277.0, 1043.0]))
@example([3, -1, -2, 5, -5, 1, -1, 4], 277.0)
@example([1, 2, -3], 872.0)
@example([7, 3, -4, -6], 1043.0)
def test_sign_flip_brute_force(hits: list[int], rows: float) -> None:
    """Scores are hits / rows; what ties in whole numbers must tie in float64."""
    base = [round(0.81 * rows) for _ in hits]
    differences = [(b + h) / rows - b / rows for b, h in zip(base, hits, strict=True)]
    assert sign_flip_p(differences) == brute_force(hits)


@few
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_sign_flip_bounds(differences: list[float]) -> None:
    """p is between 2/2^n and 1, and the same for the opposite differences."""
    p = sign_flip_p(differences)
    assert smallest_p(len(differences)) <= p <= 1
    assert sign_flip_p([-d for d in differences]) == p


def test_random_signs() -> None:
    """Beyond 16 pairs p of random signs is close to the binomial's, and the same each time."""
    # 20 differences of ±1 with sum 10: the sum of random signs is 2 B - 20 with B binomial(20, 1/2)
    exact = sum(math.comb(20, k) for k in range(21) if abs(2 * k - 20) >= 10) / 2**20
    found = sign_flip_p([1.0] * 15 + [-1.0] * 5)
    assert found == pytest.approx(exact, abs=5 * math.sqrt(exact / 99_999))
    assert sign_flip_p([1.0] * 17) >= smallest_p(17)
    assert sign_flip_p([0.5] * 40) == 1 / 100_000


def test_smallest_p() -> None:
    """The smallest p is 2/2^n."""
    assert [smallest_p(n) for n in (0, 1, 2, 5, 6)] == [1.0, 1.0, 0.5, 0.0625, 0.03125]


# ---- Holm -----------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    """Holm's correction of a few p, by hand."""
    # in order .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and none below the one before it: .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@few
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12))
def test_holm_is_monotone(p: list[float]) -> None:
    """A corrected p is never below its p, nor out of order."""
    adjusted = holm(p)
    assert all(raw <= more <= 1 for raw, more in zip(p, adjusted, strict=True))
    in_order = [adjusted[i] for i in sorted(range(len(p)), key=lambda i: p[i])]
    assert in_order == sorted(in_order)
    assert min(adjusted) == pytest.approx(min(1.0, min(p) * len(p)))


# ---- the interval ---------------------------------------------------------------------------------------------------


def test_no_interval_of_five() -> None:
    """Fewer than six pairs have no interval."""
    for n in range(6):
        assert interval([0.3, 0.4, 0.5, 0.6, 0.7][:n]) is None


def test_interval_by_hand() -> None:
    """1, 2, 4, 8, 16, 32, 64 have 127 subset means. Of 64 splits 4 must be as far out: the empty one and three more."""
    # The three smallest means: 1, {1, 2} 1.5, 2. The three largest: 64, {32, 64} 48, {16, 64} 40.
    assert interval([1, 2, 4, 8, 16, 32, 64]) == pytest.approx((2.0, 40.0))
    assert interval([3, 1, 2, 6, 4, 5]) == pytest.approx((1.0, 6.0))  # six: 2 of 32, so all that lies between


def test_equal_differences_one_point() -> None:
    """If all differences are equal, the interval is one point."""
    # equal but for the last bits, as differences of rounded scores are
    differences = [0.83 - 0.81, 0.73 - 0.71, 0.52 - 0.5] * 2
    assert len(set(differences)) > 1
    low, high = interval(differences) or (0.0, 0.0)
    assert low == high == pytest.approx(0.02)
    assert interval([0.0] * 6) == (0.0, 0.0)


def brute_force_interval(hits: Sequence[int]) -> tuple[Fraction, Fraction]:
    """The lowest and the highest mean of some differences at which the brute-force test of d - θ does not reject."""
    means = {
        Fraction(sum(part), size) for size in range(1, len(hits) + 1) for part in itertools.combinations(hits, size)
    }
    whole = math.lcm(*range(1, len(hits) + 1))  # so that d - θ are whole numbers
    held = [m for m in means if brute_force([int((h - m) * whole) for h in hits]) >= 0.05]
    return min(held), max(held)


@settings(max_examples=15)
@given(st.lists(st.integers(-9, 9), min_size=6, max_size=7))
def test_interval_brute_force(hits: list[int]) -> None:
    """No other θ can be an end: p changes at means of subsets alone."""
    low, high = brute_force_interval(hits)
    assert interval([h / 277 for h in hits]) == pytest.approx((float(low / 277), float(high / 277)), abs=1e-9)


@settings(max_examples=15)
@given(st.lists(st.floats(-1, 1), min_size=6, max_size=18))
def test_interval_scales(differences: list[float]) -> None:
    """An interval lies within the differences, and scales with them."""
    low, high = interval(differences) or (math.nan, math.nan)
    slack = 1e-8 * max(map(abs, differences))
    assert min(differences) - slack <= low <= high <= max(differences) + slack
    assert interval([4 * d for d in differences]) == pytest.approx((4 * low, 4 * high))
    assert interval([-d for d in differences]) == pytest.approx((-high, -low))


# ---- the table ------------------------------------------------------------------------------------------------------

BASE = (0.80, 0.82, 0.81, 0.79, 0.83, 0.81)
UNEVEN = (0.03, -0.01, 0.02, 0.00, 0.05, 0.03)


def table_of(tmp_path: Path, **settings: Any) -> Table:
    # (Each option replaces what is set here.)
    chosen = {"labels": ["base", "all better", "uneven"], "steps": 4, "interval": 2, "layers": 1, "evaluate": 0}
    return compare(read_study(studies.write_study(tmp_path / "s", **(chosen | settings))))


def by_hand(row: int, task: str, seed: int) -> float:
    return round(BASE[seed] + (0.0, 0.02, UNEVEN[seed])[row], 6)


def test_table_by_hand(tmp_path: Path) -> None:
    """Each number of a table, by hand."""
    table = table_of(tmp_path, score=by_hand)
    base, better, uneven = table.rows
    assert base.is_base
    assert (base.p, base.difference, base.low, base.pairs, base.few_pairs) == (None, None, None, 0, False)
    assert base.mean == pytest.approx(4.86 / 6)
    # deviations from .81: -.01 .01 0 -.02 .02 0; squares sum to .001; / 5
    assert base.sd == pytest.approx(math.sqrt(0.0002))
    assert better.difference == better.low == better.high == pytest.approx(0.02)
    assert better.p == 2 / 64
    assert better.p_holm == pytest.approx(4 / 64)  # the smaller of two
    assert better.notes == (
        "all 6 differences are equal, so the interval has no width: that says how coarse the scores are, and is no "
        "certainty.",
    )
    # 3 -1 2 0 5 3: sum 12 of at most 14. Out at least as far: 14 (none flipped but the -1 made +1) and 12: the zero
    # doubles both, the mirror doubles again: 2 * 2 * 2 of 64
    assert uneven.p == 8 / 64
    assert uneven.p_holm == 8 / 64
    assert uneven.difference == pytest.approx(0.02)
    assert uneven.low is not None
    assert uneven.high is not None
    assert (uneven.low, uneven.high) == pytest.approx((-0.01, 0.05))  # with six pairs the least and the greatest
    assert (uneven.n, uneven.pairs, uneven.few_pairs, uneven.smallest_p) == (6, 6, False, 2 / 64)
    # Two rows tested: 2 * 2/64 = 0.0625 at best. 7 pairs: 2 * 2/128 = 0.031.
    assert table.limits == (
        "With 2 rows beside the base and at most 6 pairs, no p can be below 0.062 after Holm's correction, whatever the "
        "scores; 7 pairs could bring it below 0.05.",
    )


def test_unfinished_cells_said(tmp_path: Path) -> None:
    """Diverged, missing and failed cells are in no mean, and the notes say so."""
    table = table_of(
        tmp_path,
        score=by_hand,
        diverged=[(1, "movies", 0), (0, "movies", 3)],
        missing=[(2, "movies", 1)],
        running=[(2, "movies", 2)],
        failed=[(2, "movies", 4)],
    )
    base, better, uneven = table.rows
    assert (base.n, base.diverged, base.done) == (5, 1, 6)
    assert (better.n, better.diverged, better.pairs) == (5, 1, 4)
    assert better.mean == pytest.approx(statistics.fmean(b + 0.02 for b in BASE[1:]))
    assert better.notes[0] == "1 of 6 results diverged (score NaN): in no mean and no pair."
    assert better.notes[1] == "2 pairs left out, since the row or the base diverged."
    assert (uneven.n, uneven.missing, uneven.running, uneven.failed, uneven.planned) == (3, 1, 1, 1, 6)
    assert uneven.pairs == 2  # seeds 0 and 5; the base of seed 3 diverged
    assert uneven.notes[:2] == ("2 of 6 cells not done yet.", "1 of 6 cells failed.")
    assert better.few_pairs
    assert better.smallest_p == 2 / 16
    assert table.limits[0].startswith(
        "Fewer than six pairs: the smallest p that the sign-flip test can give is 2/2^2 = 0.5 with 2, 2/2^4 = 0.125 with 4"
    )


@pytest.mark.parametrize(("seeds", "flagged"), [(range(5), True), (range(6), False)])
def test_few_pairs_flagged(tmp_path: Path, seeds: Sequence[int], flagged: bool) -> None:
    """Fewer than six pairs are flagged."""
    table = table_of(tmp_path, labels=["base", "b"], seeds=seeds)
    assert table.rows[1].few_pairs is flagged
    assert any("Fewer than six" in limit for limit in table.limits) is flagged


def test_table_per_task(tmp_path: Path) -> None:
    """Several tasks have a table each, with a correction of its own, and their means side by side."""

    def score(row: int, task: str, seed: int) -> float:
        return (0.9 if task == "rte" else 0.5) + 0.01 * seed * (2 if task == "rte" else 1) + 0.03 * row * (seed + 1)

    settings: dict[str, Any] = {"labels": ["base", "b", "c"], "seeds": range(6), "score": score}
    table = table_of(tmp_path, tasks=["rte", "movies"], missing=[(1, "rte", 5)], **settings)
    assert [(row.task, row.label) for row in table.rows] == list(
        itertools.product(("rte", "movies"), ("base", "b", "c"))
    )
    assert [row.pairs for row in table.rows] == [0, 5, 6, 0, 6, 6]
    assert [row.mean for row in table.rows[::3]] == pytest.approx([0.95, 0.525])
    assert table.rows[0].sd == pytest.approx(0.02 * math.sqrt(3.5))  # of 0 to 5: variance 17.5 / 5
    # Holm within a task: two rows there, whatever is tested elsewhere
    assert [row.p_holm for row in table.rows] == [None, 2 / 32, 2 * 2 / 64, None, 2 * 2 / 64, 2 * 2 / 64]
    assert table.limits[0].startswith("rte: Fewer than six pairs")
    assert table.limits[1].startswith("movies: With 2 rows beside the base and at most 6 pairs")
    alone = table_of(tmp_path / "alone", tasks=["movies"], **settings)
    for beside, by_itself in zip(table.of("movies").rows, alone.rows, strict=True):
        for name in ("mean", "sd", "pairs", "difference", "low", "high", "p", "p_holm"):
            assert getattr(beside, name) == getattr(by_itself, name)
    assert alone.limits[0] == table.limits[1].removeprefix("movies: ")
    assert table.frame()["task"].tolist() == ["rte"] * 3 + ["movies"] * 3
    for text in (str(table), table.to_markdown(), table.to_latex()):
        heads = [text.index(word) for word in ("rte", "movies", "Means by task")]
        assert heads == sorted(heads)
        assert text.count("0.9500") == 2  # in its table, and among the means


def test_costs_in_table(tmp_path: Path) -> None:
    """A row's costs are the means of its cells' and those that were measured; one that could not be is said."""
    folder = studies.write_study(tmp_path / "s", labels=["base", "b"], seeds=(0, 1), steps=4, layers=1)
    record = read_study(folder)
    row = compare(record).rows[1]
    results = [cell.result for cell in record.cells_of(1) if cell.result]
    assert row.parameters_average == statistics.fmean(r.parameters.average for r in results)
    assert row.parameters_final == statistics.fmean(r.parameters.now for r in results)
    assert row.flops == statistics.fmean(r.flops.run for r in results if r.flops)
    assert row.step_ratio == record.costs[1, "movies"].step_ratio
    assert row.step_ratio_end == record.costs[1, "movies"].step_ratio_end
    assert row.peak_memory == record.costs[1, "movies"].peak_memory
    (folder / "costs" / "0100c057.json").write_text('{"error": "no such device"}')
    row = compare(read_study(folder)).rows[1]
    assert row.step_ratio is None
    assert row.notes[-1] == "cost not measured: no such device."


MOVIES = [(row, "movies", seed) for row in range(2) for seed in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"missing": MOVIES},
        {"diverged": MOVIES, "costs": False},
        {"diverged": MOVIES[3:]},
        {"failed": MOVIES[:2], "running": MOVIES[2:]},
        {"seeds": (0,)},
        {"score": lambda *place: 0.5},
        {"labels": ["base"]},
        {"base": 1},
        {"score": lambda row, task, seed: 1e4 * (seed + row)},
    ],
)
def test_no_nan_in_tables(tmp_path: Path, settings: dict[str, Any]) -> None:
    """No form of a table shows a NaN."""
    table = table_of(tmp_path, **({"labels": ["base", "b"], "seeds": (0, 1, 2)} | settings))
    for row in table.rows:
        numbers = [value for value in attrs.astuple(row) if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers)
    for text in (table.to_csv(), table.to_markdown(), table.to_latex(), str(table)):
        assert "nan" not in re.sub(r"score\W+NaN", "", text).lower()
        assert "inf" not in text.lower()


@pytest.mark.parametrize(
    "labels", [["base", "b"], [f"a row with a long label, number {i}: metric=x" for i in range(20)]]
)
def test_text_fits_columns(tmp_path: Path, labels: list[str]) -> None:
    """Plain text fits a hundred columns, whatever the labels."""
    tasks = [f"glue/task-{i}" for i in range(9)]
    text = str(table_of(tmp_path, labels=labels, tasks=tasks, seeds=(0, 1), diverged=[(1, tasks[0], 0)]))
    assert max(map(len, text.splitlines())) <= 100
    assert all(task in text for task in tasks)
    assert "diverged" in text


def test_csv_equals_frame(tmp_path: Path) -> None:
    """The CSV has the numbers of the frame."""
    table = table_of(tmp_path, labels=["base", 'comma, "quote"\nline'], seeds=(0, 1))
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    frame = table.frame()
    assert list(rows[0]) == list(frame.columns)
    assert [row["row"] for row in rows] == frame["row"].tolist()
    assert float(rows[1]["difference"]) == frame["difference"][1]
    assert rows[0]["difference"] == ""


NASTY = "50%_a&b $x$ {y} \\z #1 ~^ <i>|λ → 漢"


def test_markdown_escaped(tmp_path: Path) -> None:
    """Markdown shows a label as it is."""
    text = table_of(tmp_path, labels=["base", NASTY], seeds=(0, 1)).to_markdown()
    (line,) = [line for line in text.splitlines() if "漢" in line and line.startswith("|")]
    assert line.startswith(r"| 50%\_a\&b $x$ {y} \\z \#1 \~^ \<i\>\|λ → 漢 |")
    assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", text.splitlines()[2]))


def test_latex_escaped(tmp_path: Path) -> None:
    """LaTeX shows a label as it is, and every line has as many columns."""
    text = table_of(tmp_path, labels=["base", NASTY], tasks=["a_b", "c"], seeds=(0, 1)).to_latex()
    assert (
        r"50\%\_a\&b \$x\$ \{y\} \textbackslash{}z \#1 \textasciitilde{}\^{} $<$i$>$$|$$\lambda$ $\to$ [U+6F22]" in text
    )
    tables = re.findall(r"\\begin{tabular}{(l[r]+)}(.*?)\\end{tabular}", text, re.DOTALL)
    assert len(tables) == 5  # scores and costs of two tasks, and the means
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0


def test_numbers_as_text() -> None:
    """Large numbers, bytes and p as text."""
    values = [0, 7, 999, 999.4, 1000, 331776, 999_499, 999_950, 1_327_104, 1.2e13]
    shown = ["0", "7", "999", "999", "1.00 k", "332 k", "999 k", "1.00 M", "1.33 M", "12.0 T"]
    assert [compact(value) for value in values] == shown
    assert [memory(value) for value in (512, 1536, 512 * 2**20, 1.42 * 2**30)] == [
        "512 B",
        "1.50 KiB",
        "512 MiB",
        "1.42 GiB",
    ]
    assert [probability(p) for p in (1.0, 0.03125, 1e-5)] == ["1.0000", "0.0312", "<0.0001"]
    assert latex("--a-b") == "-{}-a-b"

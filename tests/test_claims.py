"""Claims: stated in the study file, judged by one rule, against hand-made cases and under the null."""

import json

import numpy as np
import pytest
import studies
from command_line import ask

from lrkit.cli import main
from lrkit.errors import LrkitError
from lrkit.study.claim_power import _excluded, _shown, seeds_to_exclude, seeds_to_show
from lrkit.study.claims import judge
from lrkit.study.combined import combined_p, standardized
from lrkit.study.equivalence import below_p
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import read_study

SEEDS = tuple(range(10))
TASKS = ("movies", "rte")


def judged(folder, differences, margin=0.01, claims=None, *, seeds=SEEDS, **where):
    """Judge claims "b over a" of a study whose rows differ by `differences` (task to one per seed), and by nothing else."""

    def score(row, task, seed):
        return 0.8 + 0.001 * seed + (differences[task][seed] if row == 1 else 0.0)

    studies.write_study(folder, labels=("a", "b"), tasks=TASKS, seeds=seeds, score=score, costs=False, **where)
    plain = json.loads((folder / "study.json").read_text())
    plain["margin"] = margin
    plain["claims"] = claims or [{"name": "c", "says": "b beats a", "source": "us", "higher": "b", "lower": "a"}]
    (folder / "study.json").write_text(json.dumps(plain))
    return judge(read_study(folder))


def spread(mean, sd=0.004):
    """Ten differences with exactly this mean and standard deviation."""
    numbers = np.linspace(-1.0, 1.0, len(SEEDS))
    return list(mean + sd * (numbers - numbers.mean()) / numbers.std(ddof=1))


@pytest.mark.parametrize(
    ("movies", "rte", "margin", "verdict", "why"),
    [
        (0.02, 0.015, 0.01, "replicated", "ahead"),
        (-0.02, -0.015, 0.01, "not replicated", "behind"),
        (0.0, 0.0, 0.01, "not replicated", "an advantage of 1 point is excluded on every task"),
        (0.0, 0.0, 0.001, "open", "is not excluded on every task"),
        (0.0, 0.0, None, "open", "no margin was stated"),
    ],
)
def test_rule_of_the_verdict(tmp_path, movies, rte, margin, verdict, why):
    """Clearly ahead, clearly behind, an advantage that is excluded, one that is not, and no margin."""
    (found,) = judged(tmp_path / "s", {"movies": spread(movies), "rte": spread(rte)}, margin)
    assert found.verdict == verdict
    assert why in found.why
    assert [each.difference for each in found.tasks] == pytest.approx([movies, rte], abs=1e-9)


def test_opposite_tasks_stay_open(tmp_path):
    """An advantage on one task and as large a loss on the other is no advantage of both, and none is excluded."""
    (found,) = judged(tmp_path / "s", {"movies": spread(0.03), "rte": spread(-0.03)})
    assert (found.verdict, found.p) == ("open", 1.0)


def test_missing_cells_leave_it_open(tmp_path):
    """No verdict before the last cell, however clear it looks."""
    clear = {"movies": spread(0.05), "rte": spread(0.05)}
    (found,) = judged(tmp_path / "s", clear, missing=[(1, "rte", 9)])
    assert (found.verdict, found.missing, found.why) == ("open", 1, "1 pair of cells still to come")


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("equal", [0.0, 0.02, -0.02])
@pytest.mark.parametrize("other", [0.0, 0.05])
def test_equal_differences_say_nothing(tmp_path, seeds, equal, other):
    """Differences that are all equal on a task say nothing, whatever p is, and however few or clear they are."""
    (found,) = judged(tmp_path / "s", {"movies": [equal] * 10, "rte": spread(other)}, seeds=tuple(range(seeds)))
    assert found.verdict == "open" and "too coarse" in found.why
    assert found.p_holm is None


def test_diverged_runs_leave_it_open(tmp_path):
    """The runs that did not diverge are no fair sample: no verdict, though all of them are ahead."""
    clear = {"movies": spread(0.05), "rte": spread(0.05)}
    (found,) = judged(tmp_path / "s", clear, diverged=[(1, "rte", seed) for seed in SEEDS])
    assert (found.verdict, found.diverged, found.why) == ("open", 10, "in 10 pairs of cells a run diverged")


def test_corrected_over_claims(tmp_path):
    """p is multiplied as Holm has it over the claims of the study: of two alike, by two and by one, and never less."""
    claims = [
        {"name": name, "says": "s", "source": "us", "higher": higher, "lower": lower}
        for name, higher, lower in (("up", "b", "a"), ("down", "a", "b"))
    ]
    up, down = judged(tmp_path / "s", {"movies": spread(0.02), "rte": spread(0.02)}, claims=claims)
    assert (up.verdict, down.verdict) == ("replicated", "not replicated")
    assert up.p_holm == down.p_holm == pytest.approx(2 * up.p)


def test_verdicts_are_not_taken_back(tmp_path):
    """A claim that is done counts those to come with p = 1: what they will be can only make it clearer."""
    rows, rng = ("a", "b", "c", "d"), np.random.default_rng(2)
    claims = [{"name": row, "says": "s", "source": "us", "higher": row, "lower": "a"} for row in "bcd"]
    mine, clear, unclear = spread(0.0043, sd=0.0045), spread(0.02), list(rng.normal(0.0, 0.004, 10))
    for others in (clear, unclear):
        found = []
        for missing in ([], [(2, "movies", 3)], [(row, "movies", seed) for row in (2, 3) for seed in SEEDS]):

            def score(row, task, seed, others=others):
                return 0.8 + 0.001 * seed + (0.0 if row == 0 else (mine if row == 1 else others)[seed])

            folder = tmp_path / f"{len(found)}{others is clear}"
            studies.write_study(
                folder, labels=rows, tasks=("movies",), seeds=SEEDS, score=score, costs=False, missing=missing
            )
            plain = {**json.loads((folder / "study.json").read_text()), "margin": 0.02, "claims": claims}
            (folder / "study.json").write_text(json.dumps(plain))
            found.append(judge(read_study(folder))[0])
        done, one_missing, not_begun = found
        assert done.p == one_missing.p == not_begun.p
        assert 0.05 / 3 < done.p < 0.05 / 2  # so the correction decides
        assert not_begun.p_holm == pytest.approx(3 * done.p)
        assert (not_begun.verdict, not_begun.why) == (
            "open",
            "p is below 0.05 before Holm's correction, which waits for the other claims",
        )
        assert done.verdict == ("replicated" if others is clear else "not replicated")


def test_errors_under_the_null(tmp_path):
    """Of 200 studies without a difference at most one in ten says "replicated": 5 % two-sided, half of it ahead."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(200):
        tasks = [list(rng.normal(0.0, scale, 8)) for scale in (0.004, 0.03)]
        wrong += combined_p(tasks) < 0.05 and standardized(tasks) > 0
    assert wrong <= 12  # binomial(200, 0.025): 99.6 % are at or below


def test_open_claims_name_seeds(tmp_path):
    """An open claim says how many seeds would decide it: as many as the tests themselves need."""
    wide = {"movies": spread(0.002, sd=0.02), "rte": spread(0.002, sd=0.03)}
    (found,) = judged(tmp_path / "s", wide)
    show, exclude = seeds_to_show([0.02, 0.03], 0.01), seeds_to_exclude([0.02, 0.03], 0.01)
    assert (
        f"; about {show} seeds would probably (0.8) show an advantage of 1 point, about {exclude} exclude it"
        in found.why
    )
    rng, spreads, margin = np.random.default_rng(5), (0.006, 0.008), 0.01
    shown = excluded = 0
    for _ in range(400):
        ahead, level = ([list(rng.normal(mean, each, 6)) for each in spreads] for mean in (margin, 0.0))
        shown += combined_p(ahead) < 0.05 and standardized(ahead) > 0
        excluded += all(below_p(each, margin) < 0.05 for each in level)
    assert _shown(spreads, margin, 1, 6) == pytest.approx(shown / 400, abs=0.1)
    assert _excluded(spreads, [margin] * 2, 6) == pytest.approx(excluded / 400, abs=0.1)
    assert seeds_to_show([1.0], 0.001) is None
    assert seeds_to_show([0.02, 0.03], 0.01, claims=5) > show


def test_tasks_that_disagree(tmp_path):
    """An open claim whose first row is ahead on one task and behind on the other, either of them surely, says so."""
    for movies, rte, told in (
        (0.02, -0.02, True),
        (0.009, -0.005, True),
        (0.001, -0.001, False),
        (0.003, 0.002, False),
    ):
        wide = {"movies": spread(movies, 0.01), "rte": spread(rte, 0.01)}
        (found,) = judged(tmp_path / f"{movies}{rte}", wide, 0.001)
        assert found.verdict == "open" and ("(ahead on movies, behind on rte)" in found.why) == told
        assert ("show an advantage" in found.why) != told
        assert ("which more seeds do not settle" in found.why) == told


def test_seeds_beside_disagreement(tmp_path):
    """If the advantage that is seen lies below the margin, seeds that would exclude the margin are named, and do it."""
    seen, margin, spreads = (0.005, -0.006), 0.01, (0.012, 0.006)
    wide = {"movies": spread(seen[0], spreads[0]), "rte": spread(seen[1], spreads[1])}
    (found,) = judged(tmp_path / "s", wide, margin)
    needed = seeds_to_exclude(spreads, margin, means=[seen[0], 0.0])
    assert found.verdict == "open" and "do not settle" not in found.why
    assert f"behind on rte); about {needed} seeds would probably (0.8) exclude an advantage of 1 point" in found.why
    rng, excluded = np.random.default_rng(6), 0
    for _ in range(100):
        tasks = [list(rng.normal(mean, each, needed)) for mean, each in zip((seen[0], 0.0), spreads, strict=True)]
        excluded += all(below_p(each, margin) < 0.05 for each in tasks)
    assert 0.7 < excluded / 100 < 0.95


def test_more_spread_needs_more_seeds():
    """Seeds that exclude the margin never fall as differences vary more, and are never too many to name for small ones."""
    for means in (None, [0.0051]):
        needed = [seeds_to_exclude([sd], 0.01, means=means) for sd in np.linspace(0.001, 0.03, 120)]
        assert None not in needed and needed == sorted(needed)


def test_shown_everywhere(tmp_path, capsys):
    """Verdicts stand in the terminal, in JSON, in claims.md and in the page."""
    judged(tmp_path / "s", {"movies": spread(0.02), "rte": spread(0.02)})
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(tmp_path / "s")])
    assert "replicated" in capsys.readouterr().out
    assert ask(capsys, "report", tmp_path / "s")["claims"][0]["verdict"] == "replicated"
    table = (tmp_path / "s" / "claims.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| **c**: b beats a | replicated | movies +2")]
    assert line.count("|") == table.splitlines()[0].count("|") and "| 10 |" in line and "a: lr " in line
    assert "b beats a" in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"higher": "metric=magnitud"}, 'there is no row "metric=magnitud" (did you mean "metric=magnitude"?)'),
        ({"higher": "adalora"}, 'compares row "adalora" with itself'),
        ({"margin": 0.0}, "margin must be a number above 0"),
        ({"rule": "mine"}, "rule"),
    ],
)
def test_bad_claims_refused(claim, said):
    """A claim of no row, of one row alone, without a margin's sense or with an unknown key is refused in one line."""
    good = {"name": "c", "says": "s", "source": "us", "higher": "metric=magnitude", "lower": "adalora"}
    study = {"base": "adalora", "swap": {"metric": ["magnitude"]}, "claims": [{**good, **claim}]}
    with pytest.raises(LrkitError) as caught:
        lay_out(study_from(study))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)

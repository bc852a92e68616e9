"""Tuning inside a study: who is tried on what rows, who is chosen, and that a killed study ends as an undisturbed one."""

import csv
import itertools
import math
import shutil
import tomllib

import attrs
import command_line
import folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkit
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.choosing import best_of, chosen, mean_score
from lrkit.study.execute import execute
from lrkit.study.files import CellResult, Parameters
from lrkit.study.graph import jobs_of
from lrkit.study.needs import Source
from lrkit.study.plan import lay_out, study_from
from lrkit.study.proposing import proposals
from lrkit.study.records import frame, read_study
from lrkit.study.run_settings import HEAD_LR
from lrkit.study.space import domain, grid
from lrkit.study.tuned import _wider, chosen_of, trials_of

RATES = [0.003, 0.05]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


def asked(place, tune=None, **changes):
    return study_from(
        {
            "base": "adalora",
            "set": {"rank": 3, "target_rank": 1, "warmup": 1, "final": 1, "interval": 1, "alpha": 3.0},
            "rows": [{"from": "adalora", "control": "transplanted"}],
            "tasks": [{"data": str(place / "data")}],
            "model": str(place / "model"),
            "seeds": 2,
            "run": {"steps": 4, "batch_size": 4, "max_length": 12, "validation_rows": 4},
            "tune": {"space": {"run.lr": RATES}} if tune is None else tune,
            **changes,
        }
    )


def run(study, out):
    return execute(lay_out(study), out, workers=0, threads=1, costs=False, checkpoint_seconds=0.0)


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """A tuned study with a control, run to its end: two rows of two trials with two seeds, then two test seeds."""
    out = tmp_path_factory.mktemp("tuned")
    outcome = run(asked(place), out)
    assert (outcome.done, outcome.failed) == (2 * (2 * 2 + 2), ())
    return out


def results(out):
    return {
        c.name: ((c / "result.json").read_bytes(), (c / "predictions.npz").read_bytes())
        for c in (out / "cells").iterdir()
    }


def test_chosen_settings_are_trained(done):
    """Each row's test cells train at the rate with the best mean over the tuning seeds, the first of equal ones."""
    record = read_study(done)
    for row in range(2):
        trials = trials_of(record, row, "data")
        assert [trial.settings for trial in trials] == [{"run.lr": rate} for rate in RATES]
        assert all(trial.scores.keys() == {1000, 1001} for trial in trials)
        means = [sum(trial.scores.values()) / 2 for trial in trials]
        best = RATES[0] if means[0] >= means[1] else RATES[1]
        choice = chosen_of(record, row, "data")
        assert choice.settings == {"run.lr": best} and choice.default == {"run.lr": 0.01}
        for cell in record.cells_of(row):
            assert cell.config["run"]["lr"] == best and cell.config["selection"] is None
            assert cell.seed in (0, 1)


def test_trials_hide_the_validation_rows(place, tmp_path, monkeypatch):
    """A trial trains on some training rows and is scored on the others; only test cells see the validation rows."""
    import lrkit.study.run

    seen = []
    real = lrkit.study.run.train

    def spied(method, task, **kwargs):
        seen.append((kwargs["settings"].seed, task.train["sentence"], task.validation["sentence"]))
        return real(method, task, **kwargs)

    def numbered(split, count):
        return [f'{{"sentence": "the film was good {split} {n}", "label": {n % 2}}}' for n in range(count)]

    lines = {"train": numbered("train", 30), "validation": numbered("validation", 8)}
    data = folders.write_data(tmp_path / "numbered", lines)
    monkeypatch.setattr(lrkit.study.run, "train", spied)
    assert not run(asked(place, tasks=[{"data": str(data)}], rows=[]), tmp_path / "out").failed
    train = {f"the film was good train {n}" for n in range(30)}
    validation = {f"the film was good validation {n}" for n in range(8)}
    splits = set()
    for seed, trained, scored in seen:
        if seed >= 1000:
            assert {*trained} | {*scored} == train and not {*trained} & {*scored}
            assert not {*scored} & validation
            splits.add(frozenset(scored))
        else:
            assert {*trained} == train and {*scored} == validation
    assert len(splits) == 1 and len(seen) == 6


def test_same_steps_as_the_test(place):
    """A trial of epochs takes the steps of the test cells, though it has fewer rows."""
    study = asked(place, rows=[], run={"epochs": 2.0, "batch_size": 4, "max_length": 12})
    trial = next(job for job in jobs_of(lay_out(study)) if job.trial)
    assert trial.cell.selection == 0 and trial.cell.run["validation_rows"] is None


def test_interrupted_study_ends_alike(place, tmp_path, done, monkeypatch):
    """A tuned study that is interrupted in a trial, between them and in a test cell comes to the same bytes."""
    import lrkit.study.worker

    real, out = lrkit.study.worker._train, tmp_path / "interrupted"
    for ends in (1, 3, 5):
        count = itertools.count()

        def interrupted(*args, count=count, ends=ends):
            if next(count) == ends:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(lrkit.study.worker, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(asked(place), out)
    monkeypatch.undo()
    run(asked(place), out)
    assert results(out) == results(done)


def test_control_takes_the_chosen_trial(done):
    """A control's trial has the ranks that the row's chosen trial ended with, a test cell those of the row's own cell."""
    record = read_study(done)
    best = chosen_of(record, 0, "data").trial
    ended = {
        trial.seed: {layer.name: layer.rank for layer in trial.result.layers}
        for trial in record.trials
        if trial.row == 0 and trial.number == best
    }
    for trial in (each for each in record.trials if each.row == 1):
        source = {1000: 1001, 1001: 1000}[trial.seed]  # transplanted: the next seed's
        assert {layer.name: layer.rank for layer in trial.result.layers} == ended[source]
    own = {c.seed: {layer.name: layer.rank for layer in c.result.layers} for c in record.cells_of(0)}
    for cell in record.cells_of(1):
        assert {layer.name: layer.rank for layer in cell.result.layers} == own[1 - cell.seed]


def test_tables_hold_test_cells(done):
    """The table has the test cells alone and the chosen rates; trials.csv has one line per trial and seed."""
    from lrkit.study.report import write_report
    from lrkit.study.statistics import compare

    record = read_study(done)
    assert len(frame(record)) == 4
    write_report(done)
    lines = list(csv.DictReader((done / "trials.csv").read_text().splitlines()))
    assert len(lines) == 8 and {line["settings.run.lr"] for line in lines} == {str(rate) for rate in RATES}
    rates = [row.lr for row in compare(record).rows]
    assert rates == [f"{chosen_of(record, row, 'data').settings['run.lr']:g}" for row in range(2)]


def test_further_values_are_joined(place, done, tmp_path):
    """With further values the trials that are there are kept; anything else is another tuning and refused."""
    out = tmp_path / "wider"
    shutil.copytree(done, out)
    before = {c.name for c in (out / "cells").iterdir()}
    trials = {trial.key for trial in read_study(out).trials if trial.row == 0}
    with pytest.warns(LrkitWarning, match="its trials are kept"):
        outcome = run(asked(place, {"space": {"run.lr": [*RATES, 0.2]}}), out)
    record = read_study(out)
    assert trials < {trial.key for trial in record.trials if trial.row == 0} and before < {
        c.key for c in record.cells
    } | {c.name for c in (out / "cells").iterdir()}
    assert len(record.trials) == 12 and len(record.cells) == 4 and not outcome.failed
    with pytest.raises(LrkitError, match="give all rows, tasks and seeds"):
        run(asked(place, {"space": {"run.lr": [*RATES, 0.2, 0.3]}}, rows=[]), out)
    found = [{"from": "adalora", "control": "found"}]
    for tune in (
        {"space": {"run.lr": [0.003]}},
        {"space": {"run.lr": RATES}, "seed": 1},
        {"space": {"run.lr": RATES}, "seeds": 1},
    ):
        with pytest.raises(LrkitError, match="may get further values"):
            run(asked(place, tune, rows=found), out)


def test_tuned_beside_given(place, done, tmp_path):
    """The same folder without tuning has the settings given beside the tuned ones, which stay what it shows."""
    out = tmp_path / "beside"
    shutil.copytree(done, out)
    run(attrs.evolve(asked(place), tune=None), out)
    record, before = read_study(out), read_study(done)
    assert [cell.key for cell in record.cells] == [cell.key for cell in before.cells]
    assert {cell.config["run"]["lr"] for cell in record.untuned} == {0.01} and len(record.untuned) == 4
    assert chosen_of(record, 0, "data") == chosen_of(before, 0, "data")


def test_what_tasks_give_is_the_default(place, tmp_path):
    """What a row has without tuning is what its cell at the settings given trains with: the task's own come first."""
    task = {"data": str(place / "data"), "run": {"lr": 0.02}, "set": {"parameterization.alpha": 1.5}}
    space = {"run.lr": [1e-3, 1e-2], "run.head_lr": [1e-2, 3e-3], "parameterization.alpha": [1.0, 2.0]}
    tune = {"space": space, "seeds": 1, "defaults": True}
    run(asked(place, tune, rows=[], seeds=1, tasks=[task]), tmp_path / "own")
    record = read_study(tmp_path / "own")
    (cell,) = record.untuned
    trained = {
        "run.lr": cell.config["run"]["lr"],
        "run.head_lr": cell.config["run"]["head_lr"] or HEAD_LR,
        "parameterization.alpha": cell.config["method"]["parameterization"]["alpha"],
    }
    assert chosen_of(record, 0, "data").default == trained == {**trained, "run.lr": 0.02, "parameterization.alpha": 1.5}
    other = {"data": str(shutil.copytree(place / "data", tmp_path / "other"))}
    run(
        asked(place, tune, rows=[], seeds=1, tasks=[other]), tmp_path / "own"
    )  # and those of a task that is not asked for
    assert chosen_of(read_study(tmp_path / "own"), 0, "data").default == trained


@pytest.mark.parametrize(
    ("path", "tried", "end", "wider"),
    [
        ("parameterization.rank", [1, 2], -1, [1, 2]),
        ("parameterization.rank", [2, 3], -1, [1, 2, 3]),
        ("parameterization.rank", [4, 8, 16], -1, [1, 2, 4, 8, 16]),
        ("parameterization.rank", [4, 8], 1, [4, 8, 16, 32]),
        ("scheduler.warmup", [0, 1], 1, [0, 1, 2, 3]),
        ("parameterization.alpha", [0.5, 1], -1, [0.125, 0.25, 0.5, 1]),
        ("parameterization.dropout", [0.0, 0.1], -1, [0.0, 0.1]),
        ("run.weight_decay", [0.0, 0.01], -1, [0.0, 0.01]),
        ("run.weight_decay", [0.0, 0.01], 1, [0.0, 0.01, 0.02, 0.03]),
        ("run.lr_warmup", [0.5, 1.0], 1, [0.5, 1.0]),
    ],
)
def test_wider_is_what_a_setting_may_be(path, tried, end, wider):
    """Beyond the values that were tried are those alone that the setting may have: ranks and steps are whole, from 1 on."""
    assert _wider(tried, end, path) == ",".join(map(str, wider))


def source(score):
    result = CellResult(
        scores={"accuracy": score}, steps=1, parameters=Parameters(start=1, now=1, average=1.0, head=1, step=1)
    )
    return Source(key="k", config={}, result=result)


def test_chosen_by_hand(place):
    """The mean over seeds decides; a diverged run makes its settings the worst; of equal ones the first is taken."""
    cell = jobs_of(lay_out(asked(place)))[0].cell
    space = {"run.lr": [0.1, 0.2, 0.3], "parameterization.alpha": [1, 2]}
    scores = [[0.9, 0.1], [0.6, 0.6], [0.5, 0.7], [math.nan, 0.99], [0.2, 0.2], [0.1, 0.0]]
    found = chosen(cell, [source(s) for each in scores for s in each], {"space": space, "seeds": 2})
    assert (found.run["lr"], found.method["parameterization"]["alpha"]) == (0.1, 2.0)
    assert attrs.evolve(found, method=cell.method, run=cell.run) == cell
    assert best_of([mean_score(each) for each in scores]) == 1
    with pytest.raises(LrkitError, match="every one diverged"):
        best_of([mean_score([math.nan])])


@given(
    rates=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4, unique=True),
    alphas=st.lists(st.integers(1, 64), min_size=2, max_size=4, unique=True),
    order=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_grid_is_every_combination(place, rates, alphas, order):
    """Every row tries every combination once, whatever the order of the settings, at its own path of an argument."""
    space = {"run.lr": rates, "alpha": alphas}
    space = dict(reversed(space.items())) if order else space
    rows = [{"base": "lora"}, {"base": "svd-lora"}]
    plan = lay_out(asked(place, {"space": space, "seeds": 1}, rows=rows, seeds=1))
    tried = {}
    for job in jobs_of(plan):
        if job.trial:
            value = (job.cell.run["lr"], job.cell.method["parameterization"]["alpha"])
            tried.setdefault(job.label, []).append(value)
    wanted = sorted(itertools.product(rates, map(float, alphas)))
    assert [sorted(each) for each in tried.values()] == [wanted] * 3
    assert len({job.key for job in jobs_of(plan)}) == 3 * (len(wanted) + 1)


def test_log_range():
    """A range is even in its logarithm, and holds its ends."""
    assert domain("log(1e-4, 1e-2, 5)", "x").values() == pytest.approx([1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2])
    assert grid({"a": "log(1,100,3)", "b": ["x", True]})[:3] == [
        {"a": 1.0, "b": "x"},
        {"a": 1.0, "b": True},
        {"a": 10.0, "b": "x"},
    ]


def test_proposals_follow_from_results():
    """What is proposed follows from the batches before alone: computed anew from a part or from all, it is the same."""
    space = {"parameterization.alpha": [4, 8, 16], "run.lr": "log(1e-4,1e-1)"}
    means, found = [], []
    for _ in range(5):
        found = proposals(space, means, len(means) + 4, batch=4, seed=3)
        new = found[len(means) :]
        means += [-math.inf if each["run.lr"] > 0.03 else -abs(math.log(each["run.lr"] / 2e-3)) for each in new]
    assert any(mean == -math.inf for mean in means)
    for count in range(1, 21):
        assert proposals(space, means, count, batch=4, seed=3) == found[:count]
        part = means[: (count - 1) // 4 * 4]
        assert proposals(space, part, count, batch=4, seed=3) == found[:count]
    assert proposals(space, means, 20, batch=4, seed=4) != found


def test_sampler_in_a_study(place, tmp_path):
    """With Optuna each row has as many trials, each at what was proposed to it; computed from a part of them, the same."""
    tune = {
        "space": {"run.lr": "log(1e-3,1e-1)", "scheduler.warmup": [2, 3]},
        "sampler": "tpe",
        "trials": 3,
        "batch": 2,
        "seeds": 1,
    }
    study = asked(place, tune, rows=[], seeds=1)
    out = tmp_path / "tpe"
    assert run(study, out).done == 4
    record = read_study(out)
    trials = trials_of(record, 0, "data")
    means = [trial.mean for trial in trials]
    assert [trial.settings for trial in trials] == proposals(tune["space"], means, 3, batch=2, seed=0)
    (cell,) = record.cells
    assert cell.config["run"]["lr"] == chosen_of(record, 0, "data").settings["run.lr"]
    choice = chosen_of(record, 0, "data")
    assert choice.edges and choice.widen.endswith(" --out ANOTHER")  # a further range proposes other trials
    wider = {**tune, "space": {**tune["space"], "scheduler.warmup": [1, 2, 3]}}
    with pytest.raises(LrkitError, match="choose another --out"):
        run(asked(place, wider, rows=[], seeds=1), out)
    keys = [job.key for job in jobs_of(lay_out(study))]
    more = [job.key for job in jobs_of(lay_out(asked(place, {**tune, "trials": 5}, rows=[], seeds=1))) if job.trial]
    assert [key for key in more if key in keys] == [trial.key for trial in record.trials] and len(more) == 5
    control = asked(place, tune, rows=[{"from": "adalora", "control": "found"}], seeds=1)
    assert [row.tuned for row in lay_out(control).rows][1] == {"run.lr": "run.lr"}
    assert sum(job.trial is not None for job in jobs_of(lay_out(control))) == 6


def halving(place, tmp_path):
    """Of nine trials at a ninth of the steps the best three go on, and of these the best one, which is chosen.

    See tests/integrations/test_more_studies.py.
    """
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.5]
    tune = {"space": {"run.lr": rates}, "halving": 3, "seeds": 1}
    study = asked(place, tune, rows=[], seeds=1, run={"steps": 9, "batch_size": 4, "max_length": 12})
    assert run(study, tmp_path / "out").done == 9 + 3 + 1 + 1
    record = read_study(tmp_path / "out")
    rungs = [[trial for trial in record.trials if trial.rung == rung] for rung in range(3)]
    assert [[trial.steps for trial in rung] for rung in rungs] == [[1] * 9, [3] * 3, [9]]
    tried = [[trial.config["run"]["lr"] for trial in rung] for rung in rungs]
    for rung in (0, 1):
        ranked = sorted(range(len(tried[rung])), key=lambda n: (-rungs[rung][n].score, n))[: len(tried[rung + 1])]
        assert tried[rung + 1] == [tried[rung][n] for n in sorted(ranked)]
    (cell,) = record.cells
    assert [cell.config["run"]["lr"]] == tried[2] == [chosen_of(record, 0, "data").settings["run.lr"]]
    ended = [trial.stopped for trial in trials_of(record, 0, "data")]
    assert sorted(ended, key=lambda step: step or 9) == [1] * 6 + [3] * 2 + [None]


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"space": {"run.steps": [3, 4]}}, "run.steps is the same for every trial"),
        (
            {"space": {"run.lr": [1e-3], "scheduler.warmup": [1, 2]}},
            'row "adalora, found" has no setting "scheduler.warmup"',
        ),
        ({"space": {"target_rank": ["a", "b"]}}, "target_rank"),
        ({"space": {"variant": ["paper", "released"]}}, "tune the setting itself"),
        ({"space": {"run.lr": [1e-3, 1e-3]}}, "a value is there twice"),
        ({"space": {"run.lr": "log(1e-2,1e-3,3)"}}, "0 < LOW < HIGH"),
        ({"space": {"run.lr": "log(1e-3,1e-2)"}}, "no number of values for a grid"),
        ({"space": {"run.lr": [-1.0]}}, "run.lr must be"),
        ({"space": {"run.lr": RATES}, "seeds": [0, 7]}, "seed 0 is one of the study's own"),
        ({"space": {"run.lr": RATES}, "sampler": "random"}, 'there is no sampler "random"'),
        ({"space": {"run.lr": RATES}, "sampler": "tpe"}, "needs trials"),
        ({"space": {"run.lr": RATES}, "trials": 3}, "trials is for tpe"),
        ({"space": {}}, "space is empty"),
        ({"space": {"run.lr": RATES}, "sampled": "tpe"}, 'there is no key "sampled"'),
    ],
)
def test_refused_in_one_line(place, tune, said):
    """What cannot be tuned is refused before anything is built."""
    with pytest.raises(LrkitError) as caught:
        lay_out(asked(place, tune, rows=[{"from": "adalora", "control": "found"}]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_tuning_makes_one(place):
    """Two rows that differ in the tuned setting alone are refused: they would be the same after tuning."""
    rows = [{"label": "slow", "run": {"lr": 1e-4}}]
    with pytest.raises(LrkitError, match='rows "adalora" and "slow" differ in nothing but in what is tuned'):
        lay_out(asked(place, rows=rows))


def test_swap_of_the_method(place):
    """Rows of other methods have the settings that they know; a warning names the others, and nobody's is refused."""
    study = asked(
        place, base="lora", rows=[], swap={"method": ["svd-lora", "full"]}, set={"rank": 2, "orthogonality": 0.3}
    )
    with pytest.warns(LrkitWarning, match=r"rank: not full; orthogonality: not lora, full"):
        plan = lay_out(study)
    found = {row.label: row.method.parameterization for row in plan.rows}
    assert (found["lora"].rank, found["svd-lora"].rank, found["svd-lora"].orthogonality) == (2, 2, 0.3)
    with pytest.raises(LrkitError, match='no row has a setting "target_rank"'):
        lay_out(attrs.evolve(study, set={"target_rank": 2}))


def test_tune_from_python_and_shell(place, tmp_path, capsys):
    """lrkit.tune and `lrkit tune` choose the same, and chosen.toml is a study file of the method as it was chosen."""
    common = ["--set", "run.steps=3", "--set", "run.batch_size=4", "--set", "run.max_length=12", "--set", "rank=2"]
    where = ["--data", place / "data", "--model", place / "model", "--workers", 0, "--tune-seeds", 1]
    out = tmp_path / "shell"
    told = command_line.ask(
        capsys, "tune", "lora", "--tune", "run.lr=0.003,0.05", "--tune", "alpha=4,8", *where, *common, "--out", out
    )
    tuned = lrkit.tune(
        "lora",
        {"run.lr": [0.003, 0.05], "alpha": [4, 8]},
        out=tmp_path / "python",
        task={"data": str(place / "data")},
        model=str(place / "model"),
        set={"rank": 2},
        run={"steps": 3, "batch_size": 4, "max_length": 12},
        seeds=1,
        workers=0,
    )
    assert told["settings"] == tuned.settings and len(tuned.trials) == 4
    chosen_file = tomllib.loads((out / "chosen.toml").read_text())
    assert chosen_file["run"]["lr"] == tuned.settings["run.lr"]
    plan = lay_out(lrkit.study.asked.study_named(str(out / "chosen.toml")))
    assert plan.rows[0].method.parameterization.alpha == tuned.settings["parameterization.alpha"]
    again = command_line.ask(
        capsys, "ablate", "lora", "--tune", "run.lr=log(1e-3,1e-2,3)", *where[:-2], *common, "--out", "x", "--dry-run"
    )
    assert (again["trials"], again["cells"]) == (6, 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tune", "run.lr"], "--tune takes PATH=A,B,..."),
        (["--tune", "run.lr=a,b"], "run.lr"),
        (["--tune", "run.lr=log(1,2)"], "no number of values"),
        (["--tune", "run.lrr=1,2"], "did you mean"),
        (["--tune", "rank=2,4", "--tune-seeds", "0"], "seed"),
        ([], "say what to tune"),
    ],
)
def test_shell_refuses(words, said, tmp_path, capsys):
    """Bad input of `lrkit tune` ends with exit code 2 and one line."""
    from lrkit.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["tune", "lora", *words, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1

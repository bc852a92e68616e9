"""Comparisons that were silently others: diverged texts, pairs of two codes, corrections of a part, rates of other tasks."""

import json

import folders
import pytest
import studies
import talkers
from test_claims import judged, spread
from test_completion import PIECES, SAID, task

import lrkit
from lrkit.cli import words
from lrkit.cli.studies import _study
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study import cell_folder, cost
from lrkit.study.checkpoints import Record
from lrkit.study.claim_power import seeds_to_show
from lrkit.study.claims import judge, to_markdown
from lrkit.study.combined import combine
from lrkit.study.paired import enough_pairs
from lrkit.study.plan import lay_out, study_from
from lrkit.study.pool import chosen
from lrkit.study.records import read_study
from lrkit.study.report import write_report
from lrkit.study.run import train
from lrkit.study.run_settings import settings_from
from lrkit.study.statistics import compare
from lrkit.study.store import lock
from lrkit.study.trainer import RunTrainer
from lrkit.study.tuned import lr_of
from lrkit.tasks import load_task

LABELS = ("base", "a", "b", "c")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


def changed(folder, change):
    """Change what ``study.json`` says."""
    plain = json.loads((folder / "study.json").read_text())
    change(plain)
    (folder / "study.json").write_text(json.dumps(plain))
    return read_study(folder)


def test_texts_of_a_diverged_run_have_no_score(tmp_path):
    """A model whose weights are NaN still writes something; its scores are NaN, at the end and on the way."""
    talkers.llama(PIECES).save_pretrained(tmp_path)
    PIECES.save_pretrained(tmp_path)
    for lr, diverges in ((1e30, True), (1e-3, False)):
        settings = settings_from({"steps": 3, "batch_size": 4, "max_length": 30, "lr": lr, "head_lr": lr})
        result = train(
            lrkit.methods.lora(rank=2),
            task(SAID * 3, SAID, metric="exact_match", max_new_tokens=4),
            model=str(tmp_path),
            settings=settings,
        )
        assert all((score != score) == diverges for score in result.scores.values())


def test_mixed_pairs_are_told(tmp_path):
    """A pair of an older cell and a newer one is a pair, and table and claims say how many there are."""
    judged(tmp_path / "s", {"movies": spread(0.02), "rte": spread(0.02)})

    def older(plain):
        for cell in plain["cells"]:
            cell["old"] = cell["row"] == 1 and cell["seed"] < 3

    record = changed(tmp_path / "s", older)
    told = "3 of 10 pairs are of a cell of older code beside one of newer code."
    assert [told in row.notes for row in compare(record).rows] == [False, True, False, True]
    (found,) = judge(record)
    assert found.verdict == "replicated" and found.why.endswith(
        "in 6 pairs of cells one is of older code than the other"
    )
    record = changed(tmp_path / "s", lambda plain: [cell.update(old=True) for cell in plain["cells"]])
    assert not any("older code" in note for row in compare(record).rows for note in row.notes)


@pytest.mark.parametrize("gone", ["missing", "failed", "diverged"])
def test_rows_without_pairs_are_corrected_for(tmp_path, gone):
    """A row whose cells are all to come, or all failed, counts in Holm's correction: no p rises when they are done."""
    settings = {
        "labels": LABELS,
        "tasks": ("movies", "rte"),
        "seeds": range(7),
        "score": lambda r, t, s: 0.8 + 0.01 * r + s / 1e4,
    }
    lost = [(row, name, seed) for row in (2, 3) for name in ("movies", "rte") for seed in range(7)]
    part = read_study(studies.write_study(tmp_path / "part", **settings, **{gone: lost}))
    whole = read_study(studies.write_study(tmp_path / "whole", **settings))
    for table in (compare(part), compare(whole)):
        assert [row.p_holm for row in table.rows if row.label == "a"] == [3 * 2 / 2**7] * 2
    assert [[each.p_holm for each in combine(record) if each.label == "a"] for record in (part, whole)] == [
        [3 * each.p for each in combine(record) if each.label == "a"] for record in (part, whole)
    ]
    assert [row.p_holm for row in compare(part).rows if row.label in ("base", "b", "c")] == [None] * 6


def test_one_pair_beside_many(tmp_path):
    """A claim with one pair on a task is judged, and named undecided: there is no spread to count seeds by."""
    record_of = {"movies": [0.005 + 1e-5 * seed for seed in range(10)], "rte": [-0.002] * 10}
    claim = {"says": "b beats a", "source": "us", "higher": "b", "lower": "a"}
    claims = [claim | {"name": name} for name in ("c", "d")]
    judged(tmp_path / "s", record_of, claims=claims)
    record = changed(
        tmp_path / "s",
        lambda plain: plain.update(cells=[c for c in plain["cells"] if c["task"] == "movies" or c["seed"] == 0]),
    )
    found = judge(record)
    assert [each.verdict for each in found] == ["open"] * 2
    assert "seeds would" not in found[0].why
    write_report(tmp_path / "s")


def test_claims_on_the_page_are_words(tmp_path):
    """The page has each task's difference with its interval and n; margins are in points where differences are."""
    judged(tmp_path / "s", {"movies": spread(0.0), "rte": spread(0.001)})
    write_report(tmp_path / "s")
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "OnTask(" not in page
    found = judge(read_study(tmp_path / "s"))[0]
    for each in found.tasks:
        assert f"{each.task} {each.words}, n 10" in page
    assert " | 1 point | " in to_markdown(read_study(tmp_path / "s"), [found])


def test_rates_are_the_tasks_own(tmp_path):
    """Each task's table has the row's rate on that task, and a claim names rates in the order of the tasks."""
    judged(tmp_path / "s", {"movies": spread(0.02), "rte": spread(0.02)})
    rates = {"movies": {"lr": 1e-2, "head_lr": 1e-3}, "rte": {"lr": 4e-3, "head_lr": 1e-3}}
    record = changed(tmp_path / "s", lambda plain: [row.update(rates=rates) for row in plain["rows"]])
    assert [lr_of(record, 1, name) for name in ("movies", "rte")] == ["0.01", "0.004"]
    assert [row.lr for row in compare(record).rows] == ["0.01", "0.01", "0.004", "0.004"]
    assert "b: lr 0.01 / 0.004" in to_markdown(record, judge(record))


@pytest.mark.parametrize("claims", [1, 3, 4, 8])
def test_advised_seeds_can_do_it(claims):
    """So many seeds on one task can bring p below 0.05 after the correction, however clear the advantage."""
    assert seeds_to_show([1e-3], 0.01, claims=claims) >= enough_pairs(claims)


def test_a_rung_killed_while_scored_takes_no_further_step(place, tmp_path, monkeypatch):
    """A run that ends early leaves no checkpoint of its last step, from which another step would be taken."""

    def go(record=None):
        return train(
            lrkit.methods.lora(rank=2),
            load_task(None, data=place / "data"),
            model=str(place / "model"),
            settings=settings_from({"steps": 8, "batch_size": 4, "max_length": 8}),
            record=record,
            stop=3,
        )

    whole = go()

    def killed(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "predict", killed)
        with pytest.raises(RuntimeError, match="killed"):
            go(Record(folder=tmp_path, checkpoint_seconds=0.0))
    assert Record(folder=tmp_path).step() == 2
    again = go(Record(folder=tmp_path, checkpoint_seconds=0.0))
    assert (again.steps, again.losses, again.scores) == (3, whole.losses, whole.scores)


def test_what_is_typed_replaces_the_file(tmp_path):
    """A setting of the model's that is its default replaces what a study file says, as any other does."""
    (tmp_path / "s.toml").write_text('base = "lora"\ntasks = ["movies"]\nseeds = 6\n[loading]\ndtype = "bfloat16"\n')
    for sets, dtype in (["model.dtype=float32"], {}), ([], {"dtype": "bfloat16"}):
        typed = {"loading": words.loading_given(sets, trust=False), "set": {}, "run": {}, "swap": {}, "tune": {}}
        assert _study(str(tmp_path / "s.toml"), typed, sets, None).loading == dtype


def test_a_cell_that_is_made_anew_has_its_own_lines(tmp_path):
    """What is run again from its first step keeps no line of the run before."""
    kept = {"attempts.jsonl", "config.json"}
    for name in {"result.json", "history.jsonl", "metrics.jsonl", cell_folder.PACKED} | kept:
        (tmp_path / name).write_text("{}\n")
    cell_folder.forget(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_no_workers_are_no_executor():
    """In this process there are no workers of an executor on other machines: it would be passed over."""
    with pytest.raises(LrkitError, match="--workers 0 trains in this process, and not by --executor ray"):
        chosen("ray", 0, 1, None)
    chosen("local", 0, 1, None)


def test_costs_that_another_process_measures(place, tmp_path):
    """Costs that are not measured are told."""
    (tmp_path / "costs").mkdir()
    plain = {"base": "lora", "tasks": [{"data": str(place / "data")}], "model": str(place / "model"), "seeds": 1}
    plan = lay_out(study_from(plain))
    with lock(tmp_path / "costs" / "lock"), pytest.warns(LrkitWarning, match="another process measures the costs"):
        cost.measure(plan, tmp_path, threads=1)

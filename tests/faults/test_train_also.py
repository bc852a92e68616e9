"""Which layers are adapted and which modules train in full can be said for a run, a study, and one row of it."""

import json

import models
import pytest

import lrkit
from lrkit import cli
from lrkit.study.graph import jobs_of
from lrkit.study.ledger import write_plan
from lrkit.study.plan import changes, lay_out, study_from
from lrkit.study.study_file import TaskRecord

ROWS = [
    {"label": "classifier", "train_also": ["classifier"]},
    {"label": "none", "train_also": []},
    {"label": "queries", "targets": ["query"], "train_also": "auto"},
    {"targets": ["query", "value"]},
]


def main(arguments):
    """The command line's exit code."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with MiniLM's tokenizer, as a model folder."""
    from transformers import BertConfig, BertForSequenceClassification

    from lrkit.study.pretrained import load_model
    from lrkit.tasks import Head

    _, tokenizer = load_model("minilm", Head(num_labels=2, problem_type="single_label_classification"))
    config = models.bert().config.to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    BertForSequenceClassification(BertConfig(**config)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_rows_say_what_they_attach_to(tmp_path):
    """Each row's cells carry its targets and head, under keys of their own; what a row changes is shown."""
    plan = lay_out(study_from({"base": "lora", "rows": ROWS, "seeds": 1}))
    assert [row.label for row in plan.rows] == ["lora", "classifier", "none", "queries", "targets=query+value"]
    cells = [job.cell for job in jobs_of(plan)]
    assert [cell.train_also for cell in cells] == ["auto", ["classifier"], [], "auto", "auto"]
    assert [cell.targets for cell in cells] == ["all-linear"] * 3 + [["query"], ["query", "value"]]
    assert len({cell.key for cell in cells}) == 5
    assert changes(plan, plan.rows[1]) == [{"path": "train_also", "base": "auto", "value": "classifier"}]
    # What is "auto" as it was before there was a choice keeps its name.
    plain = lay_out(study_from({"base": "lora", "seeds": 1, "train_also": "auto"}))
    assert jobs_of(plain)[0].cell.key == cells[0].key
    other = lay_out(study_from({"base": "lora", "seeds": 1, "train_also": ["classifier"]}))
    assert jobs_of(other)[0].cell.key == cells[1].key
    write_plan(
        plan, jobs_of(plan), {"movies": TaskRecord(name="movies", metric="accuracy", majority=0.5)}, tmp_path / "s"
    )
    told = json.loads((tmp_path / "s" / "study.json").read_text())
    assert told["rows"][1]["train_also"] == ["classifier"]
    moved = lay_out(study_from({"base": "lora", "rows": [{"label": "none", "train_also": "auto", "set": {"rank": 2}}]}))
    with pytest.raises(lrkit.LrkitError, match='row "none" is another method there'):
        write_plan(moved, jobs_of(moved), {"movies": TaskRecord(**told["tasks"][0])}, tmp_path / "s")


def test_wrong_heads_are_told_before_the_first_step(tmp_path, capsys):
    """A name that matches nothing ends in exit code 2 and one line."""
    study = tmp_path / "study.toml"
    study.write_text('base = "lora"\n[[rows]]\nlabel = "x"\ntrain_also = ["clasifier"]\n')
    assert main(["ablate", str(study), "--out", str(tmp_path / "out")]) == 2
    assert "row x on movies: train_also" in " ".join(capsys.readouterr().err.split())
    study.write_text('base = "lora"\n[[rows]]\nlabel = "x"\ntrain_also = 3\n')
    assert main(["ablate", str(study), "--dry-run"]) == 2
    assert "must be a text or a list of texts" in " ".join(capsys.readouterr().err.split())


def test_a_run_trains_the_head_that_it_is_told(folder, capsys):
    """The command line's head is the one that trains, in one run and in a study's cells."""
    heads = {}
    for given in ("classifier", "none", "auto"):
        arguments = ["run", "lora", "--model", folder, "--train-also", given, "--set", "run.steps=1", "--json"]
        arguments += ["--set", "run.train_rows=8", "--set", "run.validation_rows=8", "--targets", "query"]
        assert main(arguments) == 0, capsys.readouterr().err
        heads[given] = json.loads(capsys.readouterr().out)["summary"]["head"]
    assert heads == {"classifier": 2 * 32 + 2, "none": 0, "auto": 2 * 32 + 2 + 32 * 32 + 32}

"""Which layers a run adapts: `exclude` and `slices` as settings of runs, studies, counts and allocations."""

import json

import attrs
import models
import pytest
import torch
from test_attach import logits

import lrkit
from lrkit import cli
from lrkit.cli import words
from lrkit.study import cost
from lrkit.study.cell import Cell, make_cell
from lrkit.study.execute import check
from lrkit.study.graph import jobs_of
from lrkit.study.plan import lay_out, study_from
from lrkit.study.run_settings import RunSettings, settings_from
from lrkit.study.task_spec import TaskSpec

SHORT = ["--set", "run.steps=1", "--set", "run.train_rows=8", "--set", "run.validation_rows=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2, whose q, k and v are one projection, with MiniLM's tokenizer."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from lrkit.study.pretrained import load_model
    from lrkit.tasks import Head

    place = tmp_path_factory.mktemp("model")
    _, tokenizer = load_model("minilm", Head(num_labels=2, problem_type="single_label_classification"))
    sizes = {"vocab_size": len(tokenizer), "n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def told(capsys, *arguments):
    """What a command answers as JSON, or the line that it is refused with."""
    capsys.readouterr()
    try:
        cli.main([*arguments, "--json"])
    except SystemExit as end:
        if end.code:
            return capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ---- cells -----------------------------------------------------------------------------------------------------------


def cell(**run):
    """The cell of a LoRA run with these settings."""
    plain = lrkit.to_plain(lrkit.methods.lora())
    return make_cell(plain, TaskSpec(task="movies"), "minilm", "all-linear", attrs.asdict(settings_from(run)))


def test_keys_stay_without_a_choice():
    """A cell in which nothing is left out or sliced holds what cells held before, so that its key is what it was."""
    before = {field.name for field in attrs.fields(RunSettings)} - {"threads", "exclude", "slices", "group_by_length"}
    assert set(cell().run) == before
    assert cell(exclude=[], slices=False).key == cell().key
    keys = {cell(**run).key for run in ({}, {"slices": True}, {"exclude": ["query"]}, {"exclude": "query"})}
    assert len(keys) == 4


@pytest.mark.parametrize("exclude", [["query"], ".*query"])
def test_cells_read_back(exclude):
    """A cell with a choice is equal after JSON, and its run has the settings again."""
    made = cell(exclude=exclude, slices=True)
    again = Cell(**json.loads(json.dumps(made.to_plain())))
    assert again == made and again.key == made.key
    assert settings_from(again.run).attach == {
        "exclude": exclude if isinstance(exclude, str) else tuple(exclude),
        "slices": True,
    }


@pytest.mark.parametrize("wrong", [3, [3], {"a": 1}, None])
def test_wrong_names_are_refused(wrong):
    """Neither plain data nor Python can leave out what is no name."""
    with pytest.raises(lrkit.LrkitError, match=r"run\.exclude"):
        settings_from({"exclude": wrong})
    with pytest.raises(lrkit.LrkitError, match=r"RunSettings\.exclude must be a regular expression or a list of names"):
        RunSettings(exclude=wrong)


# ---- studies ---------------------------------------------------------------------------------------------------------


def test_rows_leave_layers_out(folder):
    """A study and each of its rows may choose, and what does not fit is said before the first step, with the row."""
    asked = {"base": "lora", "model": folder, "seeds": 1, "run": {"slices": True}}
    rows = [{"label": "no k", "run": {"exclude": ["c_attn.k"]}}, {"label": "whole", "run": {"slices": False}}]
    plan = lay_out(study_from(asked | {"rows": rows}))
    check(plan)
    chosen = [{k: v for k, v in job.cell.run.items() if k in ("exclude", "slices")} for job in jobs_of(plan)]
    assert chosen == [{"slices": True}, {"slices": True, "exclude": ["c_attn.k"]}, {}]
    wrong = lay_out(study_from(asked | {"rows": [{"label": "x", "run": {"exclude": ["c_atn.k"]}}]}))
    with pytest.raises(lrkit.LrkitError, match="row x on movies: exclude"):
        check(wrong)


def test_costs_are_of_the_rest():
    """The steps that are measured train the layers that the cell trained."""
    asked = cell(slices=True, exclude=["c_attn.k", "c_fc", "c_proj"]).to_plain()
    side = cost._Side(models.make("gpt2"), asked, 10, None, torch.device("cpu"), None, iter(()))
    assert {name.rpartition(".")[2] for name in side.adapted.adapters} == {"q", "v"}


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["k,c_proj", r".*\.(k|c_proj)", '["k","c_proj"]'])
def test_a_run_adapts_the_rest(folder, said, capsys):
    """``lrkit run`` adapts q and v apart, with ranks shared among the layers that are left."""
    where = ["--set", f"run.exclude={said}", "--set", "run.slices=true"]
    ranks = ["--ranks", "uniform"] if said == "k,c_proj" else []
    result = told(capsys, "run", "lora", "--model", folder, "--set", "rank=3", *SHORT, *where, *ranks)
    layers = {layer["name"].partition("h.0.")[2]: layer["rank"] for layer in result["summary"]["layers"]}
    assert layers == {"attn.c_attn.q": 3, "attn.c_attn.v": 3, "mlp.c_fc": 3}
    assert result["settings"]["slices"] is True


def test_counts_are_of_the_rest(folder, capsys):
    """``lrkit params`` counts the layers that a run would adapt; it takes no other setting of a run."""
    where = ["--set", "run.exclude=c_proj,c_fc", "--set", "run.slices=true"]
    counted = told(capsys, "params", "lora", "--model", folder, "--set", "rank=2", *where)["methods"]["lora"]
    assert (counted["layers"], counted["start"]) == (3, 3 * 2 * (16 + 16))
    shared = told(capsys, "params", "lora", "--model", folder, "--ranks", "random:1", "--set", "rank=2", *where)
    assert shared["methods"]["lora"]["start"] == counted["start"]
    assert "run.lr is a setting of a run" in told(capsys, "params", "lora", *where, "--set", "run.lr=1")


def test_other_tools_names_lead_there(capsys):
    """PEFT's name of the setting is answered with the words to type."""
    assert "--set run.exclude=lm_head" in told(capsys, "run", "lora", "--set", "run.exclude_modules=lm_head")
    assert words.divided(["run.exclude=query"]) == ({}, {"exclude": ["query"]})


# ---- allocations -----------------------------------------------------------------------------------------------------


def test_allocations_share_among_slices():
    """Ranks of slices fit an attach with slices, and sizes are those of the slices."""
    model = models.make("gpt2")
    where = {"slices": True, "exclude": ["c_fc", "c_proj"]}
    ranks = lrkit.Allocation.uniform(model, total=12, **where)
    assert {name.rpartition(".")[2] for name in ranks} == {"q", "k", "v"} and ranks.total == 12
    assert set(ranks.sizes.values()) == {(32, 32)}
    random = lrkit.Allocation.random(model, total=12, seed=0, **where)
    assert set(random) == set(ranks) == set(lrkit.Allocation({"*": 2}).on(model, **where))
    shuffled = lrkit.Allocation({"q": 1, "*": 2}).shuffled(seed=0, model=model, **where)
    assert sorted(shuffled.values()) == [1, 1, 2, 2, 2, 2]
    before = logits(model)
    assert lrkit.attach(model, lrkit.methods.lora(rank=ranks), **where).allocation() == ranks
    assert (logits(model) - before).abs().max() < 1e-6

"""What users of PEFT look for: layers left out, rsLoRA's scale, groups with learning rates of their own."""

import json
import math

import models
import pytest
import torch
from test_attach import fit, logits
from test_trainer import trainer
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import lrkit
from lrkit import accounting
from lrkit.parameterizations import SVD, LoRA


def names(exclude, targets="all-linear"):
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2), targets=targets, exclude=exclude)
    return set(adapted.adapters)


# ---- exclude ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [["query", "attention.output.dense"], r".*\.query|.*attention\.output\.dense"])
def test_excluded_layers_stay_plain(exclude):
    """Suffixes and a regular expression leave out exactly the layers that they match."""
    left = {n for n in names(()) if not n.endswith(("query", "attention.output.dense"))}
    assert names(exclude) == left and 0 < len(left) < len(names(()))


@pytest.mark.parametrize(
    ("exclude", "told"),
    [
        (["quary"], 'exclude: "quary" matches none of the 12 layers .*query'),
        ("query", "must match the whole name"),
        (["classifier"], "matches none"),
        (".*", "leaves out all 12 layers"),
        (3, "must be a regular expression or a list"),
        ([3], "must be a regular expression or a list"),
        ("(", "exclude"),
    ],
)
def test_useless_exclusions_are_refused(exclude, told):
    """An entry that matches no chosen layer, or all of them, is an error that leaves the model as it was."""
    model = models.make("bert")
    with pytest.raises(lrkit.LrkitError, match=told):
        lrkit.attach(model, lrkit.methods.lora(rank=2), exclude=exclude)
    lrkit.attach(model, lrkit.methods.lora(rank=2))


def test_exclusions_are_saved(tmp_path):
    """A loaded handle adapts the layers that were left, and computes the same."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), exclude=["query"])
    fit(model, adapted, steps=2)
    adapted.save(tmp_path)
    other = models.make("bert")
    loaded = lrkit.load(other, tmp_path)
    assert list(loaded.adapters) == list(adapted.adapters)
    assert torch.equal(logits(other), logits(model))


def test_allocations_leave_layers_out():
    """An allocation shares ranks among the layers that are left, and fits an attach that leaves out the same."""
    model = models.make("bert")
    ranks = lrkit.Allocation.uniform(model, total=20, exclude=["query", "key"])
    assert ranks.total == 20 and not any("query" in layer or "key" in layer for layer in ranks)
    random = lrkit.Allocation.random(model, total=20, seed=1, exclude=["query", "key"])
    assert set(random) == set(ranks) == set(lrkit.Allocation({"*": 2}).on(model, exclude=["query", "key"]))
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=ranks), exclude=["query", "key"])
    assert adapted.allocation() == ranks
    adapted.detach()
    counted = accounting.count(lrkit.methods.lora(rank=2), model, total_steps=1, exclude=["query"])
    assert counted.layers == 10


# ---- rsLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_scale_is_rsloras(rank):
    """The scale is α/√r, of each layer's own rank or of the mean."""
    model = models.make("bert")
    for cls in (LoRA, SVD):
        adapted = lrkit.attach(model, lrkit.Method(parameterization=cls(rank=rank, alpha=6.0, scale="sqrt-rank")))
        for adapter in adapted.adapters.values():
            assert adapter.scaling == pytest.approx(6.0 / math.sqrt(rank), rel=1e-5)
        adapted.detach()
    table = LoRA(rank={"query": rank, "*": 2}, alpha=6.0, scale="sqrt-rank")
    scales = {
        n.rpartition(".")[2]: a.scaling
        for n, a in lrkit.attach(model, lrkit.Method(parameterization=table)).adapters.items()
    }
    assert (scales["query"], scales["key"]) == (6.0 / math.sqrt(rank), 6.0 / math.sqrt(2))


@pytest.mark.parametrize("pattern", [{}, {"query": 2}])
def test_rslora_agrees_with_peft(pattern, tmp_path):
    """PEFT's ``use_rslora`` is read as the setting, with PEFT's outputs; what is exported has them again."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["query", "value"],
        rank_pattern=pattern,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(models.make("bert"), config)
    theirs.save_pretrained(tmp_path / "in")
    model = models.make("bert")
    adapted = lrkit.from_peft(model, tmp_path / "in")
    assert adapted.method.parameterization.scale == "sqrt-rank"
    layer = theirs.base_model.model.bert.encoder.layer[0].attention.self
    mine = model.bert.encoder.layer[0].attention.self
    for name in ("query", "value"):
        assert getattr(mine, name).scaling == getattr(layer, name).scaling["default"]
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    exported = lrkit.peft.export(adapted, tmp_path / "out")
    assert exported.difference < 1e-6
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert math.isclose(saved["lora_alpha"] / saved["r"], 6 / math.sqrt(saved["r"]))


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_are_every_parameter_once():
    """Each part has a group with its rate, the head one of its own; together they are all that trains."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.adalora(rank=4, target_rank=2))
    groups = adapted.parameter_groups(1e-3, {"B": 16, "core": 0.5}, head_lr=1e-4, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, adapted.parameters()))
    rates = {(g["name"], g["weight_decay"]): g["lr"] for g in groups}
    assert rates == {
        ("core", 0.0): 5e-4,
        ("B", 0.1): 1.6e-2,
        ("A", 0.1): 1e-3,
        ("head", 0.1): 1e-4,
        ("head", 0.0): 1e-4,
    }
    assert all("weight_decay" not in group for group in adapted.parameter_groups(1e-3))
    assert {id(p) for g in groups if g["name"] == "head" for p in g["params"]} == set(
        map(id, adapted.head_parameters())
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((1e-3, {"C": 2}), "'C' is no part that trains.*LoRA has A, B"),
        ((1e-3, {"B": -1}), "ratios: B must be a number from 0"),
        ((None,), "lr must be a number from 0, not None"),
        ((True,), "lr must be a number"),
        ((math.inf,), "lr must be a number"),
    ],
)
def test_unsound_groups_are_refused(given, told):
    """A part that does not exist, or a rate that is none, is one line."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2))
    with pytest.raises(lrkit.LrkitError, match=told):
        adapted.parameter_groups(*given)


def test_frozen_random_matrices_have_no_group():
    """A part that trains in no layer cannot be given a rate."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.elora(rank=4))
    assert {g["name"] for g in adapted.parameter_groups(1e-3)} == {"core", "out_scale", "head"}
    with pytest.raises(lrkit.LrkitError, match="ratios"):
        adapted.parameter_groups(1e-3, {"A": 2})


@pytest.mark.parametrize(
    "method",
    [
        lrkit.methods.aflora(rank=4, warmup=2, final=6),
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5),
    ],
    ids=["freezes", "cuts"],
)
def test_groups_stay_after_decisions(method):
    """Frozen and cut tensors stay in their groups, so that a resumed optimizer has the same."""
    model = models.make("bert")
    adapted = lrkit.attach(model, method)
    first = adapted.parameter_groups(1e-2, {"B": 4})
    fit(model, adapted, optimizer=torch.optim.AdamW(first))
    if adapted.method.action.unit == "component":
        adapted.compact()
    again = adapted.parameter_groups(1e-2, {"B": 4})
    assert [(g["name"], list(map(id, g["params"]))) for g in again] == [
        (g["name"], list(map(id, g["params"]))) for g in first
    ]


def test_loraplus_steps_as_in_peft():
    """Three steps of AdamW with B's rate λ times A's give the weights that PEFT's own LoRA+ optimizer gives."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    base = models.make("bert")
    theirs = peft.get_peft_model(base, config)
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=4, alpha=8.0), targets=["query", "value"], train_also=[])
    pairs = []
    for name, adapter in adapted.adapters.items():
        other = theirs.base_model.model.get_submodule(name)
        pairs += [(adapter.A, other.lora_A["default"].weight), (adapter.B, other.lora_B["default"].weight)]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    ours = torch.optim.AdamW(adapted.parameter_groups(1e-3, {"B": 16}, weight_decay=0.01))
    plus = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
    )
    for m, optimizer in ((model, ours), (theirs, plus)):
        m.eval()
        for step in range(3):
            m(**models.batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in pairs:
        assert torch.allclose(mine, other, atol=1e-6)


# ---- trackers --------------------------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Keeps what it is told, as the trackers of ``report_to`` do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def report_to(monkeypatch):
    """The name by which ``report_to`` finds `Tracker`."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stand-in", Tracker)
    return ["stand-in"]


def tracked(run):
    """What the tracker of a Trainer got beside each loss."""
    (tracker,) = (each for each in run.callback_handler.callbacks if isinstance(each, Tracker))
    return [logs for logs in tracker.logs if "loss" in logs]


def test_trackers_get_the_figures(report_to, tmp_path):
    """A tracker of ``report_to`` gets ranks, budget, scores and penalty with each loss, once; so does the Trainer's log."""
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5)
    callback = lambda a: lrkit.trainer.AdaptCallback(a, log=True)  # noqa: E731
    run, adapted = trainer("bert", method, tmp_path, callback=callback, report_to=report_to)
    run.train()
    losses = tracked(run)
    assert len(losses) == 20 and all("penalty" in logs for logs in losses)
    assert losses[0]["lrkit/rank/total"] == 48 and losses[-1]["lrkit/rank/total"] == 24
    assert losses[-1]["lrkit/rank/total"] == adapted.allocation().total and losses[-1]["lrkit/rank/mean"] == 2
    decided = {d.step: d for d in adapted.history}
    for step, logs in enumerate(losses, 1):
        if step in decided:
            assert (logs["lrkit/budget"], logs["lrkit/kept"]) == (decided[step].budget, decided[step].kept)
    assert losses[5]["lrkit/score/min"] <= losses[5]["lrkit/score/mean"] <= losses[5]["lrkit/score/max"]
    assert "lrkit/score/mean" not in losses[-1]
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert [e["lrkit/trainable"] for e in history] == [e["lrkit/trainable"] for e in losses]


def test_layers_are_logged_each(report_to, tmp_path):
    """``log="layers"`` sends each layer's rank; another word is refused."""
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=1)
    run, adapted = trainer(
        "bert",
        method,
        tmp_path,
        callback=lambda a: lrkit.trainer.AdaptCallback(a, log="layers"),
        report_to=report_to,
        max_steps=6,
    )
    run.train()
    ranks = {layer: tracked(run)[-1][f"lrkit/rank/{layer}"] for layer in adapted.adapters}
    assert ranks == adapted.allocation().layers()
    with pytest.raises(lrkit.LrkitError, match="log must be True, False"):
        lrkit.trainer.AdaptCallback(adapted, log="layer")


def test_trackers_get_the_penalty(report_to, tmp_path):
    """Without ``log`` a tracker gets the penalty, and is told of everything once, as before."""
    run, _ = trainer("bert", lrkit.methods.adalora(rank=2, target_rank=1), tmp_path, report_to=report_to, max_steps=3)
    before = {type(callback) for callback in run.callback_handler.callbacks}
    run.train()
    assert [sorted(logs) for logs in tracked(run)] == [["epoch", "grad_norm", "learning_rate", "loss", "penalty"]] * 3
    assert {type(callback) for callback in run.callback_handler.callbacks} == before


def test_figures_are_asked_for(tmp_path):
    """Without ``log=True`` nothing but the penalty is added."""
    run, _ = trainer("bert", lrkit.methods.lora(rank=2), tmp_path, max_steps=2)
    run.train()
    assert not any(name.startswith("lrkit/") for entry in run.state.log_history for name in entry)


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_are_switched(tmp_path):
    """Runs of two methods on one base, exported, are switched in one PEFT model, there and back, and reloaded by lrkit."""
    peft = pytest.importorskip("peft")
    methods = {
        "first": lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=1),
        "second": lrkit.methods.aflora(rank=3),
    }
    expected = {}
    for seed, (name, method) in enumerate(methods.items()):
        adapted = lrkit.attach(models.make("bert"), method)
        torch.manual_seed(seed)
        fit(adapted.model, adapted, steps=20)
        expected[name] = logits(adapted.model)
        lrkit.export(adapted, tmp_path / name)
        adapted.save(tmp_path / name / "run")
    both = peft.PeftModel.from_pretrained(models.make("bert"), str(tmp_path / "first"), adapter_name="first")
    both.load_adapter(str(tmp_path / "second"), adapter_name="second")
    model = models.make("bert")
    for name in ("second", "first", "second"):
        both.set_adapter(name)
        assert torch.allclose(logits(both), expected[name], atol=1e-6)
        adapted = lrkit.load(model, tmp_path / name / "run")
        assert torch.equal(logits(model), expected[name])
        adapted.detach()
    assert torch.equal(logits(model), logits(models.make("bert")))
    assert (expected["first"] - expected["second"]).abs().max() > 0.01


def test_exclusions_that_change_nothing_are_refused():
    """A method that trains a layer whatever the targets are refuses to leave it out."""
    method = lrkit.methods.full()
    with pytest.raises(
        lrkit.LrkitError, match=r"Full\(\) trains .*query.* whatever the targets are: leave exclude out"
    ):
        lrkit.attach(models.make("bert"), method, exclude=["query"])

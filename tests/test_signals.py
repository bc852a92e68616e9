"""Layer metrics: what they are shown, against activations and gradients that are collected by hand."""

import contextlib
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import signals_worker
import torch
from models import batch, make
from signals import ByUnit, GradientNorm, InputNorm, freezing, method
from torch.nn import functional as F

import lrkit
import lrkit.testing
from lrkit import accounting
from lrkit.study.flops import of_calibration
from lrkit.testing.runs import POINTS, Run, resumes


@attrs.frozen(kw_only=True)
class Remembering(lrkit.metrics.Magnitude):
    """Counts in its memory how often a unit was kept, and notes what `reduce` is given."""

    memory = ("kept",)
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def decided(self, kept, memory):
        memory["kept"].add_(kept)

    def reduce(self, parts):
        scores = super().reduce(parts) + parts.memory["kept"]
        self.seen.append((parts.memory["kept"].clone(), scores))
        return scores


def attached(kind="bert", how=None, total=10, **options):
    """Return a small model with a method that freezes layers, bound."""
    model = make(kind, seed=3).eval()
    adapted = lrkit.attach(model, freezing(InputNorm()) if how is None else how, **options)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=total)
    return model, adapted, optimizer


def masked(seed=0, rows=6):
    """Return a batch of which some tokens are padding."""
    data = batch(seed=seed, rows=rows)
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][1, 5:] = 0
    data["attention_mask"][2, :3] = 0
    return data


def streams(adapted):
    """Return what is remembered of each layer."""
    return adapted.controller.policies[0].statistics.state


def by_hand(model, adapted, batches, mask=True):
    """Return mean squared norms of inputs in float64, from hooks on a copy."""
    twin = copy.deepcopy(model).double()
    rows = {name: [] for name in adapted.adapters}
    for name in rows:
        twin.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: rows[name].append(args[0]))
    means = {}
    with torch.no_grad():
        marks = []
        for data in batches:
            twin(**data)
            marks.append(data["attention_mask"].bool() if mask else torch.ones_like(data["input_ids"]).bool())
    for name, seen in rows.items():
        kept = torch.cat([x[m] for x, m in zip(seen, marks, strict=True)])
        means[name] = float(kept.square().sum() / len(kept))
    return means


def test_inputs_are_those_of_tokens():
    """A metric of inputs sees every token of every micro-batch once, and no padding; evaluation does not count."""
    model, adapted, _ = attached()
    batches = [masked(seed) for seed in range(3)]
    want = by_hand(model, adapted, batches)
    for data in batches:
        (model(**data).loss / 3).backward()
        with torch.no_grad():
            model(**data)
    got = {name: float(state["sum"] / state["rows"]) for name, state in streams(adapted).items()}
    assert got == pytest.approx(want, rel=1e-5)
    assert {int(state["rows"]) for state in streams(adapted).values()} == {
        int(sum(b["attention_mask"].sum() for b in batches))
    }


def test_masks_by_position_count():
    """An attention mask that the caller gives by position is seen, whatever decorates the model's forward."""
    model, adapted, _ = attached()
    data = masked()
    model(data["input_ids"], data["attention_mask"], labels=data["labels"]).loss.backward()
    assert {int(state["rows"]) for state in streams(adapted).values()} == {int(data["attention_mask"].sum())}


def weight_gradients(model, adapted, batches, divide=1.0):
    """Return the gradient of each frozen weight, by autograd in a copy in float64 in which it trains."""
    twin = copy.deepcopy(model).double()
    weights = {name: twin.get_submodule(name).base.weight for name in adapted.adapters}
    for weight in weights.values():
        weight.requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(twin.get_submodule(name)) for name in weights}:
            patch.setattr(kind, "fused", False)
        for data in batches:
            (twin(**data).loss / divide).backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_gradient_is_the_weights(kind):
    """Over two micro-batches gᵀ x is the gradient of the frozen weight that autograd gives if the weight trains."""
    model, adapted, _ = attached(kind, freezing(GradientNorm()))
    batches = [batch(seed=seed, rows=4) for seed in range(2)]
    want = weight_gradients(model, adapted, batches, divide=2)
    for data in batches:
        (model(**data).loss / 2).backward()
    for name, state in streams(adapted).items():
        grad = want[name].t() if kind == "gpt2" else want[name]
        torch.testing.assert_close(state["gradient"].double(), grad, rtol=1e-4, atol=1e-7)
    scores = adapted.scores()
    assert scores == pytest.approx({name: float(want[name].square().sum()) for name in scores}, rel=1e-4)


def checkpoint(model, reentrant):
    """Let a model recompute its activations."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("metric", [InputNorm(), GradientNorm()])
def test_checkpointing_counts_once(metric, reentrant):
    """A forward pass that gradient checkpointing repeats counts once."""
    plain, checked = (attached(how=freezing(metric)) for _ in range(2))
    checked[0].train()
    for module in checked[0].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpoint(checked[0], reentrant)
    for model, _, _ in (plain, checked):
        model(**masked()).loss.backward()
    one, two = streams(plain[1]), streams(checked[1])
    for name in one:
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key])


@pytest.mark.parametrize("differ", [False, True])
def test_doubtful_recomputation_fails(differ):
    """Whose rows are recomputed is not known after two calls with masks: the step fails, and the next goes on."""
    model, *_ = attached(how=freezing(InputNorm()))
    model.train()
    checkpoint(model, reentrant=True)
    calls = [(masked if differ else batch)(seed=seed) for seed in range(2)]
    losses = sum(model(**data).loss for data in calls)
    fails = pytest.raises(lrkit.LrkitError, match=r"after 2 calls of the model.*use_reentrant=False")
    with fails if differ else contextlib.nullcontext():
        losses.backward()
    for data in map(masked, range(2)):  # one after the other
        model(**data).loss.backward()


@pytest.fixture(autouse=True)
def registered():
    """Give this file's metrics names, under which runs are saved."""
    with contextlib.ExitStack() as stack:
        for metric in (InputNorm, GradientNorm, ByUnit, Remembering):
            stack.enter_context(lrkit.current().lend("metric", f"my-{metric.__name__.lower()}", metric))
        yield


def test_resumes_bitwise():
    """Runs that read layers resume bit for bit, with units that are masked, cut, or frozen."""
    for how in (
        method(InputNorm()),
        method(GradientNorm()),
        method(ByUnit(), lrkit.actions.Prune(cut="always")),
        freezing(GradientNorm()),
        freezing(ByUnit(), together=False),
    ):
        resumes(how, 10, POINTS)


def test_hooks_come_and_go():
    """No hook stands in the model of an entry-wise method; those of a layer metric go with the last decision.

    They stand on ten layers, and on the model.
    """
    entries = Run(lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=2), 10)
    layers = Run(method(InputNorm()), 10)

    def hooks(run):
        return sum(len(m._forward_hooks) for m in run.model.modules())

    for _ in range(10):
        assert hooks(entries) == 0
        assert hooks(layers) == (11 if layers.adapted.step < 8 else 0)
        entries.step()
        layers.step()
    assert layers.adapted.controller.policies[0].statistics.state == {}
    model, adapted, _ = attached()
    adapted.unbind(quietly=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_keep_their_numbers():
    """What is remembered of each unit follows when others are cut."""
    run = Run(method(ByUnit(), lrkit.actions.Prune(cut="always")), 10)
    run.to(6)
    state = run.adapted.controller.policies[0]
    for block in state.blocks:
        numbers = block.numbers or range(block.count)
        want = torch.tensor([n * 1.5**6 for n in numbers], dtype=torch.float32)
        torch.testing.assert_close(state.statistics.state[block.name]["own"], want)
    assert set(state.statistics.memory["kept"].tolist()) == {2.0}


def test_memory_reaches_reduce():
    """An entry-wise metric finds its memory of units in `reduce`, in the shape of the scores; it is saved and follows."""
    Remembering.seen.clear()
    run = Run(method(Remembering()), 10)
    run.to(10)
    assert all(kept.shape == scores.shape for kept, scores in Remembering.seen)
    assert max(float(kept.max()) for kept, _ in Remembering.seen) == len(run.adapted.history) - 1
    for cut in ("never", "always"):
        resumes(method(Remembering(), lrkit.actions.Prune(cut=cut)), 10, (5,))


class Scaled:
    """A gradient scaler's word."""

    def get_scale(self):
        return 1024.0


def test_loss_scale_is_divided_out():
    """A `GradScaler`'s factor is not in g."""
    plain, scaled = (attached(how=freezing(GradientNorm())) for _ in range(2))
    scaled[1].unbind(quietly=True)
    scaled[1].bind(scaled[2], total_steps=10, scaler=Scaled())
    plain[0](**batch(seed=1)).loss.backward()
    (scaled[0](**batch(seed=1)).loss * 1024).backward()
    for name, state in streams(plain[1]).items():
        torch.testing.assert_close(state["gradient"], streams(scaled[1])[name]["gradient"])


def test_odd_numbers_are_left_out():
    """A micro-batch whose gradient is not finite is left out, and said."""
    model, adapted, optimizer = attached(how=freezing(GradientNorm()))
    (model(**batch(seed=1)).loss * torch.inf).backward()
    assert all(torch.isfinite(state["gradient"]).all() for state in streams(adapted).values())
    with pytest.warns(lrkit.LrkitWarning, match="not finite"):
        optimizer.step()


def test_silence_is_said():
    """A step in which nothing went through any layer is said."""
    _, adapted, optimizer = attached()
    for p in adapted.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(lrkit.LrkitWarning, match="nothing has come through any of them"):
        optimizer.step()


def test_convolutions_have_patches():
    """A convolution's rows are patches: gᵀ x is the gradient of its weight."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular"), torch.nn.Flatten()
    )
    adapted = lrkit.attach(model, freezing(GradientNorm()), targets=["0"], train_also=())
    adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=10)
    x = torch.randn(2, 3, 7, 7)
    model(x).square().sum().backward()
    weight = adapted.adapters["0"].base.weight
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w := weight.detach().requires_grad_(), model[0].bias, 2)
    (want,) = torch.autograd.grad(y.square().sum(), w)
    torch.testing.assert_close(streams(adapted)["0"]["gradient"], want.flatten(1), rtol=1e-4, atol=1e-3)


def test_quantile_of_entries_is_refused():
    """An action that goes by entry-wise scores is refused beside a layer metric, with both named."""
    with pytest.raises(lrkit.LrkitError, match=r"InputNorm.*does not fit action Freeze.*scores of entries"):
        attrs.evolve(freezing(InputNorm()), action=lrkit.actions.Freeze(rule="quantile"))


def test_layers_without_rows_are_refused():
    """An embedding has no rows that a metric can read, and is named."""
    with pytest.raises(lrkit.LrkitError, match=r"word_embeddings.*token ids"):
        lrkit.attach(make("bert", seed=0), freezing(InputNorm()), targets=["query", "word_embeddings"])


@pytest.mark.parametrize("metric", [InputNorm, GradientNorm, ByUnit])
def test_contract_is_kept(metric):
    """The metrics of these tests keep the contract of layer metrics."""
    assert lrkit.testing.check(metric()) == []


@attrs.frozen(kw_only=True)
class Last(InputNorm):
    """Remembers the last batch alone."""

    def observe(self, seen, state):
        state["sum"].copy_(seen.x.double().square().sum())
        state["rows"].fill_(max(1, len(seen.x)))


@attrs.frozen(kw_only=True)
class Replacing(InputNorm):
    """Puts new tensors in."""

    def observe(self, seen, state):
        state["sum"] = state["sum"] + seen.x.square().sum()


@attrs.frozen(kw_only=True)
class OneScore(InputNorm):
    """Gives one number for all units."""

    def score(self, layer, state):
        return state["sum"].float()


@pytest.mark.parametrize(
    ("metric", "words"),
    [(Last, "in batches of"), (Replacing, "write in place"), (OneScore, r"score must be \[1\]")],
)
def test_contract_finds(metric, words):
    """A metric that breaks a clause is found out."""
    with lrkit.current().lend("metric", "my-broken", metric):
        findings = lrkit.testing.check(metric())
    assert any(re.search(words, finding.message) for finding in findings)


@pytest.mark.parametrize("metric", [InputNorm(), GradientNorm()])
def test_calibration_reads_layers(metric):
    """Before the first step the same is seen as in training: a decision at step 0 goes by it."""
    how = attrs.evolve(freezing(metric), scheduler=lrkit.schedulers.Once(target=0.5, calibration=2))
    model = make("bert", seed=3).eval()
    adapted = lrkit.attach(model, how)
    batches = [masked(seed) for seed in range(2)]
    if isinstance(metric, InputNorm):
        want = by_hand(model, adapted, batches)
    else:
        want = {name: float(g.square().sum()) for name, g in weight_gradients(model, adapted, batches).items()}
    adapted.calibrate(batches)
    (decision,) = adapted.history
    lost = sorted(want[name] for name in decision.lost)  # query, key and value have one input, and one score
    assert (decision.step, lost) == (0, pytest.approx(sorted(want.values())[: len(want) - decision.kept]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_need_no_backward(monkeypatch):
    """A calibration by inputs alone runs forward: no labels, no gradient; one by gradients goes without neither."""
    monkeypatch.setattr(torch.Tensor, "backward", None)
    how = attrs.evolve(freezing(InputNorm()), scheduler=lrkit.schedulers.Once(target=0.5, calibration=2))
    model = make("bert", seed=3).eval()
    adapted = lrkit.attach(model, how)
    batches = [masked(seed) for seed in range(2)]
    want = by_hand(model, adapted, batches)
    for data in batches:
        del data["labels"]
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    adapted.calibrate(batches)
    assert seen == [False, False]
    (decision,) = adapted.history
    lost = sorted(want[name] for name in decision.lost)
    assert lost == pytest.approx(sorted(want.values())[: len(want) - decision.kept])
    by_gradient = lrkit.attach(make("bert", seed=3).eval(), attrs.evolve(how, metric=GradientNorm()))
    with pytest.raises(lrkit.LrkitError, match="returns no loss for this batch"):
        by_gradient.calibrate(batches)


def test_recomputing_models_calibrate_forward():
    """A model that recomputes its activations shows the inputs of a calibration once, and without a word."""
    how = attrs.evolve(freezing(InputNorm()), scheduler=lrkit.schedulers.Once(target=0.5, calibration=2))
    lost = []
    for recompute in (False, True):
        model = make("bert", seed=3).train()
        if recompute:
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)({"use_reentrant": True})
        adapted = lrkit.attach(model, how)
        adapted.calibrate([masked(0)])
        lost.append(adapted.history)
        assert model.training
    assert lost[0] == lost[1]


@pytest.mark.parametrize("metric", [InputNorm(), GradientNorm()])
def test_counting_shows_nothing(metric):
    """A pass that is counted is no part of the run: no metric takes it in, before a step, in one, or in a calibration."""
    model, adapted, optimizer = attached(how=freezing(metric))
    once = attrs.evolve(freezing(metric), scheduler=lrkit.schedulers.Once(target=0.5, calibration=2))
    fresh = lrkit.attach(other := make("bert", seed=3).eval(), once)
    for step in range(3):
        accounting.flops(model, masked(7))
        model(**masked(step)).loss.backward()
        accounting.flops(model, masked(8))
        optimizer.step()
        optimizer.zero_grad()
    found = of_calibration(fresh, masked(7))
    plain, alone, by = attached(how=freezing(metric))
    for step in range(3):
        plain(**masked(step)).loss.backward()
        by.step()
        by.zero_grad()
    for name, state in streams(alone).items():
        assert all(torch.equal(values, streams(adapted)[name][key]) for key, values in state.items())
        assert not any(values.any() for values in streams(fresh)[name].values())
    # gᵀ x is a multiply-add for each entry of the weight and each token; a sum of squares is none.
    work, tokens = accounting.flops(other, masked(7)), masked(7)["input_ids"].numel()
    products = sum(2 * tokens * layer.base.weight.numel() for layer in fresh.adapters.values())
    assert found == (work.forward if isinstance(metric, InputNorm) else work.total + products)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes have found, each of which saw half of the rows."""
    folder, here = tmp_path_factory.mktemp("signals"), Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", str(here / "signals_worker.py")]
    running = [
        subprocess.Popen([*command, str(rank), "2", folder], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=150)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", list(signals_worker.METRICS))
def test_processes_see_one_whole(how, name, processes):
    """Two processes, by DDP or FSDP2, hold the same, which is what one process has that sees all rows."""
    with lrkit.current().lend("metric", name, type(signals_worker.METRICS[name])):
        alone = signals_worker.trained(signals_worker.METRICS[name], "alone")
    one, two = (each[f"{how} {name}"] for each in processes)
    assert one["history"] == two["history"] == alone["history"]
    tensors = [run["state"][0]["tensors"] for run in (one, two, alone)]
    assert tensors[0].keys() == tensors[2].keys()
    for key in tensors[0]:
        if key.startswith("policy."):
            assert torch.equal(tensors[0][key], tensors[1][key])
            torch.testing.assert_close(tensors[0][key], tensors[2][key], rtol=1e-4, atol=1e-8)


def test_processes_resume_bitwise(processes):
    """A run of two processes that is saved and resumed is the run."""
    for each in processes:
        through, again = (each[key]["state"][0]["tensors"] for key in ("ddp gradient", "resumed"))
        assert all(torch.equal(value, again[key]) for key, value in through.items())


def test_processes_calibrate_alike(processes):
    """Two processes that each see half of the rows decide at step 0 as one that sees all."""
    assert processes[0]["calibrated"] == processes[1]["calibrated"] == signals_worker.calibrated()

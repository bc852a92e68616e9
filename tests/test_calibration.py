"""Calibration: batches before the first step, and decisions at step 0."""

import contextlib
import copy
import random
import warnings

import attrs
import calibration_worker
import models
import numpy as np
import pytest
import torch
import transformers
from calibration_worker import SquaredGradient
from test_parallel import processes
from test_trainer import trainer

import lrkit
from lrkit.schedulers import Once


@pytest.fixture(autouse=True)
def _known():
    with lrkit.current().lend("metric", "squared", SquaredGradient):
        yield


def allocating(target=2, cut="always", **settings):
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=4),
        metric=SquaredGradient(),
        scheduler=Once(target=target, **settings),
        action=lrkit.actions.Prune(cut=cut),
    )


def freezing(**settings):
    return lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=4),
        metric=SquaredGradient(),
        scheduler=Once(target=0.5, **settings),
        action=lrkit.actions.Freeze(),
    )


METHODS = {
    "cut": allocating(calibration=6),
    "masked": allocating(cut="never", calibration=6),
    "frozen": freezing(calibration=6),
}
BATCHES = [models.batch(seed=10 + i) for i in range(3)]


def attached(method, name="bert", seed=3):
    model = models.make(name, seed=seed)
    return model, lrkit.attach(model, method)


def oracle(model, adapted, batches):
    """Scores of all components (SVD): Σ over parts of the mean of Σ g², in float64, from plain backward passes."""
    model.eval()
    sums = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, layer in adapted.adapters.items():
            for part in adapted.method.parameterization.parts:
                p = part.of(layer)
                sums[name, part.name] = sums.get((name, part.name), 0) + p.grad.double().square()
    model.zero_grad(set_to_none=True)
    scores = {}
    for name, layer in adapted.adapters.items():
        rank = layer.core.numel()
        each = torch.zeros(rank, dtype=torch.float64)
        for part in adapted.method.parameterization.parts:
            each += sums[name, part.name].movedim(part.axis, 0).reshape(rank, -1).mean(1)
        scores |= {f"{name}[{i}]": float(v) for i, v in enumerate(each)}
    return scores


def train(model, adapted, optimizer, begin, end):
    for step in range(begin, end):
        torch.manual_seed(step)
        (model(**models.batch(seed=step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("count", [1, 3])
def test_ranks_follow_the_oracle(count):
    """The kept components are the best by an oracle in float64, whatever the number of batches."""
    twin, other = attached(METHODS["cut"])
    scores = oracle(twin, other, BATCHES[:count])
    _, adapted = attached(METHODS["cut"])
    adapted.calibrate(iter(BATCHES[:count]))
    (decision,) = adapted.history
    best = sorted(scores, key=scores.get, reverse=True)[: 2 * len(adapted.adapters)]
    assert decision.step == 0
    assert set(decision.lost) == set(scores) - set(best)
    ranks = {layer.name: layer.rank for layer in adapted.summary().layers}
    assert ranks == {name: sum(unit.startswith(f"{name}[") for unit in best) for name in adapted.adapters}
    assert sum(ranks.values()) == sum(layer.core.numel() for layer in adapted.adapters.values())


@pytest.mark.parametrize("train_mode", [True, False])
def test_calibration_leaves_no_trace(train_mode):
    """Weights, gradients, modes, buffers and random generators are as they were."""
    model, adapted = attached(freezing())
    model.train(train_mode)
    model.bert.encoder.layer[0].eval()
    model.register_buffer("moved", torch.zeros(2))

    def disturb(*_):
        model.moved += torch.rand(2) + random.random() + np.random.rand()

    model.bert.register_forward_pre_hook(disturb)
    model(**BATCHES[0]).loss.backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    before, modes = tensors(model), [m.training for m in model.modules()]
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    adapted.calibrate(BATCHES)
    assert adapted.history[0].lost
    assert same(before, tensors(model))
    assert modes == [m.training for m in model.modules()]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in model.named_parameters():
        assert name in frozen or (grads[name] is None) == (p.grad is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert torch.equal(chance[0], torch.get_rng_state())
    assert chance[1] == random.getstate()
    assert np.array_equal(chance[2], np.random.get_state()[1])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("early", [True, False])
def test_either_optimizer_trains(name, early):
    """An optimizer that was made before calibration and one made after it take the same run."""
    ends = []
    for first in (early, False):
        model, adapted = attached(METHODS[name])
        make = lambda: torch.optim.AdamW(adapted.parameters(), lr=1e-2)  # noqa: E731, B023
        optimizer = make() if first else None
        adapted.calibrate(BATCHES)
        optimizer = optimizer or make()
        adapted.bind(optimizer, total_steps=4)
        train(model, adapted, optimizer, 0, 4)
        assert [d.step for d in adapted.history] == [0]
        ends.append(tensors(model))
    assert same(*ends)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [None, 0, 2])
def test_runs_resume_without_calibration(name, at, tmp_path):
    """A state from before bind, from step 0 or later goes on bitwise, and asks for no second calibration."""
    model, adapted = attached(METHODS[name])
    adapted.calibrate(BATCHES)
    if at is None:
        adapted.save(tmp_path)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=4)
    train(model, adapted, optimizer, 0, at or 0)
    if at is not None:
        adapted.save(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    train(model, adapted, optimizer, at or 0, 4)
    again = models.make("bert", seed=3)
    loaded = lrkit.load(again, tmp_path)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    optimizer.load_state_dict(kept)
    loaded.bind(optimizer, total_steps=4)
    train(again, loaded, optimizer, at or 0, 4)
    assert same(tensors(model), tensors(again))
    assert loaded.history == adapted.history


def test_missing_calibrations_are_refused():
    """Bind names the call that is missing, and a state of a later step without a calibration does not fit."""
    _, adapted = attached(METHODS["cut"])
    optimizer = torch.optim.AdamW(adapted.parameters())
    with pytest.raises(lrkit.LrkitError, match=r"6 by its calibration.*adapted\.calibrate\(batches\) before bind"):
        adapted.bind(optimizer, total_steps=4)
    state = adapted.state_dict()
    state["meta"] |= {"step": 2, "total_steps": 4}
    with pytest.raises(lrkit.LrkitError, match="never calibrated"):
        adapted.load_state_dict(state)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "at least one batch"),
        (BATCHES[0], "a list of batches"),
        (5, "a list of batches"),
        ([BATCHES[0]["input_ids"]], "must be a dict"),
        ([{k: v for k, v in BATCHES[0].items() if k != "labels"}], "returns no loss .*add labels"),
        ([BATCHES[0], {"labels": BATCHES[0]["labels"]}], "input_ids"),
    ],
)
def test_odd_batches_are_refused(batches, words):
    """What cannot be calibrated by is told in a line, nothing is decided, and a second try is as if it were the first."""
    model, adapted = attached(METHODS["cut"])
    before = tensors(model)
    with pytest.raises((lrkit.LrkitError, ValueError), match=words):
        adapted.calibrate(batches)
    assert adapted.history == []
    assert same(before, tensors(model))
    adapted.calibrate(BATCHES)
    _, other = attached(METHODS["cut"])
    other.calibrate(BATCHES)
    assert adapted.history == other.history


def test_every_batch_counts():
    """A batch may be anything that a loss of one's own takes, None as well; without one None is refused."""
    model, adapted = attached(METHODS["cut"])
    shown = iter(BATCHES)
    adapted.calibrate([None] * 3, loss=lambda _: model(**next(shown)).loss)
    _, other = attached(METHODS["cut"])
    other.calibrate(BATCHES)
    assert adapted.history == other.history
    with pytest.raises(lrkit.LrkitError, match="must be a dict, as the model takes it, not NoneType"):
        attached(METHODS["cut"])[1].calibrate([BATCHES[0], None, BATCHES[1]])


@pytest.mark.parametrize("name", METHODS)
def test_inference_mode_is_left(name):
    """A model that was calibrated in the mode for inference trains as any other."""
    ends = []
    for mode in (False, True):
        model, adapted = attached(METHODS[name])
        with torch.inference_mode(mode):
            adapted.calibrate(BATCHES)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=2)
        train(model, adapted, optimizer, 0, 2)
        ends.append(tensors(model))
    assert same(*ends)


def test_what_will_be_left_is_told():
    """What a decision at step 0 leaves undone is told at the calibration: `bind` comes when the schedule has ended."""
    method = attrs.evolve(METHODS["masked"], scheduler=Once(target=0.0, calibration=6))
    _, adapted = attached(method)
    with pytest.warns(lrkit.LrkitWarning, match=r"Once.target = 0.0: after the last decision, at step 0, no component"):
        adapted.calibrate(BATCHES)


def test_state_of_other_ranks_is_refused():
    """An optimizer that made its state before the ranks were decided is refused with the line to move."""
    _, adapted = attached(METHODS["cut"])
    optimizer = torch.optim.Adagrad(adapted.parameters())
    adapted.calibrate(BATCHES)
    with pytest.raises(lrkit.LrkitError, match=r"Adagrad keeps state of rank 4 for .* make it from adapted.parameters"):
        adapted.bind(optimizer, total_steps=2)
    adapted.bind(torch.optim.Adagrad(adapted.parameters()), total_steps=2)


@pytest.mark.parametrize("odd", ["not finite", "elsewhere"])
def test_useless_losses_are_refused(odd):
    """A loss that is no number, or that depends on the head alone, decides nothing."""
    model, adapted = attached(METHODS["cut"])

    def loss(batch):
        whole = model(**batch).loss
        return whole * torch.nan if odd == "not finite" else model.classifier.weight.sum() + whole.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            lrkit.LrkitError, match="no finite gradient has come back to the adapters in any of 3 batches"
        ):
            adapted.calibrate(BATCHES[:3], loss=loss)
    assert adapted.history == []


def test_a_failing_decision_counts_nothing_twice(monkeypatch):
    """If the action fails at the end, a second try begins from nothing."""
    _, adapted = attached(METHODS["cut"])
    with monkeypatch.context() as patch:
        patch.setattr(lrkit.actions.Prune, "decide", lambda self, ballot: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapted.calibrate(BATCHES)
    adapted.calibrate(BATCHES)
    _, other = attached(METHODS["cut"])
    other.calibrate(BATCHES)
    assert adapted.history == other.history


def test_superfluous_calibrations_are_told():
    """A method that asks for none, and a second call, do nothing and say so."""
    _, plain = attached(lrkit.methods.adalora(rank=4, target_rank=2))
    with pytest.warns(lrkit.LrkitWarning, match="asks for no calibration"):
        plain.calibrate(BATCHES)
    _, adapted = attached(METHODS["cut"])
    adapted.calibrate(BATCHES)
    for _ in range(2):
        with pytest.warns(lrkit.LrkitWarning, match="has been done"):
            adapted.calibrate(BATCHES)
    assert len(adapted.history) == 1


def test_a_loss_can_be_given():
    """A loss of one's own takes any batch, and weighs as it says."""
    model, adapted = attached(METHODS["cut"])
    adapted.calibrate([(b,) for b in BATCHES], loss=lambda batch: model(**batch[0]).loss)
    _, other = attached(METHODS["cut"])
    other.calibrate(BATCHES)
    assert adapted.history == other.history


def test_bind_decides_without_batches():
    """A policy that decides at step 0 and asks for no batches does so in bind, once; a resumed run does not again."""
    method = lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=4),
        metric=lrkit.metrics.Random(),
        scheduler=Once(target=0.5, calibration=0),
        action=lrkit.actions.Freeze(),
    )
    model, adapted = attached(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=4)
    assert [d.step for d in adapted.history] == [0]
    adapted.unbind()
    adapted.bind(optimizer, total_steps=4)
    train(model, adapted, optimizer, 0, 2)
    state, kept = adapted.state_dict(), copy.deepcopy(optimizer.state_dict())
    again, other = attached(method, seed=3)
    second = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.bind(second, total_steps=4)  # its own draw, which the state then replaces
    other.load_state_dict(state)
    second.load_state_dict(kept)
    train(model, adapted, optimizer, 2, 4)
    train(again, other, second, 2, 4)
    assert same(tensors(model), tensors(again))
    assert other.history == adapted.history
    assert [d.step for d in other.history] == [0]


@attrs.frozen(kw_only=True)
class Primed(lrkit.schedulers.Cubic):
    """A cubic budget that begins with calibrated scores. Source: none."""

    calibration: int = 2


def test_later_decisions_follow():
    """A schedule may decide at step 0 and later; its statistics go on from the calibrated ones."""
    with lrkit.current().lend("scheduler", "primed", Primed):
        method = attrs.evolve(METHODS["masked"], scheduler=Primed(target=2, start=3, warmup=1, final=1))
        model, adapted = attached(method)
        adapted.calibrate(BATCHES[:2])
        units = 4 * len(adapted.adapters)
        assert [(d.step, d.budget) for d in adapted.history] == [(0, units * 3 // 4)]
        assert adapted.controller.policies[0].statistics.observations == 2
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=4)
        train(model, adapted, optimizer, 0, 4)
        assert [d.step for d in adapted.history] == [0, 2, 3]
        assert adapted.history[-1].kept == units // 2
        assert adapted.controller.policies[0].times.decisions() == [range(1), range(2, 3), range(3, 4)]


def test_metrics_must_have_seen_something():
    """A metric that goes by what it has seen cannot decide at step 0 without batches; one that goes by weights can."""
    with pytest.raises(lrkit.LrkitError, match=r"SquaredGradient.*Once.*calibration must be 1 batch or more"):
        attrs.evolve(METHODS["cut"], scheduler=Once(target=2, calibration=0))
    attrs.evolve(METHODS["cut"], metric=lrkit.metrics.Magnitude(), scheduler=Once(target=2, calibration=0))


def test_proximal_steps_need_an_optimizer():
    """An action that moves units by an optimizer's rates cannot decide before there is one."""

    @attrs.frozen(kw_only=True)
    class Soft(lrkit.actions.Prune):
        def proximal(self, blocks, share, optimizer):
            return None

    with pytest.raises(lrkit.LrkitError, match=r"Once\(.*does not fit action .*Soft.*is called with one"):
        attrs.evolve(METHODS["cut"], action=Soft())
    magnitude = lrkit.metrics.Magnitude()
    attrs.evolve(METHODS["cut"], metric=magnitude, action=Soft(), scheduler=Once(target=2, calibration=0))


def test_recomputed_blocks_drop_nothing():
    """A block that is recomputed, and drops by a rate of its own, drops nothing, and has its rate again afterwards."""
    sizes = {"d_model": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=64, hidden_size=16, max_position_embeddings=40, dropout=0.3, **sizes)
    thresholds = []
    for seed in range(2):
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config)
        models.checkpoint_activations(model)
        adapted = lrkit.attach(model, METHODS["cut"])
        torch.manual_seed(seed)
        ids = BATCHES[0]["input_ids"]
        adapted.calibrate([{"input_ids": ids, "labels": ids}])
        thresholds.append(adapted.history[0].threshold)
        assert model.model.decoder.layers[0].dropout == 0.3
    assert thresholds[0] == thresholds[1]


def test_recomputed_activations_change_nothing():
    """With gradient checkpointing the decision is the same, and blocks are computed twice."""
    model, adapted = attached(METHODS["cut"])
    models.checkpoint_activations(model)
    calls = []
    model.bert.encoder.layer[0].attention.self.register_forward_pre_hook(lambda *_: calls.append(1))
    adapted.calibrate(BATCHES)
    _, other = attached(METHODS["cut"])
    other.calibrate(BATCHES)
    assert adapted.history[0].lost == other.history[0].lost
    assert len(calls) == 2 * len(BATCHES)


def test_autocast_is_the_callers():
    """Under autocast the batches run in its precision; the statistics stay in float32."""
    model, adapted = attached(METHODS["cut"])
    seen = []
    model.bert.pooler.dense.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        adapted.calibrate(BATCHES)
    assert set(seen) == {torch.bfloat16}
    assert adapted.history[0].kept == 2 * len(adapted.adapters)


def test_counts_know_step_zero():
    """A run is counted with the units that it has after step 0: as the trained run counts itself."""
    from lrkit.accounting import count

    for name in ("masked", "frozen"):
        model, adapted = attached(METHODS[name])
        adapted.calibrate(BATCHES)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=4)
        train(model, adapted, optimizer, 0, 4)
        counted = count(METHODS[name], models.make("bert", seed=3), total_steps=4)
        summary = adapted.summary()
        assert counted.end_range[0] <= summary.now <= counted.end_range[1]
        assert counted.average_range[0] <= summary.average <= counted.average_range[1]
        assert counted.average == counted.end
        assert summary.average == summary.now


def test_nothing_is_said_beforehand():
    """A schedule that ends at step 0 reaches its budget: no warning says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, adapted = attached(METHODS["cut"])
        adapted.calibrate(BATCHES)
        adapted.bind(torch.optim.AdamW(adapted.parameters()), total_steps=4)
        adapted.check_finished()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """All cases in two processes, and the runs of one process with the rows of both."""
    return processes("calibration", 2, tmp_path_factory.mktemp("pair")), {}


@pytest.mark.parametrize(("name", "kind"), calibration_worker.CASES)
def test_processes_decide_alike(name, kind, pair):
    """Two processes decide alike and end where one process with all rows ends, whenever they were wrapped."""
    results, alone = pair
    with lrkit.current().lend("action", "one", calibration_worker.OneMore):
        if name not in alone:
            alone[name] = calibration_worker.run(name)
    weights, history, said = results[0][name, kind]
    assert results[1][name, kind][1] == history == alone[name][1]
    for key, value in alone[name][0].items():
        assert torch.equal(weights[key], results[1][name, kind][0][key])
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)
    calibrated = name not in ("frozen in bind", "grown")
    assert any("another process has fewer batches" in each for each in said) == calibrated


@pytest.mark.parametrize("name", ["cut", "frozen"])
def test_trainers_processes_decide_alike(name, pair):
    """Under DDP the Trainer calibrates after it has wrapped the model; a resumed one ends bitwise the same."""
    first, second = (result["trainer", name] for result in pair[0])
    for ends in zip(first, second, strict=True):
        for weights, history in ends:
            assert same(weights, first[0][0])
            assert history == first[0][1]
    assert [each[0] for each in first[0][1]] == [0]


def test_processes_without_batches_stop(pair):
    """If one process has no batch, all stop; and what cannot be cut is told before it is sharded."""
    for result in pair[0]:
        assert "in this process or another" in result["none"]
        assert "calibrate before fully_shard" in result["sharded cut"]


def test_trainer_calibrates_by_itself(tmp_path):
    """The Trainer calibrates by its first batches as a bare loop does, and trains on the same batches as ever."""
    seen = []

    ends = {}
    for count in (0, 2, 20):  # all batches that there are, in the end
        del seen[:]
        metric = SquaredGradient() if count else lrkit.metrics.Random()
        method = attrs.evolve(METHODS["frozen"], scheduler=Once(target=0.5, calibration=count), metric=metric)
        t, adapted = trainer("bert", method, tmp_path, max_steps=8)
        model = adapted.model
        before = tensors(model)
        model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
        few = pytest.warns(lrkit.LrkitWarning, match="asks for 20 batches to calibrate by, and the training data has 6")
        with few if count == 20 else contextlib.nullcontext():
            t.train()
        used = min(count, 6)
        assert len(seen) == used + 8
        ends[count] = seen[used:]
        assert all(torch.equal(a, b) for a, b in zip(seen[:used], seen[used:], strict=False))
        if count:
            other, bare = attached(method, seed=0)
            other.load_state_dict(before)
            rows = models.batch(seed=7, rows=48)
            where = [[int((rows["input_ids"] == row).all(1).nonzero()[0]) for row in batch] for batch in seen[:used]]
            bare.calibrate([{k: v[i] for k, v in rows.items()} for i in where])
            assert bare.history == adapted.history
    assert all(torch.equal(a, b) for n in (2, 20) for a, b in zip(ends[0], ends[n], strict=True))


@pytest.mark.parametrize("name", ["cut", "frozen"])
def test_trainer_resumes_without_calibration(name, tmp_path):
    """A Trainer that resumes has the decision of step 0 from its checkpoint, and ends bitwise the same."""
    t, adapted = trainer("bert", METHODS[name], tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    t.train()
    again, other = trainer("bert", METHODS[name], tmp_path, max_steps=6)
    other.calibrate = None  # would fail
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [d.step for d in other.history] == [0]
    assert other.history == adapted.history
    assert same(tensors(adapted.model), tensors(other.model))


def test_trainer_that_begins_again_is_calibrated_once(tmp_path):
    """If the Trainer finds a smaller batch and begins again, the decision of step 0 stays the one that was taken."""
    t, adapted = trainer("bert", METHODS["cut"], tmp_path, max_steps=4, auto_find_batch_size=True)
    tries, step = [], t.training_step

    def training_step(*args, **kwargs):
        if not tries:
            tries.append(list(adapted.history))
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return step(*args, **kwargs)

    t.training_step = training_step
    with pytest.warns(lrkit.LrkitWarning, match="begins again"):
        t.train()
    assert adapted.history == tries[0]
    assert adapted.step == 4


def test_flops_count_calibration():
    """A run's FLOPs are those of its steps and of its calibration, whole batches each."""
    from lrkit.study.flops import run_flops
    from lrkit.study.run_settings import RunSettings

    log = [{"step": 0, "flops_of_a_row": 10.0, "flops_of_calibration": 36.0}, {"step": 3, "flops_of_a_row": 8.0}]
    found = run_flops(log, RunSettings(batch_size=2))
    assert (found.run, found.first_step, found.last_step) == ((9.0 * 4 + 36.0) * 2, 20.0, 16.0)

"""Calibration: batches before the first step, and decisions at step 0."""

import copy
import random
import warnings
from collections.abc import Mapping
from typing import ClassVar

import attrs
import models
import numpy as np
import pytest
import torch
from torch import Tensor

import lrkit
from lrkit.schedulers import Once


@attrs.frozen(kw_only=True)
class SquaredGradient(lrkit.Metric):
    """The mean squared gradient."""

    buffers: ClassVar[tuple[str, ...]] = ("sum",)

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Add."""
        state["sum"].add_(grad.square())

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum."""
        return state["sum"].clone()


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


METHODS = {"cut": allocating(), "masked": allocating(cut="never"), "frozen": freezing()}
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
    with pytest.raises(lrkit.LrkitError, match=r"8 by its calibration.*adapted\.calibrate\(batches\) before bind"):
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


def test_proximal_steps_need_an_optimizer():
    """An action that moves units by an optimizer's rates cannot decide before there is one."""

    @attrs.frozen(kw_only=True)
    class Soft(lrkit.actions.Prune):
        def proximal(self, blocks, share, optimizer):
            return None

    with pytest.raises(lrkit.LrkitError, match=r"Once\(.*does not fit action .*Soft.*reads the optimizer"):
        attrs.evolve(METHODS["cut"], action=Soft())
    attrs.evolve(METHODS["cut"], action=Soft(), scheduler=Once(target=2, calibration=0))


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

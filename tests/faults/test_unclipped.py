"""Gradients as they were before clipping: what a metric that measures ``"before-clipping"`` takes in."""

import attrs
import models
import pytest
import torch
from ranks import run_two

import lrkit

METHOD = attrs.evolve(
    lrkit.methods.aflora(rank=4, warmup=2, final=6),
    metric=lrkit.metrics.GradientUncertainty(measure="before-clipping"),
)


def stirred(adapted):
    """Give b entries, so that the gradients of A and B are not zero."""
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.out_scale.copy_(torch.linspace(-1.0, 1.0, adapter.d_out))
    return adapted


def train(method, clip=None, steps=6, micro=2, scaler=None, way="norm"):
    """Clip the gradients, and keep what backward had left for the oracle."""
    model = models.make("bert", seed=1).eval()
    torch.manual_seed(2)
    adapted = stirred(lrkit.attach(model, method))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20, scaler=scaler)
    seen = []
    for step in range(steps):
        for part in range(micro):
            loss = model(**models.batch(seed=step * micro + part)).loss / micro
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        seen.append({n: p.grad.double().clone() for n, p in adapted.named_parameters() if p.grad is not None})
        if clip is not None:
            by = torch.nn.utils.clip_grad_norm_ if way == "norm" else torch.nn.utils.clip_grad_value_
            by(adapted.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return adapted, seen


def expected(adapted, seen):
    """Unit scores from the formula, in float64."""
    scores = {}
    for name in adapted.scores():
        mean = deviation = 0.0
        for grads in seen:
            importance = grads[name].abs() if name in grads else torch.zeros(())
            mean = 0.85 * mean + 0.15 * importance
            deviation = 0.95 * deviation + 0.05 * (importance - mean).abs()
        scores[name] = float((mean * deviation).mean())
    return scores


@pytest.mark.parametrize("way", ["norm", "value"])
def test_clipping_changes_no_score(way):
    """Scores come from the sum after the last micro-batch, whatever clips it afterwards."""
    adapted, seen = train(METHOD, clip=1e-6, way=way, steps=2)
    wanted = expected(adapted, seen)
    assert adapted.scores() == pytest.approx(wanted, rel=1e-4)
    assert max(wanted.values()) > 0


def test_clipped_scores_differ():
    """The paper's variant measures what the optimizer finds: clipped."""
    paper = attrs.evolve(METHOD, metric=lrkit.metrics.GradientUncertainty())
    one, seen = train(paper, clip=1e-6, steps=2)
    assert max(one.scores().values()) < 0.01 * max(expected(one, seen).values())


def test_scaler_is_divided_out():
    """A scaler that `bind` knows leaves the scores as they are without it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, _ = train(METHOD, clip=1e-6, steps=2, scaler=scaler)
    plain, _ = train(METHOD, clip=1e-6, steps=2)
    assert scaled.scores() == pytest.approx(plain.scores(), rel=1e-4)


def test_gradients_by_hand_count():
    """Without a backward pass, what lies in ``grad`` is taken."""
    model = models.make("bert", seed=1)
    adapted = lrkit.attach(model, METHOD)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20)
    for p in adapted.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # From zero: mean 0.15, deviation 0.05 (1 - 0.15).
    assert list(adapted.scores().values()) == pytest.approx([0.15 * 0.05 * 0.85] * len(adapted.scores()))


def test_run_resumes_bitwise(tmp_path):
    """A resumed run is the run, clipping and all."""

    def steps(adapted, model, begin, end):
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=20)
        for step in range(begin, end):
            model(**models.batch(seed=step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1e-5)
            optimizer.step()
            optimizer.zero_grad()
        adapted.unbind(quietly=True)

    model = models.make("bert", seed=1).eval()
    adapted = lrkit.attach(model, METHOD)
    steps(adapted, model, 0, 6)
    adapted.save(tmp_path)
    steps(adapted, model, 6, 20)
    other = models.make("bert", seed=1).eval()
    resumed = lrkit.load(other, tmp_path)
    steps(resumed, other, 6, 20)
    assert resumed.history == adapted.history
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), resumed.parameters(), strict=True))


WORKER = """
import lrkit, models, test_unclipped as t
model = models.make("bert", seed=1).eval()
torch.manual_seed(2)
adapted = t.stirred(lrkit.attach(model, t.METHOD))
wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
adapted.bind(optimizer, total_steps=20)
for step in range(2):
    wrapped(**{k: v[rank::2] for k, v in models.batch(seed=step).items()}).loss.backward()
    torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1e-6)
    optimizer.step(); optimizer.zero_grad()
torch.save(adapted.scores(), f"{folder}/out.{rank}")
"""


def processes_see_the_mean(tmp_path):
    """Under DDP every process measures the averaged gradient, before clipping.

    See tests/integrations/test_more_processes.py.
    """
    run_two(WORKER, tmp_path)
    one, two = (torch.load(tmp_path / f"out.{rank}") for rank in range(2))
    alone, seen = train(METHOD, clip=1e-6, steps=2, micro=1)
    assert one == two == pytest.approx(expected(alone, seen), rel=1e-3)

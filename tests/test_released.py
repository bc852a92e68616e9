"""The `released` variants against oracles of the released code, written from the facts in float64.

Each oracle sees the weights and gradients of the run through optimizer hooks of its own, and keeps its own statistics.
"""

import models
import numpy as np
import pytest
import torch

import lrkit

STEPS = 60


def start(method):
    torch.manual_seed(0)
    model = models.make("bert", seed=4).eval()
    adapted = lrkit.attach(model, method)
    return model, adapted, torch.optim.AdamW(adapted.parameters(), lr=5e-3)


def number(tensor):
    return tensor.detach().double().numpy().copy()


class ReleasedAllocator:
    """AdaLoRA's `RankAllocator.update_and_mask`: after the step, from step 0, kthvalue, `<=` masks."""

    def __init__(self, total, warmup, final, interval, beta1, beta2, start, target):
        self.total, self.warmup, self.final, self.interval = total, warmup, final, interval
        self.beta1, self.beta2, self.start, self.target = beta1, beta2, start, target
        self.mean, self.uncertainty = {}, {}

    def __call__(self, step, weights, grads):
        if step < self.total - self.final:
            for key in weights:
                value = np.abs(weights[key] * grads[key])
                mean = self.beta1 * self.mean.get(key, 0.0) + (1 - self.beta1) * value
                old = self.uncertainty.get(key, 0.0)
                self.mean[key] = mean
                self.uncertainty[key] = self.beta2 * old + (1 - self.beta2) * np.abs(value - mean)
        if step <= self.warmup:
            return None
        if step > self.total - self.final:
            budget, masks = self.target, True
        else:
            left = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
            budget = int(self.target + (self.start - self.target) * left**3)
            masks = step % self.interval == 0
        if not masks:
            return None
        score = {key: self.mean[key] * self.uncertainty[key] for key in weights}
        layers = sorted({layer for layer, _ in weights})
        units = {n: score[n, "core"] + score[n, "A"].mean(1) + score[n, "B"].mean(0) for n in layers}
        threshold = np.sort(np.concatenate([units[n] for n in layers]))[self.start - budget - 1]
        return {n: units[n] > threshold for n in layers}


@pytest.mark.parametrize(("warmup", "final", "interval"), [(5, 20, 1), (5, 20, 7), (10, 13, 4), (0, 30, 10)])
def test_adalora_released_masks_as_its_allocator(warmup, final, interval):
    method = lrkit.methods.adalora(
        rank=4, target_rank=2, warmup=warmup, final=final, interval=interval, beta2=0.9, alpha=8.0, variant="released"
    )
    model, adapted, optimizer = start(method)
    units = 4 * len(adapted.adapters)
    oracle = ReleasedAllocator(STEPS, warmup, final, interval, 0.85, 0.9, units, units // 2)
    expected = {}

    def watch(*_):  # registered before bind: it sees the updated weights before anything is masked
        weights = {(n, k): number(m.get_parameter(k)) for n, m in adapted.adapters.items() for k in ("A", "B", "core")}
        grads = {
            (n, k): number(m.get_parameter(k).grad) for n, m in adapted.adapters.items() for k in ("A", "B", "core")
        }
        expected["mask"] = oracle(expected["step"], weights, grads)

    optimizer.register_step_post_hook(watch)
    adapted.bind(optimizer, total_steps=STEPS)
    masked = 0
    for step in range(STEPS):
        expected["step"] = step
        (model(**models.batch(seed=step % 5)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if expected["mask"] is None:
            continue
        for name, adapter in adapted.adapters.items():
            assert (number(adapter.core) != 0).tolist() == expected["mask"][name].tolist(), (step, name)
        masked += 1
    assert masked >= final - 1


class ReleasedPruner:
    """AFLoRA's `Pruner`: windows of 10 steps' mean abs(grad), an element-wise quantile, matrices under it freeze."""

    def __init__(self, total, warmup, final, interval, window=10):
        self.total, self.warmup, self.final, self.interval, self.window = total, warmup, final, interval, window
        self.now, self.mean, self.uncertainty, self.frozen = {}, {}, {}, set()

    def __call__(self, step, grads):
        place = step % self.window
        for key, grad in grads.items():
            if key in self.frozen:
                continue
            if place == 0:
                value = self.now.get(key, np.zeros_like(grad))
                self.mean[key] = 0.85 * self.mean.get(key, 0.0) + 0.15 * value
                self.uncertainty[key] = 0.95 * self.uncertainty.get(key, 0.0) + 0.05 * np.abs(value - self.mean[key])
                self.now[key] = np.abs(grad)
            else:
                self.now[key] = (self.now[key] * place + np.abs(grad)) / (place + 1)
        if step <= self.warmup:
            return
        if step > self.total - self.final:
            share = 0.0
        elif step % self.interval == 0:
            share = (1 - (step - self.warmup) / (self.total - self.final - self.warmup)) ** 3
        else:
            return
        left = {k: self.mean[k] * self.uncertainty[k] for k in grads if k not in self.frozen}
        if not left:
            return
        everything = np.sort(np.concatenate([v.ravel() for v in left.values()]))
        threshold = everything[int(len(everything) * (1 - share)) - 1]
        self.frozen |= {k for k, v in left.items() if v.mean() < threshold}


@pytest.mark.parametrize("clip", [None, 1e-4])
@pytest.mark.parametrize(("warmup", "final", "interval"), [(5, 20, 10), (3, 24, 10), (5, 15, 5)])
def test_aflora_released_freezes_in_its_pruners_order(warmup, final, interval, clip):
    """The released trainer scores in ``training_step``, before it clips: the oracle sees what backward leaves."""
    method = lrkit.methods.aflora(rank=4, warmup=warmup, final=final, interval=interval, variant="released")
    model, adapted, optimizer = start(method)
    oracle = ReleasedPruner(STEPS, warmup, final, interval)
    matrices = {
        f"{n}.{k}": m.get_parameter(k)
        for n, m in adapted.adapters.items()
        for k in ("A", "B")
        if m.get_parameter(k).requires_grad
    }
    adapted.bind(optimizer, total_steps=STEPS)
    order, clipped = [], 0
    for step in range(STEPS):
        for part in range(2):
            (model(**models.batch(seed=(2 * step + part) % 5)).loss / 2).backward()
        oracle(step, {k: number(p.grad) for k, p in matrices.items() if p.grad is not None})
        if clip is not None:
            clipped += bool(torch.nn.utils.clip_grad_norm_(adapted.parameters(), clip) > clip)
        optimizer.step()
        optimizer.zero_grad()
        frozen = {k for k, p in matrices.items() if not p.requires_grad}
        assert frozen == oracle.frozen, step
        order.append(len(frozen))
    assert len(set(order)) > 2
    assert order[-1] >= len(matrices) - 1
    assert clip is None or clipped == STEPS


def test_what_happens_after_the_budgets_end():
    """`fixed` holds what is kept; `open` goes on ranking at the target; both keep exactly the budget at every decision."""
    for ending, last in (("fixed", 40), ("open", 60)):
        scheduler = lrkit.schedulers.Cubic(target=2, warmup=5, final=20, ending=ending)
        method = lrkit.Method(
            parameterization=lrkit.parameterizations.SVD(rank=4),
            metric=lrkit.metrics.SensitivityUncertainty(),
            scheduler=scheduler,
            action=lrkit.actions.Prune(),
        )
        model, adapted, optimizer = start(method)
        adapted.bind(optimizer, total_steps=STEPS)
        for step in range(STEPS):
            (model(**models.batch(seed=step % 5)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            active = sum(int((m.core != 0).sum()) for m in adapted.adapters.values())
            assert step < 40 or active == 2 * len(adapted.adapters)
        assert adapted.history[-1].step == last
        assert all(d.kept == d.budget for d in adapted.history)
        late = [d for d in adapted.history if d.step > 40]
        assert bool(late) == (ending == "open")
        assert ending == "fixed" or any(d.returned for d in late)

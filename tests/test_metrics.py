"""Metrics against the float64 oracle, entry for entry, over random sequences of weights and gradients."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrkit.loop.native import kernel_of
from lrkit.metrics import (
    GradientUncertainty,
    Magnitude,
    Metric,
    Parts,
    Random,
    RatioUncertainty,
    Sensitivity,
    SensitivityUncertainty,
)

QUICK = settings(max_examples=60)

# what the papers write, and the class and settings that should be it
PAPERS: dict[str, type[Metric]] = {
    "sensitivity": Sensitivity,
    "sensitivity-smoothed": Sensitivity,
    "sensitivity-uncertainty": SensitivityUncertainty,
    "gradient-uncertainty": GradientUncertainty,
    "ratio-uncertainty": RatioUncertainty,
}
PAPER_BETAS = {
    "sensitivity-smoothed": (0.85, 0.85),
    "sensitivity-uncertainty": (0.85, 0.85),
    "gradient-uncertainty": (0.85, 0.95),
    "ratio-uncertainty": (0.85, 0.95),
}


def registered() -> list[type[Metric]]:
    from lrkit.registry import Registry

    return [offer.value for offer in Registry(discover=False).offers("metric")]  # plug-ins test their own


def build(kind: str, **settings_: Any) -> Metric:
    if kind == "sensitivity-smoothed":
        settings_["smoothed"] = True
    return PAPERS[kind](**settings_)


def fresh(metric: Metric, n: int) -> dict[str, Tensor]:
    return {name: torch.zeros(n) for name in metric.buffers}


def sequence(seed: int, steps: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """Weights that wander and gradients of all sizes, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    weight = torch.randn(n, generator=generator)
    for _ in range(steps):
        scale = 10 ** (4 * torch.rand(n, generator=generator) - 3)
        grad = torch.randn(n, generator=generator) * scale * (torch.rand(n, generator=generator) > 0.1)
        out.append((weight.clone(), grad))
        weight = weight - 0.1 * torch.randn(n, generator=generator)
    return out


def run(metric: Metric, values: list[tuple[Tensor, Tensor]]) -> Tensor:
    state = fresh(metric, len(values[0][0]))
    for step, (weight, grad) in enumerate(values, start=1):
        metric.observe(weight, grad, state, step)
    return metric.score(values[-1][0], state)


def oracle(kind: str, values: list[tuple[Tensor, Tensor]], **settings_: float) -> np.ndarray:
    statistics = oracles.Statistics(kind, tuple(values[0][0].shape), **settings_)
    for weight, grad in values:
        statistics.observe(weight.double().numpy(), grad.double().numpy())
    return statistics.score()


@pytest.mark.parametrize("kind", PAPERS)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(1, 12))
@QUICK
def test_paper_defaults(kind: str, seed: int, steps: int, n: int) -> None:
    """With default settings every metric is the paper's formula."""
    values = sequence(seed, steps, n)
    metric = build(kind)
    betas = dict(zip(("beta1", "beta2"), PAPER_BETAS.get(kind, (0.85, 0.85)), strict=True))
    epsilon = {"epsilon": metric.epsilon} if isinstance(metric, RatioUncertainty) else {}
    want = oracle(kind, values, **betas, **epsilon)
    np.testing.assert_allclose(run(metric, values).numpy(), want, rtol=3e-5, atol=1e-12)


@pytest.mark.parametrize("kind", [k for k in PAPERS if k.endswith("-uncertainty")])
@given(st.integers(0, 10_000), st.floats(0, 0.999), st.floats(0, 0.999), st.integers(1, 15))
@QUICK
def test_other_betas(kind: str, seed: int, beta1: float, beta2: float, steps: int) -> None:
    """With any β₁ and β₂ a metric is its formula."""
    values = sequence(seed, steps, 6)
    metric = build(kind, beta1=beta1, beta2=beta2)
    epsilon = {"epsilon": metric.epsilon} if isinstance(metric, RatioUncertainty) else {}
    want = oracle(kind, values, beta1=beta1, beta2=beta2, **epsilon)
    # |I - Ī| cancels where β1 is small: single precision holds to a part in 1e7 of I, not of the difference
    scale = max(oracles.importance(kind, w.double().numpy(), g.double().numpy(), **epsilon).max() for w, g in values)
    np.testing.assert_allclose(run(metric, values).numpy(), want, rtol=1e-4, atol=1e-6 * float(scale) ** 2)


@given(st.integers(0, 10_000), st.floats(0, 0.999), st.integers(1, 15))
@QUICK
def test_smoothed_sensitivity(seed: int, beta1: float, steps: int) -> None:
    """Smoothed sensitivity is its formula for any β₁."""
    values = sequence(seed, steps, 6)
    got = run(Sensitivity(smoothed=True, beta1=beta1), values)
    want = oracle("sensitivity-smoothed", values, beta1=beta1)
    # 1 - β1 in single precision is off by up to 6e-8: by so much of the older importance, where β1 is near zero
    scale = max(float((w.double() * g.double()).abs().max()) for w, g in values)
    np.testing.assert_allclose(got.numpy(), want, rtol=3e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("kind", [k for k in PAPERS if k.endswith("-uncertainty")])
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 25))
@QUICK
def test_window(kind: str, seed: int, window: int, steps: int) -> None:
    """I is the mean over full windows of one step's; Ī and Ū move when the next window begins."""
    values = sequence(seed, steps, 6)
    statistics = oracles.Statistics("gradient-uncertainty", (6,), 0.85, 0.95)
    for start in range(0, steps - window, window):
        steps_of_window = [(w.double().numpy(), g.double().numpy()) for w, g in values[start : start + window]]
        epsilon = {"epsilon": 1e-8} if kind == "ratio-uncertainty" else {}
        mean = sum(oracles.importance(kind, w, g, **epsilon) for w, g in steps_of_window) / window
        statistics.observe(np.zeros(6), mean)  # abs(grad) of this is the mean itself
    got = run(build(kind, window=window, beta1=0.85, beta2=0.95), values)
    # float32 sums of a window hold to a part in 1e7 of the largest I in it, and so does I - Ī
    scale = max(1e-9, float(np.abs(statistics.score()).max()))
    np.testing.assert_allclose(got.numpy(), statistics.score(), rtol=3e-5, atol=1e-6 * scale)


def test_window_not_compiled() -> None:
    """A metric with a window is not compiled."""
    for metric in (SensitivityUncertainty, GradientUncertainty, RatioUncertainty):
        assert kernel_of(metric()) is not None
        assert kernel_of(metric(window=2)) is None


def test_by_hand() -> None:
    """One entry, two steps, worked on paper: w·g = 2 then -4; abs(g) = 1 then 2."""
    values = [(torch.tensor([2.0]), torch.tensor([1.0])), (torch.tensor([-2.0]), torch.tensor([2.0]))]
    assert run(Sensitivity(), values).item() == pytest.approx(4.0)
    mean = [0.15 * 2, 0.85 * 0.3 + 0.15 * 4]
    assert run(Sensitivity(smoothed=True), values).item() == pytest.approx(mean[1])
    spread = 0.85 * (0.15 * abs(2 - mean[0])) + 0.15 * abs(4 - mean[1])
    assert run(SensitivityUncertainty(), values).item() == pytest.approx(mean[1] * spread)
    mean = [0.15 * 1, 0.85 * 0.15 + 0.15 * 2]
    spread = 0.95 * (0.05 * abs(1 - mean[0])) + 0.05 * abs(2 - mean[1])
    assert run(GradientUncertainty(), values).item() == pytest.approx(mean[1] * spread)


def test_ratio_at_zero() -> None:
    """The ratio is finite if a weight is zero."""
    values = [(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))] * 3
    score = run(RatioUncertainty(), values)
    assert torch.isfinite(score).all()
    assert score[1] == 0
    assert score[0] > score[2] > 0


def test_ratio_epsilon() -> None:
    """The ratio's ε is a setting."""
    values = [(torch.tensor([0.0, 0.5, -0.7]), torch.tensor([1.0, -1.0, 2.0]))] * 2
    for epsilon in (1e-3, 0.5):
        got = run(RatioUncertainty(epsilon=epsilon), values)
        want = oracle("ratio-uncertainty", values, beta1=0.85, beta2=0.95, epsilon=epsilon)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


def test_magnitude_before_step() -> None:
    """Magnitude measured before the step is the weight that was observed then."""
    metric = Magnitude(measure="before-step")
    state = fresh(metric, 3)
    metric.observe(torch.tensor([-2.0, 0.0, 1.5]), torch.ones(3), state, 1)
    assert torch.equal(metric.score(torch.ones(3), state), torch.tensor([2.0, 0.0, 1.5]))


def test_magnitude_now() -> None:
    """By default magnitude is the core value at the decision."""
    weight = torch.tensor([-2.0, 0.0, 1.5])
    metric = Magnitude()
    assert metric.reads == "core"
    state = fresh(metric, 3)
    metric.observe(torch.ones(3), torch.ones(3), state, 1)
    assert torch.equal(metric.score(weight, state), weight.abs())


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
@given(st.integers(0, 10_000), st.integers(1, 10), st.integers(1, 9))
@QUICK
def test_metric_contract(kind: type[Metric], seed: int, steps: int, n: int) -> None:
    """Scores are [N], finite, never negative; observe writes to `state` alone, in place, and reads it alone."""
    metric = kind()
    values = sequence(seed, steps, n)
    state = fresh(metric, n)
    places = {name: buffer.data_ptr() for name, buffer in state.items()}
    for step, (weight, grad) in enumerate(values, start=1):
        before = weight.clone(), grad.clone()
        assert metric.observe(weight, grad, state, step) is None
        assert torch.equal(weight, before[0]) and torch.equal(grad, before[1])
        assert {name: buffer.data_ptr() for name, buffer in state.items()} == places
        assert all(buffer.shape == (n,) and buffer.dtype == torch.float32 for buffer in state.values())
    kept = {name: buffer.clone() for name, buffer in state.items()}
    score = metric.score(values[-1][0], state)
    assert score.shape == (n,)
    assert torch.isfinite(score).all() and (score >= 0).all()
    assert all(torch.equal(state[name], kept[name]) for name in state), "score() wrote to the state"
    other = kind()  # nothing hidden in the instance: the same state in another gives the same score
    assert torch.equal(other.score(values[-1][0], kept), score)
    assert metric == kind()


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
def test_entries_do_not_mix(kind: type[Metric]) -> None:
    """An entry's score depends on that entry alone: in any order, the same."""
    values = sequence(3, 6, 8)
    order = torch.tensor([5, 0, 7, 1, 6, 2, 4, 3])
    shuffled = [(w[order], g[order]) for w, g in values]
    assert torch.equal(run(kind(), values)[order], run(kind(), shuffled))


@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
@QUICK
def test_reduce_sums_means(seed: int, modules: int, units: int, slices: list[int]) -> None:
    """`reduce` is the sum over parts of the mean over entries."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(modules, units, size, generator=generator) for size in slices]
    got = SensitivityUncertainty().reduce(parts)
    assert got.shape == (modules, units)
    for m in range(modules):
        want = oracles.triplet_scores([part[m].double().numpy() for part in parts])
        np.testing.assert_allclose(got[m].numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
def test_default_reduce(kind: type[Metric]) -> None:
    """Every metric has the default `reduce`, and `Random` gives its draws."""
    draws = torch.rand(2, 3)
    parts = Parts([torch.rand(2, 3, 1), torch.rand(2, 3, 5), torch.rand(2, 3, 7)], lambda: draws)
    want = draws if kind is Random else sum(part.mean(-1) for part in parts)
    assert torch.allclose(kind().reduce(parts), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
def test_metrics_are_frozen(kind: type[Metric]) -> None:
    """Metrics are frozen, and say which entries they read and when."""
    metric = kind()
    assert metric.reads == {"Random": "nothing", "Magnitude": "core"}.get(kind.__name__, "all")
    assert isinstance(metric.buffers, tuple)
    if any(field.name == "measure" for field in attrs.fields(kind)):
        # The paper's Algorithm 1 measures at the gradient, before the update. Magnitude reads the λ that is masked.
        assert metric.measure == ("after-step" if kind is Magnitude else "before-step")
        assert attrs.evolve(metric, measure="after-step").measure == "after-step"
        with pytest.raises(ValueError, match="measure"):
            attrs.evolve(metric, measure="sometimes")
    for field in attrs.fields(kind):
        if field.name.startswith("beta"):
            for bad in (-0.1, 1.0, 1.5):
                with pytest.raises(ValueError, match=field.name):
                    kind(**{field.name: bad})

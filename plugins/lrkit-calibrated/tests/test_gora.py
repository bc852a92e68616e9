"""GoRA: importance, ranks and B against the paper's formulas in float64, from gradients of the plain model."""

import warnings

import lrkit_calibrated
import models
import numpy as np
import pytest
import torch
from lrkit_calibrated import GoraLoRA, WeightGradient, gora

import lrkit
from lrkit.testing import LayerMetricContract, MethodContract, ParameterizationContract, only


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


class TestGoraLoRA(ParameterizationContract):
    component = GoraLoRA(rank=4)


class TestWeightGradient(LayerMetricContract):
    component = WeightGradient()


class TestGora(MethodContract):
    component = gora


BATCHES = [models.ragged(30 + i) for i in range(4)]


def gradients(names):
    """Return each layer's weight and its gradient as a mean over batches, float64, from the model without adapters."""
    model = models.make("bert", seed=3).double().eval()
    for batch in BATCHES:
        (model(**batch).loss / len(BATCHES)).backward()
    layers = {name: model.get_submodule(name) for name in names}
    return {name: (layer.weight.detach().numpy(), layer.weight.grad.numpy()) for name, layer in layers.items()}


@pytest.mark.parametrize("method", [gora(rank=2), lrkit_calibrated.eva(rank=2)], ids=["backward", "forward"])
def test_hooks_that_do_not_run_decide_nothing(method, monkeypatch):
    """Where no row is seen, as inside torch.compile, nothing is decided; batches through the model itself then count."""
    adapted = lrkit.attach(models.make("bert", seed=3), method)
    with warnings.catch_warnings(), monkeypatch.context() as compiled:
        warnings.simplefilter("ignore")
        compiled.setattr("lrkit.adapt.taps._off", lambda: True)
        with pytest.raises(lrkit.LrkitError, match=r"no finite input has gone through .* compile the model afterwards"):
            adapted.calibrate(BATCHES[:1])
    assert adapted.history == []
    adapted.calibrate(BATCHES)
    assert [decision.step for decision in adapted.history] == [0]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("rank", [2, 6])
def test_ranks_and_starts_follow_the_formulas(variant, rank):
    method = gora(rank=rank, variant=variant)
    adapted = lrkit.attach(models.make("bert", seed=3).double().eval(), method)
    adapted.calibrate(BATCHES)
    known = gradients(adapted.adapters)
    importance = {name: np.abs(w * g).mean() for name, (w, g) in known.items()}
    features = {name: sum(w.shape) ** (0.5 if variant == "paper" else 1) for name, (w, _) in known.items()}
    budget = sum(features.values()) * rank
    least, most = max(1, rank // 2), 4 * rank
    ranks = {}
    for name, value in importance.items():
        share = budget * value / sum(importance.values()) / features[name]
        ranks[name] = int(np.clip(np.round(share) if variant == "paper" else np.floor(share + 1e-9), least, most))
    assert {name: adapter.rank for name, adapter in adapted.adapters.items()} == ranks
    assert len(set(ranks.values())) > 2
    for name, adapter in adapted.adapters.items():
        a, (_, g) = adapter.A.detach().numpy(), known[name]
        r, d_in = a.shape
        assert adapter.scaling == pytest.approx(16 / np.sqrt(r))
        wanted = -(0.05 * np.sqrt(d_in) / 16) * g @ a.T @ np.linalg.inv(a @ a.T)
        np.testing.assert_allclose(adapter.B.detach().numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        # A row of LoRA's start: uniform between -1/√d_in and 1/√d_in
        assert np.abs(a).max() <= 1 / np.sqrt(d_in) and a.std() == pytest.approx(1 / np.sqrt(3 * d_in), rel=0.35)
        # The increment is a step against the gradient, of about γ times its norm.
        delta = adapter.delta().detach().numpy()
        assert (delta * g).sum() < 0
        if r < d_in / 2:
            ratio = np.linalg.norm(delta) / np.linalg.norm(g)
            assert 0.25 * 0.05 < ratio < 2.5 * 0.05


def test_it_begins_with_a_step_downhill():
    """The loss over the batches is lower right after the decision, and gamma = 0 leaves the model as it was."""

    def loss(gamma):
        model = models.make("bert", seed=3).double().eval()
        adapted = lrkit.attach(model, gora(rank=4, gamma=gamma))
        adapted.calibrate(BATCHES)
        with torch.no_grad():
            return sum(model(**batch).loss.item() for batch in BATCHES)

    plain = models.make("bert", seed=3).double().eval()
    with torch.no_grad():
        before = sum(plain(**batch).loss.item() for batch in BATCHES)
    assert loss(0.05) < before - 1e-8
    assert loss(0.0) == pytest.approx(before, abs=1e-12)


class Branches(torch.nn.Module):
    """A layer that every batch goes through, and one that only some do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.always, self.sometimes = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x, both):
        out = self.always(x) + self.sometimes(self.sometimes(x)) if both else self.always(x)
        return {"loss": out.square().mean()}


@pytest.mark.parametrize("place", [0, 2, 4])
def test_order_of_batches_is_nothing(place):
    """If one batch of five goes through a layer, twice, its G is that batch's gradient, whichever it is."""
    torch.manual_seed(1)
    rows = torch.randn(5, 32, 16)
    batches = [{"x": x, "both": False} for x in rows[1:]]
    batches.insert(place, {"x": rows[0], "both": True})
    plain = Branches()
    plain(rows[0], True)["loss"].backward()
    gradient, weight = plain.sometimes.weight.grad.clone(), plain.sometimes.weight.detach()
    plain.zero_grad()
    for batch in batches:
        (plain(**batch)["loss"] / 5).backward()
    wanted = (weight * gradient).abs().mean(), (plain.always.weight * plain.always.weight.grad).abs().mean()
    adapted = lrkit.attach(Branches(), gora(rank=40, least=1, most=200), targets=["always", "sometimes"], train_also=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lrkit.LrkitWarning)  # a layer without a gradient in some batch is told
        adapted.calibrate(batches)
    rank = {name: adapter.rank for name, adapter in adapted.adapters.items()}
    assert rank["sometimes"] == round(80 * float((wanted[0] / sum(wanted)).detach()))
    adapter = adapted.adapters["sometimes"]
    size = 0.05 * np.sqrt(16 / adapter.rank) / adapter.scaling
    assert torch.allclose(adapter.B.detach(), -size * gradient @ torch.linalg.pinv(adapter.A.detach()), atol=1e-6)


def test_the_gradient_goes_after_the_decision():
    """One tensor of the weight's size per layer until then, and nothing afterwards."""
    adapted = lrkit.attach(models.make("bert"), gora(rank=4))
    (state,) = adapted.controller.policies
    for name, adapter in adapted.adapters.items():
        assert state.statistics.kept_of(name)["gradient"].shape == (adapter.d_out, adapter.d_in)
    adapted.calibrate(BATCHES)
    (state,) = adapted.controller.policies
    assert not any(state.statistics.kept_of(name) for name in adapted.adapters)

"""LoRA-drop: the score against outputs by hand in float64, who stays by the paper's rule, and lrkit's contracts."""

import copy

import attrs
import lrkit_calibrated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrkit_calibrated import AdapterOutput, Drop, lora_drop
from torch import nn

import lrkit
import lrkit.testing
from lrkit.actions import Ballot

# Contracts train for a few steps.
pytestmark = pytest.mark.filterwarnings("ignore:drop. no layer:lrkit.errors.LrkitWarning")


@pytest.fixture(autouse=True)
def alone():
    """Know this plug-in and no other."""
    with lrkit.testing.only(lrkit_calibrated):
        yield


class TestAdapterOutput(lrkit.testing.LayerMetricContract):
    component = AdapterOutput()


class TestDrop(lrkit.testing.ActionContract):
    component = (Drop(), Drop(threshold=0.5))
    exact = False


class TestMethod(lrkit.testing.MethodContract):
    component = lora_drop


def test_score_is_the_outputs():
    """Over the first steps of a run the score is Σ ‖ΔW x‖², of an adapter's output less its layer's, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    adapted = lrkit.attach(model, lora_drop(rank=3, sample=0.5), targets=["0", "2"], train_also=())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    adapted.bind(optimizer, total_steps=20)
    want = dict.fromkeys(("0", "2"), 0.0)
    for step in range(10):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        h = x.double()
        with torch.no_grad():
            for place, layer in enumerate(copy.deepcopy(model).double()):
                if str(place) in want:
                    want[str(place)] += float((layer(h) - layer.base(h)).square().sum())
                h = layer(h)
        model(x).square().sum().backward()
        if step == 9:
            scores = adapted.scores()
        optimizer.step()
        optimizer.zero_grad()
    assert scores == pytest.approx(want, rel=1e-4)
    (decision,) = adapted.history
    shares = sorted(want.values(), reverse=True)
    assert (decision.step, decision.kept) == (10, 1 if shares[0] >= 0.9 * sum(shares) else 2)


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12), st.floats(0, 1))
def test_fewest_layers_reach_the_threshold(scores, threshold):
    """The layers that stay have T of the whole, and would not without the least of them."""
    values = torch.tensor(scores)
    none = torch.zeros(len(scores), dtype=torch.long)
    ballot = Ballot(values, torch.ones(len(scores), dtype=torch.bool), 1, 0.5, values, none + 1, none)
    chosen = Drop(threshold=threshold).decide(ballot).kept
    kept, left, whole = values.double()[chosen], values.double()[~chosen], values.double().sum()
    assert kept.sum() >= threshold * whole * (1 - 1e-9)
    if not whole:
        assert chosen.all()
    elif len(kept):
        assert kept.sum() - kept.min() < threshold * whole
        assert not len(left) or kept.min() >= left.max()


def test_dropped_layers_add_nothing():
    """A layer that is dropped computes what it computed before, and stays so; by default within a run of 20 steps."""
    run = lrkit.testing.Run(attrs.evolve(lora_drop(rank=4), action=Drop(threshold=0.5)), 20)
    run.to(20)
    (decision,) = run.adapted.history
    assert decision.step <= 20 and decision.lost
    for name in decision.lost:
        assert not run.adapted.adapters[name].delta().any()
        assert not any(p.requires_grad for p in (run.adapted.adapters[name].A, run.adapted.adapters[name].B))
    lrkit.testing.resumes(lora_drop(rank=4), 20, (1, 2, 3))


def test_nothing_measured_drops_nothing():
    """After a sample of one step, in which B is zero, every layer stays, and a warning says so."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    adapted = lrkit.attach(model, lora_drop(rank=3, sample=0.1), targets=["0", "2"], train_also=())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    adapted.bind(optimizer, total_steps=8)
    model(torch.randn(5, 6)).square().sum().backward()
    with pytest.warns(lrkit.LrkitWarning, match="no layer has added anything yet, so that every one stays"):
        optimizer.step()
    assert adapted.history[-1].kept == 2


def test_wrong_samples_are_refused():
    """A sample of nothing, or of the whole run, is refused in one line."""
    for sample in (0.0, 1.0, -1.0, "a", None):
        with pytest.raises(lrkit.LrkitError, match="sample must be"):
            lora_drop(sample=sample)


@pytest.mark.parametrize(
    ("parameterization", "why"),
    [
        (lrkit.parameterizations.DoRA(), "would train its magnitude on"),
        (lrkit.parameterizations.VectorScaled(), "would train its out_scale on"),
        (lrkit.parameterizations.LoRA(init="pissa"), "take the piece of the base's weight with them"),
    ],
)
def test_layers_that_would_not_be_dropped(parameterization, why):
    """An adapter that is more than its matrices, or whose zeros change the layer, is refused."""
    with pytest.raises(lrkit.LrkitError, match=why):
        attrs.evolve(lora_drop(), parameterization=parameterization)


def test_needless_calibration_loses_nothing():
    """`calibrate` on a method that is bound and asks for none says so, and the next step's rows count as ever."""
    scores = []
    for needless in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        adapted = lrkit.attach(model, lora_drop(rank=3, sample=0.5), targets=["0", "2"], train_also=())
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
        adapted.bind(optimizer, total_steps=20)
        for step in range(3):
            if needless and step == 1:
                with pytest.warns(lrkit.LrkitWarning, match="asks for no calibration"):
                    adapted.calibrate([])
            model(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(adapted.scores())
    assert scores[0] == scores[1]

"""Faults of states and counts: tensors frozen by hand and resume, the mode for inference, two devices, DoRA's corners."""

import copy
import warnings

import models
import pytest
import torch
import transformers
from torch import nn

import lrkit
from lrkit.parameterizations import DoRA, VectorScaled
from lrkit.parameterizations.orthogonality import orthogonality

TOTAL = 12
ADALORA = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=2, interval=1)
HANDS = {
    "a mask": (ADALORA, "query"),
    "ranks that are cut": (lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=2, interval=1), ""),
    "freezing": (lrkit.methods.aflora(rank=4, warmup=2, final=2, interval=1), "query"),
    "blocks in turn": (
        lrkit.Method(
            parameterization=lrkit.parameterizations.LoRA(rank=2),
            metric=lrkit.metrics.Random(),
            scheduler=lrkit.schedulers.Constant(target=0.5, interval=2, ending="open"),
            action=lrkit.actions.Switch(unit="matrix"),
        ),
        "value",
    ),
}


def frozen(method, which):
    """A bound run in which somebody has frozen the A of some layers."""
    adapted = lrkit.attach(models.make("bert", seed=2).eval(), method)
    for name, adapter in adapted.adapters.items():
        if which in name:
            adapter.A.requires_grad_(False)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=TOTAL)
    return adapted, optimizer


def fit(adapted, optimizer, steps):
    for step in steps:
        (adapted.model(**models.batch(seed=step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("at", [2, 6])
@pytest.mark.parametrize("case", HANDS)
def test_hands_resume_exactly(case, at):
    """A run with tensors frozen by hand goes on from its state as it would have: decisions, weights and counts."""
    method, which = HANDS[case]
    if case == "ranks that are cut":
        method = lrkit.Method(
            parameterization=method.parameterization,
            metric=method.metric,
            scheduler=method.scheduler,
            action=lrkit.actions.Prune(cut="always"),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lrkit.LrkitWarning)
        whole, optimizer = frozen(method, which)
        fit(whole, optimizer, range(at))
        state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        fit(whole, optimizer, range(at, TOTAL))
        other, optimizer = frozen(method, which)
        other.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        fit(other, optimizer, range(at, TOTAL))
    assert whole.history == other.history and len(whole.history) > 1
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), other.parameters(), strict=True))
    assert whole.summary() == other.summary()


def test_hands_are_counted():
    """What somebody froze before bind does not count as trained, and a run's own state says the same."""
    adapted, optimizer = frozen(lrkit.methods.lora(rank=4), "")
    fit(adapted, optimizer, range(3))
    trains = sum(p.numel() for p in adapted.adapter_parameters() if p.requires_grad)
    for _ in range(2):
        summary = adapted.summary()
        assert (summary.now, summary.average) == (trains, trains) and summary.start > trains
        adapted.load_state_dict(adapted.state_dict())


def test_load_in_inference_mode(tmp_path):
    """`load` in the mode for inference gives adapters that can train, as `attach` does."""
    lrkit.attach(models.make("bert", seed=2), ADALORA).save(tmp_path)
    plain = models.make("bert", seed=2)
    with torch.inference_mode():
        adapted = lrkit.load(plain, tmp_path)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=TOTAL)
    fit(adapted, optimizer, range(2))
    assert adapted.step == 2


def test_a_state_that_is_followed():
    """A model that follows a state of another precision was cast by nobody, and a later state does not say so."""
    source = lrkit.attach(models.make("bert", seed=2).double(), ADALORA)
    adapted = lrkit.attach(models.make("bert", seed=2), ADALORA)
    with pytest.warns(lrkit.LrkitWarning, match="saved in torch.float64"):
        adapted.load_state_dict(source.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.state_dict()


def test_factors_on_two_devices():
    """The penalty groups factors by device: those of one on meta are not stacked with those of another on the CPU."""
    there = [torch.randn(2, 8), torch.empty(2, 8, device="meta"), torch.randn(2, 8)]
    groups = []
    plain = torch.stack

    def seen(tensors, *args):
        groups.append({t.device.type for t in tensors})
        return plain(tensors, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "stack", seen)
        with pytest.raises(NotImplementedError, match="meta"):  # its sum cannot come to the CPU, as a GPU's can
            orthogonality(there)
    assert groups == [{"cpu"}, {"meta"}]


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "one layer"])
def test_dropped_input_of_slices(grouped):
    """DoRA's correction takes the input with the same entries dropped, in a slice of a fused projection as in a layer."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config) if grouped else nn.Sequential(nn.Linear(32, 32))
    method = lrkit.Method(parameterization=DoRA(rank=4, dropout=0.5))
    targets = ["query_key_value.q"] if grouped else ["0"]
    adapted = lrkit.attach(model, method, targets=targets, train_also=[])
    ((name, adapter),) = adapted.adapters.items()
    with torch.no_grad():
        adapter.magnitude.mul_(1.5)
    model.train()
    x = torch.randn(6, 32)
    weight, bias = adapter.base.weight.detach(), adapter.base.bias.detach()
    torch.manual_seed(7)
    got = model.get_submodule(name.rpartition(".")[0])(x) if grouped else model(x)
    got = adapter.base.rows(got, -1).flatten(-2) if grouped else got
    torch.manual_seed(7)
    dropped = adapter.dropped(x)
    torch.testing.assert_close(got, x @ weight.t() + bias + 0.5 * (dropped @ weight.t()))


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3)], ids=["linear", "convolution"])
def test_dora_without_components(layer):
    """A DoRA of rank 0 leaves a layer as it is; one that lost all components keeps its magnitude."""
    model = nn.Sequential(copy.deepcopy(layer), nn.Linear(3, 3))
    x = torch.randn(2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3)
    method = lrkit.Method(parameterization=DoRA(rank={"0": 0, "1": 2}))
    adapted = lrkit.attach(model, method, targets=["0", "1"], train_also=[])
    torch.testing.assert_close(model[0](x), layer(x))
    with torch.no_grad():
        adapted.adapters["0"].magnitude.mul_(2)
    bias = layer.bias.view(-1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(model[0](x), 2 * (layer(x) - bias) + bias)


def test_padding_begins_at_zero():
    """Further components of a vector-scaled embedding have no increment for the padding token either."""
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=0))
    method = lrkit.Method(parameterization=VectorScaled(rank=2, train="none"))
    adapted = lrkit.attach(model, method, targets=["0"], train_also=[])
    (adapter,) = adapted.adapters.values()
    new = method.parameterization.fresh(adapter, 3, torch.Generator().manual_seed(1), {})
    assert not new["A"][:, 0].any() and new["A"][:, 1:].all()


def test_budget_of_no_number():
    """A rule that goes by no number of units has all of them as its budget in the history."""
    method = lrkit.methods.aflora(rank=4, warmup=1, final=2, interval=1, variant="released")
    adapted = lrkit.attach(models.make("bert", seed=2), method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=TOTAL)
    fit(adapted, optimizer, range(TOTAL))
    assert adapted.history and all(decision.budget == decision.units for decision in adapted.history)

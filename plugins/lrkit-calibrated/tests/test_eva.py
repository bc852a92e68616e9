"""EVA beside PEFT's, and its incremental PCA beside an SVD of all rows at once."""

import warnings

import lrkit_calibrated
import models
import numpy as np
import peft
import pytest
import torch
from lrkit_calibrated import EvaLoRA, ExplainedVariance, eva
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn
from transformers import BertConfig, BertForTokenClassification

import lrkit
from lrkit.metrics import Layer, Seen
from lrkit.testing import LayerMetricContract, MethodContract, ParameterizationContract, only


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


class TestEvaLoRA(ParameterizationContract):
    component = EvaLoRA(rank=2)


class TestExplainedVariance(LayerMetricContract):
    component = ExplainedVariance()


class TestEva(MethodContract):
    component = eva


def labelled(seed):
    """A batch with a label for some of the tokens."""
    data = models.ragged(seed)
    data["labels"] = torch.where(torch.arange(12) % 3 == 0, -100, data["input_ids"] % 2)
    return data


def tokens():
    torch.manual_seed(3)
    return BertForTokenClassification(BertConfig(**models._BERT))


def calibrated(model, method, batches):
    adapted = lrkit.attach(model, method)
    adapted.calibrate(batches)
    return adapted


def normal(rows):
    return nn.functional.normalize(rows.double())


def same_directions(found, wanted):
    """Compare row by row, up to the sign."""
    found, wanted = found.double(), wanted.double()
    signs = (found * wanted).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found * signs, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("rho", "whiten"), [(2.0, False), (1.5, True), (1.0, False)])
def test_ranks_and_directions_are_peft_s(labels, rho, whiten):
    """PEFT, told to stop after two batches, gives each layer the same rank and the same rows of A; padding is left out."""
    make, batch = (tokens, labelled) if labels else (lambda: models.make("bert", seed=3), models.ragged)
    batches = [batch(i) for i in range(2)]
    adapted = calibrated(make(), eva(rank=4, rho=rho, whiten=whiten), batches)
    names = list(adapted.adapters)
    config = peft.LoraConfig(
        r=4,
        target_modules=names,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, whiten=whiten, use_label_mask=labels),
    )
    config.eva_config.tau = -1.0  # below any cosine: all have converged once two batches can be compared
    theirs = get_eva_state_dict(make(), batches, config, show_progress_bar=False)
    ranks = {layer.name: layer.rank for layer in adapted.summary().layers}
    assert ranks == {name: len(rows) for name, rows in theirs.items()}
    assert sum(ranks.values()) == 4 * len(names)
    assert rho == 1.0 or len(set(ranks.values())) > 1
    for name, adapter in adapted.adapters.items():
        # PEFT divides in place, and so several times where layers share an input: there directions alone agree.
        often = whiten and not name.endswith("dense")
        same_directions(*(normal(each) if often else each for each in (adapter.A.detach(), theirs[name])))
        assert not adapter.B.any()
        assert adapter.scaling == 16 / 4


def inputs_of(model, names, batches):
    """Return layer name to its inputs in each batch, without padding."""
    seen = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {name: [x[mask] for x, mask in zip(each, masks, strict=True)] for name, each in seen.items()}


def test_five_batches_are_peft_s_pca():
    """Its IncrementalPCA by itself on the layers' inputs; who is among the best follows from sorting all its ratios."""
    batches = [models.ragged(20 + i) for i in range(5)]
    adapted = calibrated(models.make("bert", seed=3), eva(rank=4), batches)
    inputs = inputs_of(models.make("bert", seed=3), list(adapted.adapters), batches)
    ratios, rows = [], {}
    for name, each in inputs.items():
        pca = IncrementalPCA(n_components=8, copy=True, lowrank=True, lowrank_seed=42)
        for x in each:
            pca.partial_fit(x)
        rows[name] = pca.components_
        ratios += [(-float(ratio), name) for ratio in pca.explained_variance_ratio_]
    best = [name for _, name in sorted(ratios, key=lambda pair: pair[0])[: 4 * len(inputs)]]
    for name, adapter in adapted.adapters.items():
        assert adapter.rank == best.count(name)
        same_directions(adapter.A.detach(), rows[name][: adapter.rank])


def layer(units, d_in):
    base = nn.Linear(d_in, 3)
    adapter = lrkit.parameterizations.LoRA(rank=units).build(
        lrkit.parameterizations.Target("layer", base, d_in, 3, "other")
    )
    return Layer("layer", adapter, d_in, 3, units, torch.device("cpu"))


@pytest.mark.parametrize("parts", [1, 2])
def test_directions_are_those_of_all_rows(parts):
    """Rows that lie in a few dimensions lose nothing on the way: an SVD of all of them at once says the same, float64."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 4)) * [4, 3, 2, 1] @ rng.normal(size=(4, 20)) + rng.normal(size=20)
    metric, place = ExplainedVariance(), layer(6, 20)
    states = [metric.begin(place) for _ in range(parts)]
    batches = torch.tensor(rows).split([30, 17, 43])
    for i, batch in enumerate(batches):
        metric.observe(Seen(layer=place, x=batch, g=None, labelled=None, step=i + 1), states[i % parts])
    state = metric.merge([metric.begin(place), *states]) if parts > 1 else states[0]
    centred = rows - rows.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(metric.score(place, state)[:4], (s**2 / (s**2).sum())[:4], rtol=1e-5)
    np.testing.assert_allclose(np.abs((state["directions"][:4].numpy() * vt[:4]).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(state["mean"], rows.mean(0), atol=1e-12)


def test_few_rows_are_left_out():
    """As in PEFT, a batch with fewer rows than directions changes nothing."""
    metric, place = ExplainedVariance(), layer(6, 20)
    state = metric.begin(place)
    metric.observe(Seen(layer=place, x=torch.randn(5, 20), g=None, labelled=None, step=1), state)
    assert not any(values.any() for values in state.values())
    assert metric.score(place, state).tolist() == [0.0] * 6


def test_batches_too_small_are_told():
    """If every batch has fewer rows than directions, that is said, and A is not left at zero, where nothing could train."""
    adapted = lrkit.attach(models.make("bert"), eva(rank=12))  # 24 candidates
    with pytest.warns(lrkit.LrkitWarning, match="calibrate by larger batches"):
        adapted.calibrate([models.batch(0, rows=1)])
    assert all(bool((row != 0).any()) for m in adapted.adapters.values() for row in m.A)


def test_layers_may_get_nothing():
    """A layer of which no direction is among the best has no component, and the run goes on."""
    model = calibrated(models.make("bert", seed=3), eva(rank=1, rho=4.0), [models.ragged(i) for i in range(4)])
    ranks = [layer.rank for layer in model.summary().layers]
    assert min(ranks) == 0 and sum(ranks) == len(ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.bind(optimizer, total_steps=2)
    model.model(**models.batch(0)).loss.backward()
    optimizer.step()


def test_nothing_square_is_kept():
    """Per layer k + 1 vectors of the input's size, k numbers, and two more."""
    adapted = lrkit.attach(models.make("bert"), eva(rank=4))
    (state,) = adapted.controller.policies
    for name, adapter in adapted.adapters.items():
        kept = sum(values.numel() for values in state.statistics.kept_of(name).values())
        assert kept == 9 * adapter.d_in + 8 + 2


def test_layers_of_rank_0_change_nothing():
    """Layers that a table gives nothing are beside the ranking: the others' ranks are those of a model without them."""
    batches = [models.ragged(i) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = calibrated(models.make("bert", seed=3), eva(rank={"query": 0, "*": 4}), batches)
    model = models.make("bert", seed=3)
    wanted = lrkit.attach(model, eva(rank={"*": 4}), exclude=["query"])
    wanted.calibrate(batches)
    ranks = {layer.name: layer.rank for layer in table.summary().layers}
    assert {name: rank for name, rank in ranks.items() if not name.endswith("query")} == {
        layer.name: layer.rank for layer in wanted.summary().layers
    }
    assert all(rank == 0 for name, rank in ranks.items() if name.endswith("query"))


def test_ranks_may_be_a_table():
    """ρ times each layer's own rank is its most, and the sum is the table's; a ρ that cannot keep it is refused."""
    with pytest.raises(lrkit.LrkitError, match=r"rho 1.25 times a table's rank 2 is no whole number"):
        eva(rank={"query": 2, "*": 4}, rho=1.25)
    table = {"query": 2, "*": 4}
    adapted = calibrated(models.make("bert", seed=3), eva(rank=table), [models.ragged(i) for i in range(2)])
    ranks = {layer.name: layer.rank for layer in adapted.summary().layers}
    assert sum(ranks.values()) == 2 * 2 + 10 * 4
    assert all(rank <= (4 if name.endswith("query") else 8) for name, rank in ranks.items())

"""FIM-LoRA: the metric and the ranks against plain backward passes in float64."""

import attrs
import lrkit_calibrated
import models
import peft
import pytest
import torch
from lrkit_calibrated import AllocatedLoRA, MeanSquaredGradient, fim_lora, gora
from lrkit_calibrated.shares import filled, saturated
from transformers import FalconConfig, FalconForSequenceClassification

import lrkit
from lrkit.testing import MethodContract, MetricContract, ParameterizationContract, only


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


class TestAllocatedLoRA(ParameterizationContract):
    component = AllocatedLoRA(rank=4, scale="sqrt-rank")


class TestMeanSquaredGradient(MetricContract):
    component = MeanSquaredGradient()


class TestFimLoRA(MethodContract):
    component = fim_lora


BATCHES = [models.ragged(30 + i) for i in range(8)]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("rank", [3, 8])
def test_ranks_follow_the_fisher_information(variant, rank):
    """By the mean of B's squared gradients over eight batches, in float64."""
    method = fim_lora(rank=rank, variant=variant)
    model = models.make("bert", seed=3).double().eval()
    adapted = lrkit.attach(model, method)
    sums = dict.fromkeys(adapted.adapters, 0.0)
    for batch in BATCHES:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, adapter in adapted.adapters.items():
            assert not adapter.A.grad.any()
            sums[name] += float(adapter.B.grad.square().mean()) / 8
    model.zero_grad()
    adapted.calibrate(BATCHES)
    rule = filled if variant == "paper" else saturated
    wanted = dict(zip(sums, rule(list(sums.values()), rank * len(sums), 1, 2 * rank), strict=True))
    assert {name: adapter.rank for name, adapter in adapted.adapters.items()} == wanted
    assert len(set(wanted.values())) > 2
    assert sum(wanted.values()) == rank * len(sums)
    for adapter in adapted.adapters.values():
        assert not adapter.B.any()
        assert adapter.A.any(dim=1).all()
        assert adapter.scaling == pytest.approx(16 / adapter.rank)


def test_the_mean_is_over_steps():
    metric, grads = MeanSquaredGradient(), torch.randn(5, 7, dtype=torch.float32)
    state = {"mean": torch.zeros(7)}
    for step, grad in enumerate(grads, 1):
        metric.observe(torch.zeros(7), grad, state, step)
    torch.testing.assert_close(metric.score(torch.zeros(7), state).double(), grads.double().square().mean(0))


@pytest.mark.parametrize("method", [fim_lora(rank=3), lrkit_calibrated.gora(rank=3), lrkit_calibrated.eva(rank=3)])
def test_exports_are_peft_s(method, tmp_path):
    """PEFT computes the same from the files: ranks and scales are each layer's own."""
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, method)
    adapted.calibrate(BATCHES[:2])
    adapted.bind(optimizer := torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=1)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    lrkit.export(adapted, tmp_path, to="peft-lora")
    theirs = peft.PeftModel.from_pretrained(models.make("bert", seed=3).eval(), tmp_path)
    with torch.no_grad():
        wanted, plain = model(**BATCHES[1]).logits, models.make("bert", seed=3).eval()(**BATCHES[1]).logits
        torch.testing.assert_close(theirs(**BATCHES[1]).logits, wanted)
    assert not torch.allclose(plain, wanted)


def test_a_scale_follows_or_stays():
    """α/r of the new rank, or of the first one; and what is exported says so."""
    for scale_of in ("new-rank", "first-rank"):
        adapted = lrkit.attach(models.make("bert", seed=3), fim_lora(rank=4, scale_of=scale_of))
        adapted.calibrate(BATCHES[:2])
        for adapter in adapted.adapters.values():
            r = adapter.rank if scale_of == "new-rank" else 4
            assert adapter.scaling == pytest.approx(16 / r)
            assert adapter.export_factors()[3] == pytest.approx(16 / r)
    table = {"query": 2, "*": 4}
    for by, wanted in (("own-rank", [4.0, 8.0]), ("mean-rank", [16 / (11 / 3)])):
        alone = lrkit.Method(parameterization=AllocatedLoRA(rank=table, scale_by=by))
        found = {a.scaling for a in lrkit.attach(models.make("bert"), alone).adapters.values()}
        assert sorted(found) == pytest.approx(wanted)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_other_starts_refused(init):
    """All components are drawn anew: another start would be lost, and one from the base would take a piece of it along."""
    with pytest.raises(lrkit.LrkitError, match=f'init="{init}" would be lost'):
        AllocatedLoRA(init=init)
    if init != "orthogonal":
        with pytest.raises(lrkit.LrkitError, match="take pieces of the base's weight with them"):
            attrs.evolve(fim_lora(), parameterization=lrkit.parameterizations.LoRA(init=init))


def test_bounds_around_the_budget():
    """Bounds without room for the budget are refused."""
    for bounds in ({"rank": 1, "least": 4, "most": 6}, {"rank": 8, "most": 4}):
        with pytest.raises(lrkit.LrkitError, match=r"mean rank of \d cannot be kept with least \d and most \d"):
            fim_lora(**bounds)
    with pytest.raises(lrkit.LrkitError, match="ranks of 1 to 3 cannot be kept with least 4 and most 6"):
        fim_lora(rank={"query": 3, "*": 1}, least=4, most=6)
    for method in (fim_lora, gora):
        with pytest.raises(lrkit.LrkitError, match="ranks must have an entry"):
            method(rank={})


def test_dropout_of_a_config_is_out():
    """Blocks that recompute activations, and read their dropout from the config, drop nothing: the ranks are the same."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 2, "pad_token_id": 0}
    config = FalconConfig(vocab_size=40, hidden_dropout=0.3, **sizes)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(1, 40, (4, 8), generator=generator), "labels": torch.arange(4) % 2}
        for _ in range(3)
    ]
    ranks = []
    for seed in range(4):
        torch.manual_seed(0)
        model = FalconForSequenceClassification(config)
        models.checkpoint_activations(model)
        adapted = lrkit.attach(model, fim_lora(rank=2))
        torch.manual_seed(seed)
        adapted.calibrate(batches)
        ranks.append([layer.rank for layer in adapted.summary().layers])
        assert config.hidden_dropout == model.config.hidden_dropout == 0.3
    assert all(each == ranks[0] for each in ranks)

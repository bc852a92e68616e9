"""DoRA: PEFT's numbers, and components that can be pruned."""

import attrs
import models
import pytest
import torch
from test_attach import fit, logits

import lrkit
from lrkit.parameterizations import DoRA
from lrkit.testing import check

PRUNED = attrs.evolve(
    lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5), parameterization=DoRA(rank=4, form="svd")
)


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_dora_keeps_the_contract(form):
    """Both forms keep the contract of every parameterization."""
    assert check(DoRA(rank=4, form=form), kind="parameterization") == []


def test_dora_has_pefts_numbers():
    """Outputs and gradients are those of PEFT's ``use_dora`` with the same factors and magnitudes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["query", "value"])
    theirs = peft.get_peft_model(models.make("bert"), config)
    model = models.make("bert")
    method = lrkit.Method(parameterization=DoRA(rank=4, alpha=8.0))
    adapted = lrkit.attach(model, method, targets=["query", "value"], train_also=[])
    pairs = []
    for name, adapter in adapted.adapters.items():
        other = theirs.base_model.model.get_submodule(name)
        pairs += [(adapter.A, other.lora_A["default"].weight), (adapter.B, other.lora_B["default"].weight)]
        pairs.append((adapter.magnitude, other.lora_magnitude_vector["default"].weight))
        assert torch.allclose(adapter.magnitude, pairs[-1][1], atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, other in pairs:
            other += 0.1 * torch.randn(other.shape, generator=generator)
            mine.copy_(other)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    for m in (model, theirs):
        m.eval()
        m(**models.batch(seed=2)).loss.backward()
    for mine, other in pairs:
        assert torch.allclose(mine.grad, other.grad, atol=1e-6)


def test_dora_can_be_pruned():
    """In SVD form the budget is met, what is masked is cut away with the same outputs, and a merge keeps them."""
    model = models.make("bert")
    before = logits(model)
    adapted = lrkit.attach(model, PRUNED)
    assert torch.equal(logits(model), before)
    fit(model, adapted)
    assert adapted.allocation().total == 24
    trained = logits(model)
    adapted.compact()
    assert torch.allclose(logits(model), trained, atol=1e-5)
    adapted.merge()
    assert torch.allclose(logits(model), trained, atol=1e-5)

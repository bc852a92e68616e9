"""A parameterization that stands around the whole model, and adapters that keep something in buffers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import models
import pytest
import torch
from torch import Tensor, nn

import lrkit
from lrkit.parameterizations import Target
from lrkit.registry import Registry


class Louder(nn.Module):
    """Logits times e^s, and how often it was called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += self.training
        output = call(*args, **kwargs)
        output["logits"] = output["logits"] * self.s.exp()
        return output


@attrs.frozen(kw_only=True)
class Loud(lrkit.Parameterization):
    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        return (lrkit.Part("s"),)

    @property
    def takes_targets(self) -> bool:
        return False

    def build(self, target: Target) -> nn.Module:
        raise AssertionError("it has no layers")

    def adapt(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        assert not targets
        return {}

    def wrap(self, model: nn.Module) -> nn.Module:
        return Louder()


@attrs.frozen(kw_only=True)
class LoudLoRA(lrkit.parameterizations.LoRA):
    """Layers, and something around them."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return Louder()


class Plugin:
    @lrkit.hookimpl
    def lrkit_parameterizations(self) -> dict[str, Any]:
        return {"loud": Loud, "loud-lora": LoudLoRA}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Registry([("loud 1.0", "loud", Plugin())], discover=False)
    monkeypatch.setattr("lrkit.registry.current", lambda: made)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**models.batch(9)).logits
    return found


@pytest.mark.parametrize("parameterization", [Loud(), LoudLoRA(rank=2)])
def test_what_stands_around_the_model(parameterization: lrkit.Parameterization, tmp_path: Path) -> None:
    model = models.make("bert")
    plain, signature = logits(model), inspect.signature(model.forward)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = lrkit.attach(model, lrkit.Method(parameterization=parameterization))
    assert torch.equal(logits(model), plain)
    assert inspect.signature(model.forward) == signature, "the Trainer looks at it for its columns"
    around = adapted.around
    assert around.s in set(adapted.parameters())
    assert adapted.summary().beside == 1 and "in no layer" in str(adapted.summary())
    assert adapted.summary().start == sum(p.numel() for p in adapted.adapter_parameters())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=3)
    model.train()
    for step in range(3):
        model(**models.batch(step)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(around.s.detach()) != 0 and int(around.calls) == 3
    trained = logits(model)
    assert torch.equal(logits(adapted.original()), plain), "a copy is free of it"
    adapted.save(tmp_path)
    again = lrkit.load(models.make("bert"), tmp_path)
    assert torch.equal(logits(again.model), trained)
    assert int(again.around.calls) == 3, "buffers that last are a part of the state"
    assert sorted(n for n in adapted.state_dict()["tensors"] if "lrkit_around" in n) == [
        "weight.lrkit_around.calls",
        "weight.lrkit_around.s",
    ]
    with pytest.raises(lrkit.LrkitError, match="Louder stands around the whole model, and cannot be merged"):
        adapted.merge()
    for to in lrkit.peft.TARGETS:
        with pytest.raises(lrkit.LrkitError, match="Louder"):
            lrkit.export(adapted, tmp_path / "out", to=to)
    adapted.detach()
    assert torch.equal(logits(model), plain)
    assert list(model.state_dict()) == list(before) and "forward" not in model.__dict__


def test_a_forward_that_somebody_else_had_replaced_is_kept() -> None:
    model = models.make("bert")
    plain, own = logits(model), model.forward
    model.forward = lambda **inputs: own(**inputs) | {"logits": torch.ones(1)}  # type: ignore[method-assign,operator]
    theirs = model.forward
    adapted = lrkit.attach(model, lrkit.Method(parameterization=Loud()))
    adapted.around.s.data.fill_(torch.tensor(2.0).log())
    assert float(model(**models.batch())["logits"].detach()) == pytest.approx(2.0)
    adapted.detach()
    assert model.forward is theirs
    del model.forward
    assert torch.equal(logits(model), plain)


def test_targets_are_refused_where_there_are_none_to_choose() -> None:
    with pytest.raises(lrkit.LrkitError, match=r"Loud\(\) has places of its own: leave targets out"):
        lrkit.attach(models.make("bert"), lrkit.Method(parameterization=Loud()), targets=["query"])

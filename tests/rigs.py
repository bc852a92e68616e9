"""Small models, and a recorder that sees what an optimizer's step sees without asking lrkit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from torch import Tensor, nn

import lrkit

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.002, momentum=0.5),
}


class Toy(nn.Module):
    """Three linear maps of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 7)
        self.third = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


TOY_TARGETS = ["first", "second", "third"]


def toy(method: Any, seed: int = 0) -> tuple[Toy, Any]:
    torch.manual_seed(seed)
    model = Toy()
    return model, lrkit.attach(model, method, targets=TOY_TARGETS, train_also=())


def tiny_bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=12,
            num_labels=2,
        )
    )


def bert(method: Any, seed: int = 0) -> tuple[nn.Module, Any]:
    model = tiny_bert(seed)
    adapted = lrkit.attach(model, method, targets="all-linear")
    model.train()
    return model, adapted


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A fresh random batch a step; labels that can be learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    if isinstance(model, Toy):
        x = torch.randn(8, 6, generator=generator)
        return (model(x) - torch.sin(3 * x[:, :4])).square().mean()  # type: ignore[no-any-return]
    ids = torch.randint(3, 40, (8, 6), generator=generator)
    return model(input_ids=ids, labels=(ids[:, 1] > 20).long()).loss  # type: ignore[no-any-return]


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


class Recorder:
    """Hooks an optimizer before lrkit does: weights and gradients at the step, weights straight after the update.

    Register it before `adapted.bind`, so that its post-hook runs before any of lrkit's.
    """

    def __init__(self, adapted: Any, optimizer: torch.optim.Optimizer) -> None:
        self.adapters: dict[str, Any] = dict(adapted.adapters)
        self.before: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        self.after: dict[str, dict[str, Tensor]] = {}
        optimizer.register_step_pre_hook(self._pre)
        optimizer.register_step_post_hook(self._post)

    def _pre(self, *_: object) -> None:
        self.before = []
        for adapter in self.adapters.values():
            parts = {"core": adapter.core, "P": adapter.B, "Q": adapter.A}
            seen = {}
            for part, p in parts.items():
                if p is not None and p.requires_grad and p.grad is not None:
                    w, g = array(p), array(p.grad)
                    seen[part] = (w.T, g.T) if part == "P" else (w, g)
            self.before.append(seen)

    def _post(self, *_: object) -> None:
        self.after = {
            name: {part: p.detach().clone() for part in ("A", "B", "core") if (p := getattr(adapter, part)) is not None}
            for name, adapter in self.adapters.items()
        }

    def after_step(self) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The updated weights with the step's gradients: what the released code measures."""
        out = []
        for seen, after in zip(self.before, self.after.values(), strict=True):
            now = {"core": after["core"], "P": after["B"].T, "Q": after["A"]}
            out.append({part: (array(now[part]), g) for part, (_, g) in seen.items()})
        return out


def cores(adapted: Any) -> Tensor:
    """Every λ, in the order of the adapters."""
    return torch.cat([adapter.core.detach() for adapter in adapted.adapters.values()])


def from_peft(method: lrkit.Method, folder: Path) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A LoRA that PEFT could have trained, read back for a method: the handle, a batch, and PEFT's logits for it."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2))
    with torch.no_grad():
        for p in adapted.parameters():
            p.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    batch = models.batch()
    want = adapted.model.eval()(**batch).logits
    lrkit.export(adapted, folder)
    again = lrkit.from_peft(models.make("bert"), folder, method)
    again.model.eval()
    return again, batch, want

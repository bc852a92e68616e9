"""No matrix as large as a layer's weight is made where A and B alone will do: every tensor that a step makes is measured."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrkit
from lrkit.errors import LrkitError
from lrkit.parameterizations import LowRank
from lrkit.registry import current

STEPS = 8


class Largest(TorchDispatchMode):
    """Remember the entries of the largest tensor that an operation makes, views of what there was before left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.entries, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                entries = t.untyped_storage().nbytes() // t.itemsize
                if entries > self.entries:
                    self.entries, self.by = entries, f"{func}: {tuple(t.shape)}"
        return out


class One(nn.Module):
    """One layer, called on an input of its own."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self) -> Tensor:
        out: Tensor = self.layer(self.x)
        return out


class Transformer(nn.Module):
    """A small model of transformers, called on four tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = transformers.AutoModel.from_config(config)

    def forward(self) -> Tensor:
        out: Tensor = self.model(inputs_embeds=torch.ones(1, 4, 128)).last_hidden_state
        return out


def conv1d() -> nn.Module:
    """Make a Conv1D by way of transformers."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(160, 128)


def mixtral() -> Transformer:
    """Make a block of four experts."""
    return Transformer(
        transformers.MixtralConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=8,
        )
    )


def gpt2() -> Transformer:
    """Make a block whose q, k and v are one matrix."""
    return Transformer(
        transformers.GPT2Config(
            n_embd=128, n_layer=1, n_head=2, n_positions=8, vocab_size=8, bos_token_id=1, eos_token_id=2
        )
    )


# The model, its targets, settings of attach, and the entries of the smallest of their weights.
KINDS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "linear": (lambda: One(nn.Linear(128, 160), torch.randn(3, 128)), "layer", {}, 128 * 160),
    "Conv1D": (lambda: One(conv1d(), torch.randn(3, 128)), "layer", {}, 128 * 160),
    "embedding": (lambda: One(nn.Embedding(900, 128), torch.arange(9)), "layer", {}, 900 * 128),
    "convolution": (lambda: One(nn.Conv2d(32, 160, 3), torch.randn(1, 32, 5, 5)), "layer", {}, 160 * 32 * 9),
    "groups": (lambda: One(nn.Conv1d(128, 256, 3, groups=4), torch.randn(1, 128, 5)), "layer", {}, 256 * 32 * 3),
    "experts": (mixtral, r".*experts\..*", {}, 128 * 128),
    "slices": (gpt2, r".*c_attn", {"slices": True}, 128 * 128),
}


@functools.cache
def methods() -> Mapping[str, lrkit.Method]:
    """Return the registered methods whose adapters are A and B alone, at rank 2 or their own first rank."""
    found = {}
    for name in current().names("method"):
        arguments = inspect.signature(current().get("method", name)).parameters
        settings = {"rank": 2, "target_rank": 1, "train": "both"}
        method = current().method(name, **{key: settings[key] for key in settings if key in arguments})
        try:
            adapted = lrkit.attach(nn.Sequential(nn.Linear(128, 160)), method, targets=["0"], train_also=[])
        except LrkitError:  # it needs a model with blocks
            continue
        if any(policy.metric.reads in ("inputs", "gradient") for policy in method.policies):  # rows of layers, or more
            continue
        # Some train a matrix as large as the weight itself.
        small = max(p.numel() for p in adapted.parameters()) <= 4 * 160
        if small and all(isinstance(adapter, LowRank) for adapter in adapted.adapters.values()):
            found[name] = method
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_sized_matrix(kind: str) -> None:
    """Forward, backward, penalty, optimizer and decisions of each method stay below the size of the layer's weight."""
    make, targets, settings, limit = KINDS[kind]
    seen = set()
    for name, method in methods().items():
        torch.manual_seed(0)
        model = make()
        try:
            adapted = lrkit.attach(model, method, targets=targets, train_also=[], **settings)
        except LrkitError:  # stacks of experts cannot grow
            continue
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
        if any(policy.scheduler.calibration for policy in method.policies):
            adapted.calibrate([()], loss=lambda _, model=model: model().square().mean())
        adapted.bind(optimizer, total_steps=STEPS)
        with Largest([*model.parameters(), *model.buffers()]) as largest:
            for _ in range(STEPS):
                loss = model().square().mean()
                (loss + adapted.penalty() if adapted.has_penalty else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(state.ended for state in adapted.controller.policies), name
        assert 0 < largest.entries < limit, (name, largest.by)
        seen.add(name)
    assert {"lora", "svd-lora", "elora", "adalora", "aflora"} <= seen


@pytest.mark.parametrize("kind", KINDS)
def test_increments_are_seen(kind: str) -> None:
    """The measure above sees ΔW where it is made."""
    make, targets, settings, limit = KINDS[kind]
    model = make()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=targets, train_also=[], **settings)
    with Largest(model.parameters()) as largest:
        for adapter in adapted.adapters.values():
            adapter.delta()
    assert largest.entries >= limit

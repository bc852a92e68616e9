"""Experts of a mixture: 3-D parameters that stack one matrix per expert, as transformers 5 has them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.layers.base import LayerKind, Sizes
from lrkit.layers.grouped import grouped_mm
from lrkit.precision import is_plain

_UNDECORATED: Mapping[str, bool] = {"Llama4TextExperts": True, "Step3p7Experts": False}
"""Experts of transformers that lie as those that it decorates: class to whether the matrices are [d_in, d_out]."""


class Stack(nn.Module):
    """One 3-D parameter of a module of experts, shown as a layer. The parameter stays the module's own.

    Args:
        experts: the module of experts.
        name: the parameter's name, such as ``"gate_up_proj"``.
    """

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it is no submodule
        self.name = name

    @property
    def weight(self) -> Tensor:
        """Return the parameter as the module holds it: [experts, d_out, d_in], or [experts, d_in, d_out] in GPT-OSS."""
        weight = getattr(self._experts[0], self.name)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Return the bias [experts, d_out], or None."""
        experts = self._experts[0]
        return getattr(experts, f"{self.name}_bias") if getattr(experts, "has_bias", False) else None

    @property
    def matrices(self) -> Tensor:
        """Return the weight as [experts, d_out, d_in]."""
        return self.weight.transpose(1, 2) if is_transposed(self._experts[0]) else self.weight

    def forward(self, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Compute every row with its expert's matrix and bias.

        Args:
            x: rows [n, d_in], sorted by expert.
            ends: where each expert's rows end, int32 [experts].
            experts: each row's expert [n].

        Returns:
            [n, d_out].
        """
        matrices, bias = self.matrices, self.bias
        y = _products(x.to(matrices.dtype), matrices, ends)
        return y if bias is None else y + bias.index_select(0, experts)

    def extra_repr(self) -> str:
        """Return the name and sizes for ``print(model)``."""
        return f"{self.name}, {' x '.join(map(str, self.weight.shape))}"


@attrs.frozen
class Experts(LayerKind):
    """The stacks of a module of experts that transformers' ``use_experts_implementation`` has decorated.

    Such a module is known by the settings that the decorator leaves on it, so that a class of one's own can be decorated
    too; a few classes without it are known by their names. An adapted module routes tokens itself, as transformers'
    ``grouped_mm`` does, whichever implementation is set.
    """

    linear: ClassVar[bool] = True

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return the sizes of a stack; None for any other module."""
        if not isinstance(layer, Stack):
            return None
        experts, d_out, d_in = layer.matrices.shape
        return Sizes(d_in, d_out, experts)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the weight as [experts, d_out, d_in]: a view."""
        assert isinstance(layer, Stack)
        return layer.matrices

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse experts whose weights are quantized: they have arithmetic of their own."""
        assert isinstance(layer, Stack)
        weight = layer.weight
        return None if is_plain(weight) else f"its experts are quantized ({type(weight).__name__}, {weight.dtype})"

    def no_rows(self, layer: nn.Module) -> str | None:
        """Refuse: each expert has rows of its own."""
        return "each of its experts has inputs of its own"

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        """Return A x [n, r] for rows x [n, d_in], with the r rows of A that are the row's expert's."""
        ends, _ = where
        return _products(x.to(a.dtype), a.view(len(ends), -1, a.shape[1]), ends)

    def up(self, layer: nn.Module, h: Tensor, b: Tensor, *where: Any) -> Tensor:
        """Return B h [n, d_out], with the r columns of B that are the row's expert's."""
        ends, _ = where
        return _products(h, b.to(h.dtype).view(len(b), len(ends), -1).transpose(0, 1), ends)

    def scale(self, layer: nn.Module, h: Tensor, by: Tensor, *where: Any) -> Tensor:
        """Multiply every row by its expert's part of a vector."""
        ends, experts = where
        return h * by.view(len(ends), -1).index_select(0, experts)

    def parts(self, layer: nn.Module, name: str, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the stacks of a module of experts: of gate and up together, or up alone, and of down."""
        return _stacks(layer)

    def join(self, layer: nn.Module, adapters: Mapping[str, nn.Module]) -> nn.Module:
        """Return the module of experts with adapters in the place of its stacks."""
        return AdaptedExperts(layer, adapters)


class AdaptedExperts(nn.Module):
    """A module of experts whose stacks are adapted. It is called as the module is.

    Args:
        base: the module of experts.
        adapters: the adapters of its stacks by the parameter's name.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.base = base
        self._plain = _stacks(base)  # no submodules: they have no parameters of their own
        for name, adapter in adapters.items():
            setattr(self, name, adapter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_modules" not in self.__dict__ or "base" not in self._modules:
                raise
            return getattr(self.base, name)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the experts that each token is routed to.

        Args:
            hidden_states: one row per token [tokens, hidden]; without the others every expert's rows [experts · n, hidden],
                expert after expert, as in Llama 4.
            top_k_index: the experts of each token [tokens, k]. Under expert parallelism the number of experts stands for
                one that lies on another rank, and is passed by.
            top_k_weights: their weights [tokens, k].

        Returns:
            [tokens, hidden]; every expert's rows if there is no routing.
        """
        module: Any = self.base
        count = len(self._plain["down_proj"].weight)
        if top_k_index is None or top_k_weights is None:
            own = torch.arange(count, device=hidden_states.device)
            rows = len(hidden_states) // count
            ends = ((own + 1) * rows).to(torch.int32)
            return self._computed(hidden_states, ends, own.repeat_interleave(rows))
        k = top_k_index.shape[-1]
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True, out_int32=True)
        absent, experts = experts >= count, experts.clamp(max=count - 1)
        y = self._computed(hidden_states.index_select(0, order // k), ends, experts)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        weights = top_k_weights.reshape(-1).index_select(0, order).masked_fill(absent, 0)
        # Back in the tokens' order the k outputs of each lie side by side: a sum that no thread's turn can change.
        y = (y * weights[:, None]).index_select(0, order.argsort())
        out: Tensor = y.view(-1, k, y.shape[1]).sum(1).to(hidden_states.dtype)
        return out

    def _computed(self, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Return what their experts make of rows that are sorted by expert."""
        module: Any = self.base
        first = _first(module)
        up, down = (self._modules.get(name) or self._plain[name] for name in (first, "down_proj"))
        h = up(x, ends, experts)
        if hasattr(module, "_apply_gate") and first == "gate_up_proj":
            h = module._apply_gate(h)  # noqa: SLF001
        elif first == "gate_up_proj":
            gate, linear = h.chunk(2, dim=-1)
            h = module.act_fn(gate) * linear
        else:
            h = module.act_fn(h)
        y: Tensor = down(h, ends, experts)
        return y


def is_transposed(module: nn.Module) -> bool | None:
    """Return whether a module of experts holds its matrices as [d_in, d_out]; None for any other module."""
    if hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
        return bool(module.is_transposed)
    return _UNDECORATED.get(type(module).__name__)


def _stacks(module: nn.Module) -> dict[str, Stack]:
    """Return the stacks of a module of experts by name; empty for any other module."""
    if is_transposed(module) is None:
        return {}
    names = (_first(module), "down_proj")
    weights = [getattr(module, name, None) for name in names]
    there = all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights)
    return {name: Stack(module, name) for name in names} if there else {}


def _products(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y: Tensor = grouped_mm(x, w, ends)
    return y


def _first(experts: nn.Module) -> str:
    """Return the name of the first parameter of a module of experts."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"

"""Bottleneck adapters: h ← h + W_up f(W_down h + b_down) + b_up, after a layer's output h and before the residual sum.

Houlsby et al., arXiv 1902.00751, section 2.1 and Figure 2: after attention's and after FFN's output. Pfeiffer et al., arXiv
2005.00247: after FFN's output alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrkit
from lrkit.parameterizations import Target
from lrkit.settings import flag, one_of, whole

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """A layer with a bottleneck after it: y = h + W_up f(W_down h + b_down) + b_up with h = base(x).

    Args:
        base: the layer whose place it takes.
        size: d, the length of its output.
        width: m.
        activation: f by its name in `ACTIVATIONS`.
    """

    def __init__(self, base: nn.Module, size: int, width: int, activation: str) -> None:
        super().__init__()
        self.base = base
        weight = base.get_parameter("weight")
        # At least float32: beside a half-precision base, small updates would be lost in the base's type.
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        self.down = nn.Linear(size, width, device=weight.device, dtype=dtype)
        self.up = nn.Linear(width, size, device=weight.device, dtype=dtype)
        nn.init.normal_(self.down.weight, std=1e-2)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)
        self.activation = activation

    @property
    def weight(self) -> Tensor:
        """The base weight, so that code that looks at ``layer.weight.dtype`` goes on working."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """y [..., d] of x [..., d_in]."""
        h: Tensor = self.base(x)
        down, up = self.down, self.up
        z = F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype))
        z = ACTIVATIONS[self.activation](z)
        return h + F.linear(z, up.weight.to(h.dtype), up.bias.to(h.dtype))


@attrs.frozen(kw_only=True)
class _Bottlenecks(lrkit.Parameterization):
    learning_rate: ClassVar[float] = 1e-3

    width: int = attrs.field(default=64, validator=whole(1, 65_536))
    activation: str = attrs.field(default="gelu", validator=one_of(tuple(ACTIVATIONS)))
    layer_norms: bool = attrs.field(default=False, validator=flag())

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """W_down and W_up, matrices that can be frozen; neuron i is row i of one and column i of the other."""
        return (
            lrkit.Part("down.weight", axis=0, matrix=True),
            lrkit.Part("down.bias", axis=0),
            lrkit.Part("up.weight", axis=1, matrix=True),
            lrkit.Part("up.bias"),
        )

    @property
    def components(self) -> int:
        """m, the neurons of one bottleneck."""
        return self.width

    def build(self, target: Target) -> nn.Module:
        """The layer with a bottleneck after it. W_up is zero, so that at first nothing changes."""
        return Bottleneck(target.layer, target.d_out, self.width, self.activation)

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """The layer norms', where these train."""
        if not self.layer_norms:
            return ()
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            raise lrkit.LrkitError(f"layer_norms=True, and {type(model).__name__} has no nn.LayerNorm")
        return [f"{norm}.{name}" for norm in norms for name, _ in model.get_submodule(norm).named_parameters()]


@attrs.frozen(kw_only=True)
class Houlsby(_Bottlenecks):
    """A bottleneck after attention's and after FFN's output, before the residual sum. Source: arXiv 1902.00751, section 2.1.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"`` (the released code's), ``"relu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too, as the paper does; comparisons in later papers leave them out.
    """

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """The last maps of attention and of FFN."""
        return [target for target in targets if target.output and target.role in ("attention", "ffn")]


@attrs.frozen(kw_only=True)
class Pfeiffer(_Bottlenecks):
    """A bottleneck after FFN's output alone, before the residual sum. Source: arXiv 2005.00247, section 3.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"relu"`` (AdapterHub's), ``"gelu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too.
    """

    activation: str = attrs.field(default="relu", validator=one_of(tuple(ACTIVATIONS)))

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """The last maps of FFN."""
        return [target for target in targets if target.output and target.role == "ffn"]

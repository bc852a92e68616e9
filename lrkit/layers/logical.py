"""Sizes and costs of quantized layers: those of the float layers that they stand for."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.dequantized import features, is_packed
from lrkit.layers.probe import held
from lrkit.process import swapped


def entries(model: nn.Module) -> int:
    """Count the parameters of a model, each once; those of a quantized layer are its weight's [d_out, d_in] and its bias."""
    counted: dict[int, int] = {}
    packed: set[int] = set()
    for module in model.modules():
        own: list[Tensor] = [p for p in module._parameters.values() if p is not None]
        if is_packed(module) and (sizes := features(module)) is not None:
            bias = getattr(module, "bias", None)
            packed |= {id(p) for p in own if p is not bias}
            counted[id(held(module))] = sizes[0] * sizes[1]
            own = [bias] if isinstance(bias, Tensor) else []
        counted |= {id(p): p.numel() for p in own if id(p) not in packed}
    return sum(counted.values())


class _Float(nn.Module):
    """The product of a float layer with a weight of zeros, which needs no memory."""

    bias = None

    def __init__(self, layer: nn.Module, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.sizes = (layer,), sizes  # in a tuple, so that it is no submodule

    @property
    def weight(self) -> Any:
        return self.layer[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, x.new_zeros(()).expand(self.sizes[::-1]))


def as_floats(model: nn.Module) -> AbstractContextManager[None]:
    """Let quantized linear layers compute what costs as much as their float layers, for a ``with`` block, to count it.

    The kernels of quantization are not known to a counter of operations.
    """
    return swapped(
        [
            (parent._modules, name, _Float(layer, sizes))
            for parent in model.modules()
            for name, layer in parent._modules.items()
            if layer is not None and is_packed(layer) and (sizes := features(layer)) is not None
        ]
    )

"""An adapter of one layer: the base class, what an adapter has to know of its layer, and how its parameters are made."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrkit.units import Part


class Adapter(nn.Module):
    """A module that takes a layer's place and keeps the layer inside of it.

    A subclass adds parameters and a `forward`. For example ``LowRank`` adds A and B, and returns
    ``self.base(x) + F.linear(F.linear(x, self.A), self.B)``.

    Args:
        base: the layer. It stays a submodule, so that it moves and is saved with the model.
    """

    merge: Callable[[], nn.Module] | None = None
    """A method that adds the adapter to the base's weight, in place, and returns the base; None if no weight can hold it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """Return the base's weight, so that code that looks at ``layer.weight.dtype`` goes on working."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Return the base's bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @torch.no_grad()
    def base_with(self, weight: Tensor) -> nn.Module:
        """Write a weight [d_out, d_in] into the base, and return the base: the last line of a `merge`."""
        oriented_weight(self.base).copy_(weight)
        return self.base


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is transformers' ``Conv1D``, a linear map whose weight is [d_in, d_out]."""
    # A model that has a Conv1D has imported its module; importing it here would double the time of `import lrkit`.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and type(layer) is module.Conv1D


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear map that can be adapted; None for any other module.

    ``nn.MultiheadAttention`` reads its projection's weight without calling the layer, so that an adapter there would have
    no effect: that subclass of ``nn.Linear`` is left out.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_conv1d(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def oriented_weight(layer: nn.Module) -> Tensor:
    """Return the weight as [d_out, d_in]: a transposed view if the layer is a ``Conv1D``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if type(layer) is nn.Linear or not is_conv1d(layer) else weight.t()


def new_factor(layer: nn.Module, *shape: int) -> nn.Parameter:
    """Return an uninitialised parameter on a layer's device.

    It is at least float32: in a half-precision layer's dtype, small updates would be lost.
    """
    weight = oriented_weight(layer)
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))


def further(module: nn.Module, part: Part, count: int) -> Tensor:
    """Return an uninitialised float32 tensor on the CPU for `count` further components of a part."""
    shape = list(part.of(module).shape)
    assert part.axis is not None
    shape[part.axis] = count
    return torch.empty(shape, dtype=torch.float32)

"""An adapter of one layer: the base class, what an adapter has to know of its layer, and how its parameters are made."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrkit.layers import Around, LayerKind, is_conv1d, kind_of
from lrkit.layers.probe import held
from lrkit.units import Part

__all__ = ["Adapter", "further", "is_conv1d", "layer_shape", "new_factor", "oriented_weight", "started"]


class Adapter(Around):
    """A module that takes a layer's place and keeps the layer inside of it.

    A subclass adds parameters and a `forward`. For example ``LowRank`` adds A and B, and returns
    ``self.base(x) + F.linear(F.linear(x, self.A), self.B)``.

    Args:
        base: the layer. It stays a submodule, so that it moves and is saved with the model.
        kind: what is known of the layer's kind; found among lrkit's own kinds if it is not given.
    """

    merge: Callable[[], nn.Module] | None = None
    """A method that adds the adapter to the base's weight, in place, and returns the base; None if no weight can hold it."""

    def __init__(self, base: nn.Module, kind: LayerKind | None = None) -> None:
        super().__init__(base)
        self.kind = kind_of(base) if kind is None else kind

    @torch.no_grad()
    def base_with(self, weight: Tensor) -> nn.Module:
        """Write a weight [d_out, d_in] into the base, and return the base: the last line of a `merge`."""
        assert self.kind is not None
        self.kind.write(self.base, weight)
        return self.base


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear map that can be adapted; None for any other module."""
    kind = kind_of(layer)
    sizes = None if kind is None or not kind.linear else kind.sizes(layer)
    return None if sizes is None else (sizes.d_in, sizes.d_out)


def oriented_weight(layer: nn.Module) -> Tensor:
    """Return the weight as [d_out, d_in]: a transposed view if the layer is a ``Conv1D``."""
    kind = kind_of(layer)
    weight = layer.weight if kind is None else kind.weight(layer)
    assert isinstance(weight, Tensor)
    return weight


def new_factor(layer: nn.Module, *shape: int) -> nn.Parameter:
    """Return an uninitialised parameter on a layer's device.

    It is at least float32: in a half-precision layer's dtype, small updates would be lost.
    """
    weight = held(layer)
    assert weight is not None
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))


@torch.no_grad()
def started(module: nn.Module, part: Part, new: Tensor) -> Tensor:
    """Return further components of a part, with zeros where the layer's kind begins with zeros (`LayerKind.start`)."""
    if part.name == "A" and isinstance(module, Adapter) and module.kind is not None:
        return module.kind.start(module.base, new)
    return new


def further(module: nn.Module, part: Part, count: int) -> Tensor:
    """Return an uninitialised float32 tensor on the CPU for `count` further components of a part."""
    shape = list(part.of(module).shape)
    assert part.axis is not None
    shape[part.axis] = count
    return torch.empty(shape, dtype=torch.float32)

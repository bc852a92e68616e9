"""Linear maps: ``nn.Linear`` and transformers' ``Conv1D``."""

import sys
from typing import ClassVar

import attrs
from torch import Tensor, nn

from lrkit.layers.base import LayerKind, Sizes
from lrkit.layers.behaviour import strangeness
from lrkit.precision import is_plain


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is transformers' ``Conv1D``, a linear map whose weight is [d_in, d_out]."""
    # A model that has a Conv1D has imported its module; importing it here would double the time of `import lrkit`.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and type(layer) is module.Conv1D


@attrs.frozen
class Linear(LayerKind):
    """``nn.Linear`` and transformers' ``Conv1D``.

    ``nn.MultiheadAttention`` reads its projection's weight without calling the layer, so that an adapter there would have
    no effect: that subclass of ``nn.Linear`` is left out.
    """

    linear: ClassVar[bool] = True

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return the sizes of a linear layer; None for any other module."""
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        if isinstance(layer, nn.Linear):
            return Sizes(layer.in_features, layer.out_features)
        if is_conv1d(layer):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            return Sizes(*weight.shape)
        return None

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse an ``nn.Linear`` by its class that is no linear map by what it does."""
        return strangeness(layer, layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the weight as [d_out, d_in]: a transposed view if the layer is a ``Conv1D``."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight if type(layer) is nn.Linear or not is_conv1d(layer) else weight.t()

    def plain_weight(self, layer: nn.Module) -> Tensor | None:
        """Return the weight, unless the layer must be called itself.

        It must if it has a forward of its own (quantized layers; accelerate's, on the instance), or hooks.
        """
        bias = layer.bias
        plain = (
            (type(layer) is nn.Linear or is_conv1d(layer))
            and is_plain(layer.weight)
            and (bias is None or is_plain(bias))
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
            and not layer._backward_hooks
            and not layer._backward_pre_hooks
            and "forward" not in layer.__dict__  # torch.compile of torch 2.7 does not know vars()
        )
        return self.weight(layer) if plain else None

"""Convolutions: ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, whose input is a patch."""

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.base import LayerKind, Sizes

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@attrs.frozen
class Convolution(LayerKind):
    """Convolutions of any number of groups: the filters are W [channels out, channels in / groups · kernel].

    A [r, d_in] is r filters, which every group of input channels meets; B [d_out, r] mixes the r channels of a group into
    its output channels. So ΔW = B A is exactly an increment of the layer's own weight.
    """

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return (entries of one filter, channels out) of a convolution; None for any other module."""
        if type(layer) not in _KINDS:
            return None
        assert isinstance(layer, _KINDS)
        return Sizes(layer.weight[0].numel(), layer.out_channels)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the filters as rows [channels out, entries of one filter]: a view."""
        assert isinstance(layer, _KINDS)
        return layer.weight.flatten(1)

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Write the filters, given as rows, into the layer."""
        assert isinstance(layer, _KINDS)
        layer.weight.copy_(weight.view(layer.weight.shape))

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        """Convolve with the rows of A, in each group of input channels: groups · r channels, group after group."""
        assert isinstance(layer, _KINDS)
        filters = a.view(len(a), *layer.weight.shape[1:])
        if layer.groups > 1:
            filters = filters.repeat(layer.groups, *[1] * (filters.ndim - 1))
        # The layer's own convolution, for its stride, dilation and kind of padding.
        h: Tensor = layer._conv_forward(x.to(a.dtype), filters, None)  # noqa: SLF001
        return h

    def rows(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the patches, as the layer itself cuts them out: convolved with the identity as filters."""
        assert isinstance(layer, _KINDS)
        size = layer.weight[0].numel()
        return self.out_rows(layer, self.down(layer, x, torch.eye(size, device=x.device, dtype=x.dtype)))

    def out_rows(self, layer: nn.Module, y: Tensor) -> Tensor:
        """Return one row of channels for each place."""
        assert isinstance(layer, _KINDS)
        channels = y.movedim(1 - layer.weight.ndim, -1)
        return channels.reshape(-1, channels.shape[-1])

    def no_rows(self, layer: nn.Module) -> str | None:
        """Refuse groups: each has patches of its own."""
        assert isinstance(layer, _KINDS)
        return None if layer.groups == 1 else f"its {layer.groups} groups of channels have different inputs"

    def up(self, layer: nn.Module, h: Tensor, b: Tensor, *where: Any) -> Tensor:
        """Mix the r channels of each group into its output channels."""
        assert isinstance(layer, _KINDS)
        spatial = layer.weight.ndim - 2
        filters = b.to(h.dtype).view(*b.shape, *[1] * spatial)
        return _CONVOLVE[spatial - 1](h, filters, groups=layer.groups)

    def scale(self, layer: nn.Module, h: Tensor, by: Tensor, *where: Any) -> Tensor:
        """Multiply channels by a vector, which every group meets if it is shorter than the channels."""
        assert isinstance(layer, _KINDS)
        spatial = layer.weight.ndim - 2
        channels = h.shape[-1 - spatial]
        return h * by.repeat(channels // len(by)).view(-1, *[1] * spatial)

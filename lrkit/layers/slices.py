"""Slices of fused projections: q, k and v of one linear map that computes all three, each as a layer of its own."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.around import Around
from lrkit.layers.base import LayerKind, Sizes
from lrkit.layers.fused import Layout, layout_of
from lrkit.layers.linear import Linear
from lrkit.precision import is_plain

_LINEAR = Linear()


class Slice(nn.Module):
    """Some rows of a fused linear map, shown as a linear map of its own.

    It has no tensors: its weight is the map's. The fused rows are `layout.groups` groups, and a slice has the rows
    start .. start + size - 1 of each group, group after group. For example GPT-NeoX's ``query_key_value`` has a group per
    attention head, and q is the first third of each.

    Args:
        owner: the fused map.
        layout: how its rows are divided.
        part: the slice's name in it.
    """

    def __init__(self, owner: nn.Module, layout: Layout, part: str) -> None:
        super().__init__()
        sizes = _LINEAR.sizes(owner)
        assert sizes is not None
        self._owner = (owner,)  # in a tuple, so that it is no submodule
        self.layout, self.part = layout, part
        self.in_features, self.out_features = sizes.d_in, layout.groups * layout.sizes[part]
        self.given: tuple[Tensor, Tensor] | None = None

    @property
    def owner(self) -> nn.Module:
        """Return the fused map."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """Return the slice's rows [out_features, in_features], a view if the rows are one group and a copy otherwise.

        It is the owner's whole weight if that is not a plain tensor (quantized, sharded), which has no rows to show.
        """
        weight = self.owner.weight
        assert isinstance(weight, Tensor)
        return self.rows(_LINEAR.weight(self.owner)).flatten(0, 1) if is_plain(weight) else weight

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the slice's rows [out_features]."""
        bias = self.owner.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else self.rows(bias).flatten(0, 1)

    def rows(self, fused: Tensor, dim: int = 0) -> Tensor:
        """Return the slice's rows of a tensor that has the owner's along a dimension: a view [.., groups, size, ..]."""
        inner = dim if dim < 0 else dim + 1
        start, size = self.layout.place(self.part)
        grouped = torch.unflatten(fused, dim, (self.layout.groups, -1))
        return grouped.narrow(inner, start, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the owner's output [..., out_features] for x [..., in_features], of the slice's rows alone."""
        if self.given is None and (weight := SLICES.plain_weight(self)) is not None:
            return F.linear(x, weight, self.bias)
        # Another input than the one that the output is of, such as one with entries dropped, has an output of its own.
        whole = self.given[1] if self.given is not None and self.given[0] is x else self.owner(x)
        return self.rows(whole, -1).flatten(-2)

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@attrs.frozen
class Slices(LayerKind):
    """Slices of ``nn.Linear`` and ``Conv1D`` layers whose layout is known (`lrkit.layers.fused`)."""

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return the sizes of a slice; None for any other module."""
        return Sizes(layer.in_features, layer.out_features) if isinstance(layer, Slice) else None

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the slice's rows."""
        assert isinstance(layer, Slice)
        return layer.weight

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Write the slice's rows into the owner's weight."""
        assert isinstance(layer, Slice)
        rows = layer.rows(_LINEAR.weight(layer.owner))
        rows.copy_(weight.view(rows.shape))

    def plain_weight(self, layer: nn.Module) -> Tensor | None:
        """Return the slice's rows if they are a view of a plain layer's weight.

        Rows of several groups would be copied at every call, and be kept for the backward pass.
        """
        assert isinstance(layer, Slice)
        if layer.layout.groups > 1 or (whole := _LINEAR.plain_weight(layer.owner)) is None:
            return None
        return layer.rows(whole)[0]

    def parts(self, layer: nn.Module, name: str, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the slices of a fused projection by name, such as q, k and v; empty if its layout is not known."""
        sizes = _LINEAR.sizes(layer)
        layout = None if sizes is None else layout_of(name, model, sizes.d_out)
        return {} if layout is None else {part: Slice(layer, layout, part) for part in layout.sizes}

    def join(self, layer: nn.Module, adapters: Mapping[str, nn.Module]) -> nn.Module:
        """Return the fused map with adapters in the places of some of its slices."""
        return Joined(layer, adapters)


SLICES = Slices()


class Joined(Around):
    """A fused projection of which some slices are adapted. Its output is the layer's: the slices in their places.

    If the layer can be computed slice by slice, every adapter computes its own rows. Otherwise (quantized and sharded
    weights, hooks, rows in several groups) the layer is called once, and every slice gets its part of the output.

    Args:
        base: the layer.
        adapters: an adapter for each slice that has one, by the slice's name. Somewhere inside of it is its `Slice`.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__(base)
        self._layout = next(m.layout for each in adapters.values() for m in each.modules() if isinstance(m, Slice))
        for part in self._layout.sizes:
            self.add_module(part, adapters[part] if part in adapters else Slice(base, self._layout, part))
        self._slices = tuple(m for m in self.modules() if isinstance(m, Slice))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., d_out] for x [..., d_in]."""
        whole = None if all(SLICES.plain_weight(each) is not None for each in self._slices) else self.base(x)
        try:
            for each in self._slices:
                each.given = None if whole is None else (x, whole)
            pieces = [self.get_submodule(part)(x) for part in self._layout.sizes]
        finally:
            for each in self._slices:
                each.given = None
        groups = self._layout.groups
        if groups == 1:
            return torch.cat(pieces, -1)
        return torch.cat([piece.unflatten(-1, (groups, -1)) for piece in pieces], -1).flatten(-2)

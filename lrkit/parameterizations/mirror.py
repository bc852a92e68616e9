"""The other side of a tied weight: a layer that has another layer's weight sees its increment too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers import kind_of
from lrkit.parameterizations.adapter import Adapter
from lrkit.parameterizations.lowrank import LowRank


class Mirror(Adapter):
    """A layer whose weight is that of an adapted layer, with the same ΔW. For example an output head tied to the embedding.

    It has no parameters of its own. If the two layers are of different kinds, as an embedding and a linear head are, the
    weight that they share is W [d_out, d_in] to one and Wᵀ to the other, and so is ΔW.

    Args:
        base: the layer whose place it takes.
        adapter: the adapter of the layer that it shares the weight with.
    """

    def __init__(self, base: nn.Module, adapter: LowRank) -> None:
        super().__init__(base)
        self.leader = (adapter,)  # in a tuple, so that it is no submodule
        self.transposed = kind_of(base) != adapter.kind

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B with this layer's ΔW = s · B diag(c) A."""
        (adapter,) = self.leader
        a, b = adapter.factors()
        if adapter.out_scale is not None:
            b = b * adapter.out_scale[:, None]
        return (b.t(), a.t()) if self.transposed else (a, b)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the increment."""
        (adapter,), base, kind = self.leader, self.base, self.kind
        assert kind is not None
        y: Tensor = base(x)
        a, b = self.factors()
        if not len(a):
            return y
        z = F.dropout(x, adapter.dropout, self.training).to(y.dtype) if x.is_floating_point() else x
        h = kind.down(base, z, a.to(y.dtype)) * adapter.scaling
        if adapter.core is not None:
            h = kind.scale(base, h, adapter.core.to(h.dtype))
        if adapter.dropout and z is x:
            h = h * F.dropout(torch.ones_like(h[..., :1]), adapter.dropout, self.training)
        return y + kind.up(base, h, b.to(h.dtype))


def mirrors(module: nn.Module, adapter: nn.Module) -> bool:
    """Return whether a module is the mirror of an adapter."""
    return isinstance(module, Mirror) and module.leader[0] is adapter

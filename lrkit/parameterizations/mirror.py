"""The other side of a tied weight: a layer that has another layer's weight sees its increment too."""

from torch import Tensor, nn

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

    Attributes:
        called: whether it has been called. A loss that reads its weight instead misses the increment.
    """

    def __init__(self, base: nn.Module, adapter: LowRank) -> None:
        super().__init__(base)
        self.leader = (adapter,)  # in a tuple, so that it is no submodule
        self.transposed = kind_of(base) != adapter.kind
        self.called = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B with this layer's ΔW = s · B diag(c) A."""
        (adapter,) = self.leader
        a, b = adapter.factors()
        if adapter.out_scale is not None:
            b = b * adapter.out_scale[:, None]
        return (b.t(), a.t()) if self.transposed else (a, b)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the increment."""
        (adapter,) = self.leader
        if not self.called:
            self.called = True
        y: Tensor = self.base(x)
        a, b = self.factors()
        return y + adapter.increment(self.base, self.kind, adapter.dropped(x), y.dtype, a, b) if len(a) else y


def mirrors(module: nn.Module, adapter: nn.Module) -> bool:
    """Return whether a module is the mirror of an adapter."""
    return isinstance(module, Mirror) and module.leader[0] is adapter

"""LoSparse: a weight as a low-rank matrix and a residual with few rows, W = U V + S (Li et al., arXiv 2306.11222)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrkit
from lrkit.layers import Convolution, Embedding
from lrkit.parameterizations import Adapter, Target
from lrkit.parameterizations.lowrank import new_factor, oriented_weight
from lrkit.precision import is_plain
from lrkit.settings import real


class LowRankPlusRows(Adapter):
    """y = U (V x) + S x + bias, with S stored as the rows that are left of it.

    The layer stays inside with its weight as it was, but computes nothing: U V + S is used instead of its weight.

    Args:
        base: the layer whose place it takes.
        rank: r, of U [d_out, r] and V [r, d_in].
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base)
        d_out, d_in = oriented_weight(base).shape
        self.d_out = d_out
        self.U = new_factor(base, d_out, rank)
        self.V = new_factor(base, rank, d_in)
        self.S = new_factor(base, d_out, d_in)
        # The row of the output that each row of S belongs to: a parameter, so that it is cut together with S.
        self.rows = nn.Parameter(torch.arange(d_out, device=self.S.device), requires_grad=False)
        with torch.no_grad():
            # In float64, so that U V + S is the weight again but for the rounding of S.
            weight = oriented_weight(base).double()
            u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
            root = sigma[:rank].sqrt()
            self.U.copy_(u[:, :rank] * root)
            self.V.copy_(root[:, None] * v[:rank])
            self.S.copy_(weight - self.U.double() @ self.V.double())

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., d_out] for x [..., d_in]."""
        u, v, s = (p.to(x.dtype) for p in (self.U, self.V, self.S))
        y = F.linear(F.linear(x, v), u, self.bias)
        rows = F.linear(x, s)
        return y + rows if len(s) == self.d_out else y.index_add(-1, self.rows, rows)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Write U V + S into the base's weight, and return the base."""
        return self.base_with((self.U @ self.V).index_add_(0, self.rows, self.S))


@attrs.frozen(kw_only=True)
class LoSparse(lrkit.Parameterization):
    """W = U V + S: the weight's best approximation of rank r, and the rest of it, row by row.

    Source: arXiv 2306.11222, section 3.1. U = P √Σ and V = √Σ Q from the weight's SVD P Σ Q, cut to the r largest; S is the
    rest. The model's own weight is not trained: U, V and S are copies, so that `detach` gives it back. Its components are
    S's rows, as many as the layer has outputs; they have no core value, and `lrkit.actions.Zero` prunes them.

    Args:
        ratio: r = ⌈ratio · d_out d_in / (d_out + d_in)⌉, so that U and V have about this share of the weight's parameters.
    """

    learning_rate: ClassVar[float] = 1e-4

    ratio: float = attrs.field(default=0.05, validator=real(0.0, 1.0, above=True))

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare S by its rows, with their numbers; and U and V."""
        return (
            lrkit.Part("S", axis=0, matrix=True),
            lrkit.Part("rows", axis=0, trains=False),
            lrkit.Part("U", matrix=True),
            lrkit.Part("V", matrix=True),
        )

    @property
    def components(self) -> None:
        """Return None: there are as many as the layer has outputs."""
        return None

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose all but stacks of experts, whose weights are no matrices."""
        return [target for target in targets if target.maps == 1]

    def build(self, target: Target) -> nn.Module:
        """Return the layer with its weight taken apart. Raise LrkitError for anything but a linear map."""
        if isinstance(target.kind, Convolution | Embedding):
            raise lrkit.LrkitError(
                f"{target.name}: LoSparse takes linear maps apart, not a {type(target.layer).__name__}"
            )
        weight = getattr(target.layer, "weight", None)
        if not is_plain(weight):
            raise lrkit.LrkitError(f"{target.name}: the weight is quantized, and LoSparse takes it apart")
        rank = math.ceil(self.ratio * target.d_out * target.d_in / (target.d_out + target.d_in))
        return LowRankPlusRows(target.layer, rank)

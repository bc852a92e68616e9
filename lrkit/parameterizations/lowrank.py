"""One low-rank adapter for every low-rank parameterization: y = W x + s · b ∘ B (c ∘ (A x)).

LoRA, SVD (P = B, Λ = c, Q = A) and vector-scaled LoRA (Λ_b = b, Λ_d = c) differ in which factors exist, how they start, and
which of them train. `LowRank.reference` is the formula as it is read; `lowrank_kernel` is the same in one autograd function.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.errors import LrkitError
from lrkit.layers import LayerKind, kind_of
from lrkit.parameterizations.adapter import Adapter, further, layer_shape, new_factor, oriented_weight
from lrkit.parameterizations.base import Target
from lrkit.parameterizations.lowrank_kernel import low_rank_linear
from lrkit.precision import is_autocast_on
from lrkit.units import evened

__all__ = ["LowRank", "further", "layer_shape", "low_rank_linear", "new_factor", "oriented_weight"]


class LowRank(Adapter):
    """A linear map with a low-rank increment: y = W x + s · b ∘ B (c ∘ (A x)).

    The layer's kind (`lrkit.layers`) says how its input meets A and B. A layer that stacks several maps has the components
    of all maps in one A and B, map after map.

    Args:
        base: the target whose place it takes, or a layer of one of lrkit's own kinds.
        a: A [r, d_in], or wider if layers share it (the first d_in columns are read).
        b: B [d_out, r], or taller if layers share it (the first d_out rows are read).
        core: c [r] or None.
        out_scale: b [d_out] or None.
        scaling: a fixed factor.
        dropout: probability with which an entry of the adapter's input is dropped while training.
        owner: the adapter whose A and B this one reads, if layers share them (`a` and `b` are then None). They are
            registered on the owner alone, since ``save_pretrained`` refuses a tensor under several names.
    """

    A: nn.Parameter
    B: nn.Parameter
    core: nn.Parameter | None
    out_scale: nn.Parameter | None
    additive: ClassVar[bool] = True
    """Whether the layer computes (W + ΔW) x + bias, with ΔW by `factors`. So a layer that is tied to it can follow."""
    gate: float | None = None
    """What all core values are at the start if they are gates, which no factor is to go into; None if they are not."""
    fused = True
    """Set to False on the class to compute every adapter by `reference`, for tests and comparisons."""

    def __init__(
        self,
        base: nn.Module | Target,
        a: nn.Parameter | None,
        b: nn.Parameter | None,
        *,
        core: nn.Parameter | None = None,
        out_scale: nn.Parameter | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        owner: "LowRank | None" = None,
    ) -> None:
        layer, kind = (base, kind_of(base)) if isinstance(base, nn.Module) else (base.layer, base.kind)
        super().__init__(layer, kind)
        sizes = None if kind is None else kind.sizes(layer)
        if sizes is None:
            raise LrkitError(f"a low-rank adapter takes a layer of a known kind, not {type(layer).__name__}")
        self.d_in, self.d_out, self.maps = sizes.d_in, sizes.d_out, sizes.maps
        if owner is not None:
            self._owner = (owner,)  # in a tuple, so that it is no submodule
        else:
            assert a is not None and b is not None and kind is not None
            with torch.no_grad():
                kind.start(layer, a)
            self.A, self.B = a, b
        self.register_parameter("core", core)
        self.register_parameter("out_scale", out_scale)
        self.scaling = scaling
        self.dropout = dropout
        self.first_rank = self.rank

    def __getattr__(self, name: str) -> Any:
        if name in ("A", "B") and "_owner" in self.__dict__:
            return getattr(self.__dict__["_owner"][0], name)
        return super().__getattr__(name)

    @property
    def rank(self) -> int:
        """Return how many rank components are stored, masked ones included."""
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [r, d_in] and B [d_out, r], cut to this layer if they are shared."""
        a, b = self.A, self.B
        return (
            a if a.shape[1] == self.d_in else a[:, : self.d_in],
            b if b.shape[0] == self.d_out else b[: self.d_out],
        )

    def delta(self) -> Tensor:
        """Return ΔW [d_out, d_in] in the factors' dtype; [maps, d_out, d_in] of a layer that stacks several."""
        a, b = self.factors()
        if self.maps > 1:
            return self._deltas(a, b)
        if self.core is not None:
            b = b * self.core
        delta = (b @ a) * self.scaling
        return delta if self.out_scale is None else delta * self.out_scale[:, None]

    def _deltas(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ΔW of every map [maps, d_out, d_in]."""
        b = b if self.core is None else b * self.core
        deltas = b.view(self.d_out, self.maps, -1).transpose(0, 1) @ a.view(self.maps, -1, self.d_in) * self.scaling
        return deltas if self.out_scale is None else deltas * self.out_scale.view(self.maps, -1, 1)

    def reference(self, x: Tensor, *where: Any) -> Tensor:
        """Compute the output by the formula as it is read. `forward` does the same, fused if possible."""
        y: Tensor = self.base(x, *where)
        out = self.increment(self.base, self.kind, self.dropped(x), y.dtype, *self.factors(), *where)
        if self.out_scale is not None and self.kind is not None:
            out = self.kind.scale(self.base, out, self.out_scale.to(out.dtype), *where)
        return y + out

    def dropped(self, x: Tensor) -> Tensor:
        """Return the layer's input as the adapter sees it: some entries dropped while training; no token ids."""
        return F.dropout(x, self.dropout, self.training) if x.is_floating_point() else x

    def increment(
        self,
        base: nn.Module,
        kind: LayerKind | None,
        x: Tensor,
        dtype: torch.dtype,
        a: Tensor,
        b: Tensor,
        *where: Any,
    ) -> Tensor:
        """Return s · B (c ∘ (A x)) for a layer's input, without the output scale.

        Args:
            base: the layer.
            kind: its kind.
            x: its input, as `dropped` returns it.
            dtype: of its output.
            a: A.
            b: B.
            where: the layer's further arguments.
        """
        assert kind is not None
        # Beside a half-precision base the factors are float32, and compute in the output's dtype.
        one_hot = not x.is_floating_point()
        z = x if one_hot else x.to(dtype)
        h = kind.down(base, z, a.to(dtype), *where) * self.scaling
        if self.core is not None:
            h = kind.scale(base, h, self.core.to(h.dtype), *where)
        if self.dropout and one_hot:  # the one entry of the input is dropped or not
            h = h * F.dropout(torch.ones_like(h[..., :1]), self.dropout, self.training)
        return kind.up(base, h, b.to(h.dtype), *where)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """Return y [..., d_out] for x [..., d_in]; of other kinds of layers, in the layer's own shapes.

        Args:
            x: the layer's input.
            where: its further arguments.
        """
        base = self.base
        a, b = self.factors()
        if not len(a):
            y: Tensor = base(x, *where)
            return y
        # Dropout acts on the adapter's input alone, which the kernel does not know.
        fused = self.fused and self.kind is not None and not (self.dropout and self.training)
        weight = self.kind.plain_weight(base) if fused and self.kind is not None else None
        if weight is None:
            return self.reference(x, *where)
        bias = self.bias
        device = x.device.type
        # Autocast does not reach into an autograd function: cast as it would, which leaves float64 as it is.
        cast = is_autocast_on(device) and torch.float64 not in (x.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(device) if cast else x.dtype
        if dtype == torch.float16:
            return self.reference(x)  # a small core value folded into B would underflow
        if cast:
            x, weight, bias = _cast(dtype, x, weight, bias)
        core, out_scale = self.core, self.out_scale
        if a.dtype != x.dtype:
            a, b, core, out_scale = _cast(x.dtype, a, b, core, out_scale)
        return low_rank_linear(x, weight, bias, a, b, core, out_scale, self.scaling)

    def merged_weight(self) -> Tensor:
        """Return W + ΔW in the factors' dtype, in the shape of `delta`."""
        assert self.kind is not None
        return self.kind.weight(self.base).to(self.A.dtype) + self.delta()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add ΔW to the base weight, in place, and return the base."""
        return self.base_with(self.merged_weight())  # one rounding: a bf16 weight is not rounded twice

    @torch.no_grad()
    def export_factors(self) -> tuple[Any, ...]:
        """Return A [r, d_in], B [d_out, r], c [r] and s with ΔW = s · B diag(c) A, without components whose c is zero.

        Of a layer that stacks several maps they are those of all maps, [maps · r], as many of each.
        """
        a, b = self.factors()
        core = a.new_ones(len(a)) if self.core is None else self.core
        if self.out_scale is not None:
            b = (b.view(self.d_out, self.maps, -1) * self.out_scale.view(self.maps, -1).t()[..., None]).flatten(1)
        there = evened(core != 0, self.maps).nonzero().flatten()
        return a[there], b[:, there], core[there], self.scaling

    @torch.no_grad()
    def import_factors(self, a: Tensor, b: Tensor, core: Tensor | None, scaling: float) -> None:
        """Take over ΔW = s · B diag(c) A exactly. Components beyond those given add nothing at first.

        If this adapter has core values and none are given, they become ΔW's singular values. An SVD of the product has at
        most r components, so nothing is lost. Of a layer that stacks several maps the sizes are [maps · r], and the SVD is
        each map's. Core values that are gates stay as they are at the start (`gate`), and A and B take all of ΔW.

        Args:
            a: A [r, d_in].
            b: B [d_out, r].
            core: c [r]; None for ones.
            scaling: s.

        Raises:
            LrkitError: the sizes differ, this adapter has fewer than r components, or layers share its matrices.
        """
        if "_owner" in self.__dict__ or (self.A.shape[1], self.B.shape[0]) != (self.d_in, self.d_out):
            raise LrkitError("layers share one A and B, and each would need its own")
        if (b.shape[0], a.shape[1]) != (self.d_out, self.d_in):
            raise LrkitError(
                f"the layer is {self.d_out} x {self.d_in}, and what is given is {b.shape[0]} x {a.shape[1]}"
            )
        rank, room = len(a) // self.maps, self.rank // self.maps
        if rank > room:
            raise LrkitError(f"rank {room} cannot hold {rank} components: give a method of rank {rank} or more")
        a, b = a.double(), b.double()
        if core is not None:
            core = core.double()
        elif self.core is not None and self.gate is None:
            maps = zip(
                a.view(self.maps, rank, self.d_in), b.reshape(self.d_out, self.maps, rank).unbind(1), strict=True
            )
            parts = zip(*(_singular(*each) for each in maps), strict=True)
            a, b, core = (torch.cat(each, dim=axis) for each, axis in zip(parts, (0, 1, 0), strict=True))
        rank, ratio = len(a) // self.maps, scaling / self.scaling
        if self.core is None or self.gate is not None:
            a = a if core is None else core[:, None] * a
            b = b * (ratio / (self.gate or 1.0))
            self.B.zero_()
            if self.core is not None:
                self.core.fill_(self.gate or 1.0)
        else:
            assert core is not None
            self.core.zero_()
            self.core.view(self.maps, room)[:, :rank] = (core * ratio).view(self.maps, rank).to(self.core)
        if self.out_scale is not None:
            self.out_scale.fill_(1)
        self.A.view(self.maps, room, self.d_in)[:, :rank] = a.view(self.maps, rank, self.d_in).to(self.A)
        self.B.view(self.d_out, self.maps, room)[..., :rank] = b.reshape(self.d_out, self.maps, rank).to(self.B)

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        maps = f", maps={self.maps}" if self.maps > 1 else ""
        return f"d_in={self.d_in}, d_out={self.d_out}{maps}, rank={self.rank}, scaling={self.scaling:g}"


def _singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Vᵀ, U, σ) with B A = U diag(σ) Vᵀ, by two r x r triangles and without a d_out x d_in matrix."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, sigma, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return v @ q_a.t(), q_b @ u, sigma


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]

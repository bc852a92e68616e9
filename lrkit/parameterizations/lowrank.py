"""One low-rank adapter for every low-rank parameterization: y = W x + s · b ∘ B (c ∘ (A x)).

LoRA, SVD (P = B, Λ = c, Q = A) and vector-scaled LoRA (Λ_b = b, Λ_d = c) differ in which factors exist, how they
start, and which of them train. `LowRank.reference` is the formula as it is read; `low_rank_linear` is the same in one
autograd function: the scale is folded into the r-wide side, the sum is done in place, and only the gradients that are
needed are computed.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from lrkit.errors import LrkitError
from lrkit.precision import is_autocast_on, is_plain, without_autocast
from lrkit.units import Part


def _is_conv1d(layer: nn.Module) -> bool:
    # Who has a Conv1D has imported this module; importing it here would double the time of `import lrkit`.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and type(layer) is module.Conv1D


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear map that can be adapted; None for any other module.

    ``nn.MultiheadAttention`` reads its projection's weight without calling the layer, so an adapter there would be
    passed by in silence: that subclass of ``nn.Linear`` is left out.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if _is_conv1d(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def oriented_weight(layer: nn.Module) -> Tensor:
    """The weight as [d_out, d_in]: a transposed view where the layer is a ``Conv1D``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if type(layer) is nn.Linear or not _is_conv1d(layer) else weight.t()


# torch's FLOP counter knows addmm, but not addmm_: what is done in place would not be counted.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


_unsafe_view = torch.ops.aten._unsafe_view.default


class _LowRankLinear(torch.autograd.Function):
    # Shapes: n tokens, i = d_in, o = d_out, r = rank. x_ni, w_oi, a_ri, b_or, c_r, s_o.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_oi: Tensor,
        bias_o: Tensor | None,
        a_ri: Tensor,
        b_or: Tensor,
        c_r: Tensor | None,
        s_o: Tensor | None,
        scaling: float,
        tracked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        _, need_w, _, need_a, need_b, need_c, need_s, *_ = ctx.needs_input_grad
        x_ni = _rows(x)
        u_or = _scaled(b_or, c_r, s_o, scaling)
        h_nr = None
        ctx.merged = _merging_pays(x_ni, w_oi, need_a)
        # Only the gradients of A and W need x itself. Without them A x stands for it, which is d_in / r times smaller.
        ctx.keeps_x = need_a or need_w
        if not ctx.merged or (tracked and not ctx.keeps_x and (need_b or need_c or need_s)):
            h_nr = _down(x_ni, a_ri)
        if ctx.merged:
            y_no = F.linear(x_ni, torch.addmm(w_oi, u_or, a_ri), bias_o)
        else:
            assert h_nr is not None
            y_no = F.linear(x_ni, w_oi, bias_o).addmm_(h_nr, u_or.t())
        ctx.save_for_backward(x if ctx.keeps_x else None, w_oi, a_ri, u_or, b_or, c_r, s_o, h_nr)
        ctx.scaling, ctx.shape, ctx.device = scaling, x.shape, x.device.type
        ctx.set_materialize_grads(False)  # the second output mostly has none
        # Not y_no.view(): what a function returns as a view may not be modified in place, as by nn.ReLU(inplace=True).
        y: Tensor = _unsafe_view(y_no, (*x.shape[:-1], y_no.shape[1]))
        # Where A x stands for x, second derivatives reach x through it: as an output it is part of the graph.
        return y, None if ctx.keeps_x else h_nr

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with without_autocast(ctx.device):
            return _backward(ctx, *grads)


def _backward(ctx: Any, g: Tensor | None, further_gh_nr: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_oi, a_ri, u_or, b_or, c_r, s_o, h_nr = ctx.saved_tensors
    need_x, need_w, need_bias, need_a, need_b, need_c, need_s, *_ = ctx.needs_input_grad
    if g is None:
        gx = None if further_gh_nr is None else (further_gh_nr @ a_ri).view(ctx.shape)
        return gx, *[None] * 8
    g_no = _rows(g)
    x_ni = None if x is None else _rows(x)
    out = None
    if torch.is_grad_enabled():
        # create_graph=True: what forward made without a graph is made again with one.
        u_or, h_nr = _scaled(b_or, c_r, s_o, ctx.scaling), h_nr if x_ni is None else None
    elif need_b:
        out = torch.empty_like(u_or)  # laid out like B, or the gradient would be copied once more
    gx = gw = gbias = ga = gb = gc = gs = None
    if need_b or need_c or need_s:
        if h_nr is None:
            assert x_ni is not None
            h_nr = _down(x_ni, a_ri)
        # What all three gradients are made of. The transpose of g.t() @ h is the same numbers, three times as fast on
        # CPU, where r columns are too few.
        p_or = (h_nr.t() @ g_no).t()
        if need_b:
            gb = _scaled(p_or, c_r, s_o, ctx.scaling, out)
        if need_c or need_s:
            p_or = p_or * b_or if ctx.scaling == 1.0 else p_or * b_or * ctx.scaling
            if need_c:
                gc = p_or.sum(0) if s_o is None else p_or.t().mv(s_o)
            if need_s:
                gs = p_or.sum(1) if c_r is None else p_or.mv(c_r)
    if need_a or (need_x and not ctx.merged):
        gh_nr = g_no @ u_or
        if need_a:
            ga = gh_nr.t() @ x_ni
    if need_x:
        if ctx.merged:
            # Merged a second time rather than kept: kept, every layer would hold a copy of its weight.
            gx = g_no @ torch.addmm(w_oi, u_or, a_ri)
        else:
            gx = (g_no @ w_oi).addmm_(gh_nr, a_ri)
        if further_gh_nr is not None:
            gx = gx + further_gh_nr @ a_ri
        gx = gx.view(ctx.shape)
    if need_w:
        assert x_ni is not None
        gw = g_no.t() @ x_ni
    if need_bias:
        gbias = g_no.sum(0)
    return gx, gw, gbias, ga, gb, gc, gs, None, None


_MERGING_PAYS_FROM = {True: 6.0, False: 2.5}
"""By whether A trains: merge from this many times d_in d_out entries of x and y on. See docs/performance.md."""


def _merging_pays(x_ni: Tensor, w_oi: Tensor, need_a: bool) -> bool:
    """Whether W + ΔW, made once in forward and once in backward, costs less than thin products for each token.

    What it saves grows with the entries of x and y, what it costs with those of W; the rank is in both. It saves two
    products, and a third where A is frozen: nothing else then asks for the gradient of A x. A weight of half precision is
    never merged into: it would round ΔW away.
    """
    (n, d_in), d_out = x_ni.shape, w_oi.shape[0]
    wide = w_oi.dtype in (torch.float32, torch.float64)
    return wide and n * (d_in + d_out) >= _MERGING_PAYS_FROM[need_a] * d_in * d_out


def _rows(x: Tensor) -> Tensor:
    """One row a token [n, width]."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _down(x_ni: Tensor, a_ri: Tensor) -> Tensor:
    """A x for each token [n, r]."""
    # As its transpose the product takes two thirds of the time on a CPU, up to four rows.
    return (a_ri @ x_ni.t()).t() if len(a_ri) <= 4 else x_ni @ a_ri.t()


def _scaled(b_or: Tensor, c_r: Tensor | None, s_o: Tensor | None, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling · s ∘ B diag(c)."""
    if c_r is not None:
        b_or = torch.mul(b_or, c_r if scaling == 1.0 else c_r * scaling, out=out)
    elif scaling != 1.0:
        b_or = torch.mul(b_or, scaling, out=out)
    return b_or if s_o is None else torch.mul(b_or, s_o[:, None], out=out)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y = W x + bias + scaling · out_scale ∘ B (core ∘ (A x)), as one autograd function.

    Args:
        x: input [..., d_in].
        weight: W [d_out, d_in].
        bias: [d_out] or None.
        a: A [r, d_in].
        b: B [d_out, r].
        core: c [r] or None.
        out_scale: b [d_out] or None.
        scaling: a fixed factor, such as LoRA's α/r.

    Returns:
        y [..., d_out]. All tensors must share one dtype.
    """
    y: Tensor
    tracked = torch.is_grad_enabled()  # inside of the function it is always off
    y, _ = _LowRankLinear.apply(x, weight, bias, a, b, core, out_scale, scaling, tracked)  # type: ignore[no-untyped-call]
    return y


class LowRank(nn.Module):
    """A linear map with a low-rank increment: y = W x + s · b ∘ B (c ∘ (A x)).

    Args:
        base: the layer whose place it takes; its parameters stay where they are.
        a: A [r, d_in], or wider where it is shared between layers (the first d_in columns are read).
        b: B [d_out, r], or taller where it is shared (the first d_out rows are read).
        core: c [r] or None.
        out_scale: b [d_out] or None.
        scaling: a fixed factor.
        dropout: probability with which an entry of the adapter's input is dropped while training.
        owner: the adapter whose A and B this one reads, where layers share them (`a` and `b` are then None). They are
            registered on the owner alone: a tensor under many names is refused by ``save_pretrained``.
    """

    A: nn.Parameter
    B: nn.Parameter
    core: nn.Parameter | None
    out_scale: nn.Parameter | None
    fused = True
    """False sends every adapter along the readable path (a class attribute, for tests and for comparing)."""

    def __init__(
        self,
        base: nn.Module,
        a: nn.Parameter | None,
        b: nn.Parameter | None,
        *,
        core: nn.Parameter | None = None,
        out_scale: nn.Parameter | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        owner: "LowRank | None" = None,
    ) -> None:
        super().__init__()
        shape = layer_shape(base)
        if shape is None:
            raise LrkitError(f"a low-rank adapter takes an nn.Linear or a Conv1D, not {type(base).__name__}")
        self.base = base
        self.d_in, self.d_out = shape
        if owner is not None:
            self._owner = (owner,)  # in a tuple, so that it is no submodule
        else:
            assert a is not None and b is not None
            self.A, self.B = a, b
        self.register_parameter("core", core)
        self.register_parameter("out_scale", out_scale)
        self.scaling = scaling
        self.dropout = dropout

    def __getattr__(self, name: str) -> Any:
        if name in ("A", "B") and "_owner" in self.__dict__:
            return getattr(self.__dict__["_owner"][0], name)
        return super().__getattr__(name)

    @property
    def rank(self) -> int:
        """Rank components that are stored (masked ones included)."""
        return self.A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base weight, so that code that looks at ``layer.weight.dtype`` goes on working."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r], cut to this layer where they are shared."""
        a, b = self.A, self.B
        return (
            a if a.shape[1] == self.d_in else a[:, : self.d_in],
            b if b.shape[0] == self.d_out else b[: self.d_out],
        )

    def delta(self) -> Tensor:
        """ΔW [d_out, d_in] in the factors' dtype."""
        a, b = self.factors()
        if self.core is not None:
            b = b * self.core
        delta = (b @ a) * self.scaling
        return delta if self.out_scale is None else delta * self.out_scale[:, None]

    def reference(self, x: Tensor) -> Tensor:
        """The formula as it is read; `forward` does the same, fused where that is possible."""
        y: Tensor = self.base(x)
        a, b = self.factors()
        # The factors may be kept in float32 beside a half-precision base: they compute in the input's dtype.
        z = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = F.linear(z, a.to(y.dtype)) * self.scaling
        if self.core is not None:
            h = h * self.core.to(h.dtype)
        out = F.linear(h, b.to(h.dtype))
        if self.out_scale is not None:
            out = out * self.out_scale.to(out.dtype)
        return y + out

    def forward(self, x: Tensor) -> Tensor:
        """y [..., d_out] of x [..., d_in]."""
        base = self.base
        a, b = self.factors()
        if not len(a):
            y: Tensor = base(x)
            return y
        if not self._fusible(base):
            return self.reference(x)
        weight, bias = oriented_weight(base), self.bias
        device = x.device.type
        # Autocast does not see into an autograd function: cast as it would, which leaves float64 alone.
        cast = is_autocast_on(device) and torch.float64 not in (x.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(device) if cast else x.dtype
        if dtype == torch.float16:
            return self.reference(x)  # a small core value that is folded into B would underflow
        if cast:
            x, weight, bias = _cast(dtype, x, weight, bias)
        core, out_scale = self.core, self.out_scale
        if a.dtype != x.dtype:
            a, b, core, out_scale = _cast(x.dtype, a, b, core, out_scale)
        return low_rank_linear(x, weight, bias, a, b, core, out_scale, self.scaling)

    def _fusible(self, base: nn.Module) -> bool:
        # A forward of its own (quantized layers; accelerate's, on the instance), a hook on the base, or dropout on the
        # adapter's input only: each needs the base to be called.
        return (
            self.fused
            and (type(base) is nn.Linear or _is_conv1d(base))
            and is_plain(base.weight)
            and (base.bias is None or is_plain(base.bias))
            and not (self.dropout and self.training)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
            and "forward" not in base.__dict__  # torch.compile of torch 2.7 does not know vars()
        )

    def merge(self) -> nn.Module:
        """Add ΔW to the base weight, in place, and give the base back."""
        weight = oriented_weight(self.base)
        with torch.no_grad():
            # One rounding, from the wider dtype: a bf16 weight is not rounded twice.
            merged = weight.to(self.A.dtype) + self.delta()
            weight.copy_(merged)
        return self.base

    @torch.no_grad()
    def export_factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """A [r, d_in], B [d_out, r], c [r] and s with ΔW = s · B diag(c) A; components whose c is zero are left out."""
        a, b = self.factors()
        core = a.new_ones(len(a)) if self.core is None else self.core
        if self.out_scale is not None:
            b = b * self.out_scale[:, None]
        there = core.nonzero().flatten()
        return a[there], b[:, there], core[there], self.scaling

    @torch.no_grad()
    def import_factors(self, a: Tensor, b: Tensor, core: Tensor | None, scaling: float) -> None:
        """Take over ΔW = s · B diag(c) A as it is. Components beyond those given add nothing at first.

        Where this adapter has core values and none are given, they are ΔW's singular values: an SVD of the product
        gives at most r components, so that nothing is lost.

        Args:
            a: A [r, d_in].
            b: B [d_out, r].
            core: c [r]; None for ones.
            scaling: s.

        Raises:
            LrkitError: it is of another size, has fewer than r components, or other layers read its matrices.
        """
        if (
            "_owner" in self.__dict__
            or self.factors()[0].shape != self.A.shape
            or self.factors()[1].shape != self.B.shape
        ):
            raise LrkitError("layers share one A and B, and each would need its own")
        if (b.shape[0], a.shape[1]) != (self.d_out, self.d_in):
            raise LrkitError(
                f"the layer is {self.d_out} x {self.d_in}, and what is given is {b.shape[0]} x {a.shape[1]}"
            )
        if len(a) > self.rank:
            raise LrkitError(
                f"rank {self.rank} cannot hold {len(a)} components: give a method of rank {len(a)} or more"
            )
        a, b = a.double(), b.double()
        if core is not None:
            core = core.double()
        elif self.core is not None:
            a, b, core = _singular(a, b)
        rank, ratio = len(a), scaling / self.scaling
        if self.core is None:
            a = a if core is None else core[:, None] * a
            b = b * ratio
            self.B[:, rank:] = 0
        else:
            assert core is not None
            self.core.zero_()
            self.core[:rank] = core * ratio
        if self.out_scale is not None:
            self.out_scale.fill_(1)
        self.A[:rank] = a.to(self.A)
        self.B[:, :rank] = b.to(self.B)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.rank}, scaling={self.scaling:g}"


def _singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A = U diag(σ) Vᵀ as (Vᵀ, U, σ), by way of the two r x r triangles: no d_out x d_in matrix is made."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, sigma, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return v @ q_a.t(), q_b @ u, sigma


def further(module: nn.Module, part: Part, count: int) -> Tensor:
    """An uninitialised float32 tensor on the CPU for `count` further components of a part."""
    shape = list(part.of(module).shape)
    assert part.axis is not None
    shape[part.axis] = count
    return torch.empty(shape, dtype=torch.float32)


def new_factor(layer: nn.Module, *shape: int) -> nn.Parameter:
    """An uninitialised parameter beside a layer, on its device.

    At least float32: beside a half-precision base, small updates would be lost in the base's dtype.
    """
    weight = oriented_weight(layer)
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

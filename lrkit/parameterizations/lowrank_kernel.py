"""The low-rank map y = W x + s · b ∘ B (c ∘ (A x)) as one autograd function.

The scale is folded into the r-wide side, the sum is done in place, and only the gradients that are needed are computed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from lrkit.precision import without_autocast

# torch's FLOP counter knows addmm, but not addmm_: without this, products that are added in place would not be counted.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])

_unsafe_view = torch.ops.aten._unsafe_view.default


class _LowRankLinear(torch.autograd.Function):
    # Shapes as suffixes: n tokens, i = d_in, o = d_out, r = rank. So x_ni, w_oi, a_ri, b_or, c_r, s_o.

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
        # Only the gradients of A and W need x itself. If there are none, A x is kept instead, d_in / r times smaller.
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
        ctx.set_materialize_grads(False)  # the second output seldom has a gradient
        # Not y_no.view(): a view that a function returns cannot be modified in place, for example by nn.ReLU(inplace=True).
        y: Tensor = _unsafe_view(y_no, (*x.shape[:-1], y_no.shape[1]))
        # If A x is kept instead of x, second derivatives reach x through it: as an output it is part of the graph.
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
        # create_graph=True: forward made these without a graph, so they are made again with one.
        u_or, h_nr = _scaled(b_or, c_r, s_o, ctx.scaling), h_nr if x_ni is None else None
    elif need_b:
        out = torch.empty_like(u_or)  # in B's memory layout, or autograd would copy the gradient once more
    gx = gw = gbias = ga = gb = gc = gs = None
    if need_b or need_c or need_s:
        if h_nr is None:
            assert x_ni is not None
            h_nr = _down(x_ni, a_ri)
        # All three gradients are made of it. Written g.t() @ h it is the same numbers in three times as long on a CPU,
        # since r columns are too few.
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
            # Merged a second time: if it were kept from forward, every layer would hold a copy of its weight.
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
"""By whether A trains: merge if x and y together have this many times d_in d_out entries. See docs/performance.md."""


def _merging_pays(x_ni: Tensor, w_oi: Tensor, need_a: bool) -> bool:
    """Return whether W + ΔW, made once in forward and once in backward, costs less than thin products per token.

    Its savings grow with the entries of x and y, its cost with those of W; the rank is in both. It saves two products, and a
    third if A is frozen, since nothing else then needs the gradient of A x. A half-precision weight is never merged: it
    would round ΔW away.
    """
    (n, d_in), d_out = x_ni.shape, w_oi.shape[0]
    wide = w_oi.dtype in (torch.float32, torch.float64)
    return wide and n * (d_in + d_out) >= _MERGING_PAYS_FROM[need_a] * d_in * d_out


def _rows(x: Tensor) -> Tensor:
    """Reshape to one row per token [n, width]."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _down(x_ni: Tensor, a_ri: Tensor) -> Tensor:
    """Return A x per token [n, r]."""
    # With up to four rows, the transposed product takes two thirds of the time on a CPU.
    return (a_ri @ x_ni.t()).t() if len(a_ri) <= 4 else x_ni @ a_ri.t()


def _scaled(b_or: Tensor, c_r: Tensor | None, s_o: Tensor | None, scaling: float, out: Tensor | None = None) -> Tensor:
    """Return scaling · s ∘ B diag(c)."""
    if c_r is not None:
        b_or = torch.mul(b_or, c_r if scaling == 1.0 else c_r * scaling, out=out)
    elif scaling != 1.0:
        b_or = torch.mul(b_or, scaling, out=out)
    return b_or if s_o is None else torch.mul(b_or, s_o[:, None], out=out)


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
    """Compute y = W x + bias + scaling · out_scale ∘ B (core ∘ (A x)) as one autograd function.

    Args:
        x: input [..., d_in].
        weight: W [d_out, d_in].
        bias: [d_out] or None.
        a: A [r, d_in].
        b: B [d_out, r].
        core: c [r] or None.
        out_scale: b [d_out] or None.
        scaling: a fixed factor, for example LoRA's α/r.

    Returns:
        y [..., d_out]. All tensors must share one dtype.
    """
    y: Tensor
    tracked = torch.is_grad_enabled()  # inside the function it is always off
    y, _ = _LowRankLinear.apply(x, weight, bias, a, b, core, out_scale, scaling, tracked)  # type: ignore[no-untyped-call]
    return y

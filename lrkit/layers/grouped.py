"""Products of rows that are sorted by group with one matrix per group: each expert's matrix meets its own rows alone.

Two operators, each the other's derivative, so that derivatives of any order exist. They are torch operators of their own
since ``torch.compile`` cannot look into a loop whose bounds are data; it takes them as they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lrkit.precision import without_autocast


@torch.library.custom_op("lrkit::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Compute y = W_g x for the rows x of each group g.

    Args:
        x: rows [n, d_in], sorted by group.
        w: W [groups, d_out, d_in].
        ends: where each group's rows end, int32 [groups]. Rows beyond the last are of no group.

    Returns:
        y [n, d_out]; zero in rows of no group.
    """
    with without_autocast(x.device.type):
        if _has_kernel(x, w):
            y: Tensor = F.grouped_mm(x, w.transpose(1, 2), offs=ends)
            beyond = torch.arange(len(x), device=x.device) >= ends[-1]
            return y.masked_fill_(beyond[:, None], 0)  # the kernel leaves them as they were
        y = x.new_zeros(len(x), w.shape[1])
        for group, rows in _groups(ends):
            _product(x[rows], w[group].t(), y[rows], thin=min(w.shape[1:]) <= _THIN)
        return y


@torch.library.custom_op("lrkit::grouped_outer", mutates_args=())
def grouped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Compute Σ g xᵀ over the rows of each group.

    Args:
        g: rows [n, d_out], sorted by group.
        x: rows [n, d_in].
        ends: where each group's rows end, int32 [groups].

    Returns:
        The sums [groups, d_out, d_in].
    """
    with without_autocast(x.device.type):
        if _has_kernel(g, x):
            sums: Tensor = F.grouped_mm(g.t(), x, offs=ends)
            return sums
        sums = x.new_zeros(len(ends), g.shape[1], x.shape[1])
        for group, rows in _groups(ends):
            _product(g[rows].t(), x[rows], sums[group], thin=min(sums.shape[1:]) <= _THIN)
        return sums


def _product(a: Tensor, b: Tensor, out: Tensor, thin: bool) -> None:
    """Write a b into `out`, by way of float32 if that is cheaper: for thin matrices in half precision on a CPU.

    There oneDNN compiles a product anew for every number of rows, which takes longer than a thin product itself. It keeps
    1,024 of them, fewer than the experts of a few layers need, and the numbers of rows change from batch to batch.
    """
    if thin and a.dtype.itemsize == 2 and a.device.type == "cpu":
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


_THIN = 64
"""Of a matrix's two sizes the smaller one, up to which it is thin; a rank, that is."""


def _has_kernel(*tensors: Tensor) -> bool:
    """Return whether torch's kernel takes these matrices: on a GPU, bfloat16, aligned to 16 bytes."""
    return hasattr(F, "grouped_mm") and all(
        t.is_cuda and t.dtype == torch.bfloat16 and sorted(t.stride()[-2:])[0] == 1 and _even(t) for t in tensors
    )


def _even(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and all(step == 1 or step % 8 == 0 for step in t.stride())


def _groups(ends: Tensor) -> list[tuple[int, slice]]:
    """Return the groups that have rows, and their rows."""
    bounds = [0, *ends.tolist()]
    return [(i, slice(*bounds[i : i + 2])) for i in range(len(ends)) if bounds[i] < bounds[i + 1]]


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@grouped_outer.register_fake
def _(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], g.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    left, right, ends = inputs
    need_right = ctx.needs_input_grad[1]
    # A frozen W needs no gradient, and then the rows need not be kept.
    ctx.save_for_backward(left if need_right else None, right, ends)


def _mm_backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, ends = ctx.saved_tensors
    need_x, need_w = ctx.needs_input_grad[:2]
    gx = grouped_mm(gy, w.transpose(1, 2), ends) if need_x else None
    gw = grouped_outer(gy.contiguous(), x, ends) if need_w else None
    return gx, gw, None


def _outer_backward(ctx: Any, gs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    g, x, ends = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    gg = grouped_mm(x, gs, ends) if need_g else None
    gx = grouped_mm(g, gs.transpose(1, 2), ends) if need_x else None
    return gg, gx, None


grouped_mm.register_autograd(_mm_backward, setup_context=_keep)
grouped_outer.register_autograd(_outer_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lrkit.grouped_mm)
def _(x: torch.Size, w: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.lrkit.grouped_outer)
def _(g: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * g[0] * g[1] * x[1]

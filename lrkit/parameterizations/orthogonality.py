"""The orthogonality penalty of AdaLoRA (arXiv 2303.10512, Eq. 4), batched over factors of one shape."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lrkit.precision import without_autocast


class _Deviation(torch.autograd.Function):
    """Σ_k of ‖D_k‖² or ‖D_k‖, D_k = F_k F_kᵀ - I, over factors of one shape; the gradient in closed form.

    d‖D‖²/dF = 4 D F, and d‖D‖/dF = 2 D F / ‖D‖, taken as 0 if D is 0.
    """

    @staticmethod
    def forward(ctx: Any, norm: str, *factors: Tensor) -> Tensor:
        ctx.turned = factors[0].t().is_contiguous()
        stacked, deviation = _deviation(factors, ctx.turned)
        ctx.save_for_backward(stacked, deviation, *factors)
        ctx.norm = norm
        return torch.linalg.vector_norm(deviation, dim=(1, 2)).sum() if norm == "mean" else deviation.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stacked, deviation, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: forward made these without a graph, so they are made again with one.
            stacked, deviation = _deviation(factors, ctx.turned)
        if ctx.norm == "mean":
            length = torch.linalg.vector_norm(deviation, dim=(1, 2), keepdim=True)
            scaled = deviation * torch.where(length > 0, 2 * grad / length, 0.0)
        else:
            scaled = deviation * (4 * grad)
        with without_autocast(stacked.device.type):
            if ctx.turned:  # D is symmetric: (D F)ᵀ = Fᵀ D
                return None, *torch.bmm(stacked.transpose(1, 2), scaled).transpose(1, 2).unbind()
            return None, *torch.bmm(scaled, stacked).unbind()


def _deviation(factors: Sequence[Tensor], turned: bool) -> tuple[Tensor, Tensor]:
    """Return the factors as one tensor [k, r, d], and F Fᵀ - I [k, r, r]."""
    # Transposed views (P as [r, d]) are stacked as they lie in memory, and the stack is transposed.
    stacked = torch.stack([f.t() for f in factors]).transpose(1, 2) if turned else torch.stack(list(factors))
    # Not even under autocast: the difference from I would be lost in bfloat16.
    with without_autocast(stacked.device.type):
        deviation = torch.bmm(stacked, stacked.transpose(1, 2))
    deviation.diagonal(dim1=1, dim2=2).sub_(1)
    return stacked, deviation


def orthogonality(factors: Sequence[Tensor], norm: Literal["squared", "mean"] = "squared") -> Tensor:
    """Compute how far the rows of each factor are from orthonormal.

    Args:
        factors: each [r, d], rows to be made orthonormal (Q as it is, P transposed). Shapes may differ; factors of one
            shape go through one batched product. Factors without rows (rank 0) count as orthonormal.
        norm: ``"squared"``: Σ_k ‖F_k F_kᵀ - I‖_F² (Eq. 4, without γ). ``"mean"``: the mean over the factors of the
            un-squared norm (AdaLoRA's released code and PEFT).

    Returns:
        A scalar, differentiable in every factor. At exactly orthonormal factors the un-squared norm has no gradient, and
        zero is returned for it.

    Raises:
        ValueError: no factors, or another norm.
    """
    if not factors:
        raise ValueError("orthogonality of no factors")
    if norm not in ("squared", "mean"):
        raise ValueError(f'norm must be "squared" or "mean", not {norm!r}')
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for factor in factors:
        groups.setdefault((*factor.shape, factor.t().is_contiguous(), factor.device), []).append(factor)
    squares: list[Tensor] = [_Deviation.apply(norm, *members) for members in groups.values()]  # type: ignore[no-untyped-call]
    total = torch.stack([each.to(squares[0].device) for each in squares]).sum()  # a model may lie on several devices
    return total / len(factors) if norm == "mean" else total

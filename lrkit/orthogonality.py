"""The orthogonality penalty of AdaLoRA (arXiv 2303.10512, Eq. 4), batched over factors of one shape."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def orthogonality(factors: Sequence[Tensor], norm: Literal["squared", "mean"] = "squared") -> Tensor:
    """How far the rows of each factor are from orthonormal.

    Args:
        factors: each [r, d], rows to be made orthonormal (Q as it is, P transposed). Shapes may differ; factors of one
            shape go through one batched product. Factors without rows (rank 0) count as orthonormal.
        norm: ``"squared"``: Σ_k ‖F_k F_kᵀ - I‖_F² (Eq. 4, without γ). ``"mean"``: the mean over the factors of the
            un-squared norm (AdaLoRA's released code and PEFT).

    Returns:
        A scalar, differentiable in every factor. At exactly orthonormal factors the un-squared norm has no gradient;
        it is taken as zero there.

    Raises:
        ValueError: no factors, or another norm.
    """
    if not factors:
        raise ValueError("orthogonality of no factors")
    if norm not in ("squared", "mean"):
        raise ValueError(f'norm must be "squared" or "mean", not {norm!r}')
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for factor in factors:
        groups.setdefault(tuple(factor.shape), []).append(factor)
    squares = []
    for (r, _), members in groups.items():
        stacked = torch.stack(members)
        gram = torch.bmm(stacked, stacked.transpose(1, 2))
        deviation = gram - torch.eye(r, dtype=gram.dtype, device=gram.device)
        # vector_norm has the subgradient 0 at 0, where sqrt of a sum of squares has NaN.
        if norm == "mean":
            squares.append(torch.linalg.vector_norm(deviation, dim=(1, 2)).sum())
        else:
            squares.append(deviation.square().sum())
    total = torch.stack(squares).sum()
    return total / len(factors) if norm == "mean" else total

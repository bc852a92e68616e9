"""Prune-LoRA and LoRA_regu for lrkit, with which AdaLoRA's paper compares. See README.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.parameterizations import LoRA
from lrkit.parameterizations.orthogonality import orthogonality as eq4
from lrkit.ranks import Rank
from lrkit.settings import Time, one_of, real
from lrkit.study.shipped import files_in


def mean_cosine(factors: Sequence[Tensor]) -> Tensor:
    """The mean over factors of the mean of abs(cosine) between each two different rows.

    Args:
        factors: each [r, d]. A row of zeros has a cosine of zero to every other; a factor of fewer than two rows has none.

    Returns:
        A scalar, differentiable in every factor.
    """
    means = []
    for factor in factors:
        pairs = len(factor) * (len(factor) - 1)
        # Where a row is zero its length has no gradient; a length below any that counts stands for it.
        rows = factor / factor.square().sum(dim=1, keepdim=True).clamp_min(1e-30).sqrt()
        cosine = (rows @ rows.t()).abs()
        means.append((cosine.sum() - cosine.trace()) / max(1, pairs))
    return torch.stack(means).mean()


@attrs.frozen(kw_only=True)
class RegularisedLoRA(LoRA):
    """LoRA with AdaLoRA's penalty on A's rows and B's columns: LoRA_regu. Source: arXiv 2303.10512, section 4.4, Table 5.

    Args:
        orthogonality: γ, the penalty's weight; 0 turns it off.
        orthogonality_norm: ``"squared"`` is the paper's Eq. 4, Σ (‖BᵀB - I‖_F² + ‖AAᵀ - I‖_F²); ``"cosine"`` is the released
            code's for LoRA: the mean over all A and B of the mean abs(cosine) between two rows (columns): towards
            right angles, but not length 1.
    """

    penalty_weight: ClassVar[str | None] = "orthogonality"

    orthogonality: float = attrs.field(default=0.1, validator=real(0.0))
    orthogonality_norm: Literal["squared", "cosine"] = attrs.field(
        default="squared", validator=one_of(("squared", "cosine"))
    )

    def penalty(self, modules: Sequence[nn.Module]) -> Tensor | None:
        """γ R(B, A), a scalar; None when γ is 0."""
        if self.orthogonality == 0:
            return None
        factors = [m.get_parameter("B").t() for m in modules] + [m.get_parameter("A") for m in modules]
        return self.orthogonality * (mean_cosine(factors) if self.orthogonality_norm == "cosine" else eq4(factors))


def prune_lora(
    *,
    rank: Rank = 12,
    target_rank: int = 8,
    alpha: float = 16.0,
    warmup: Time = 0.15,
    final: Time = 0.5,
    interval: Time = 0.002,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> lrkit.Method:
    """Prune-LoRA (arXiv 2303.10512, section 4.4): AdaLoRA's allocation on LoRA's doublets, which have no λ to mask.

    A doublet (B[:, i], A[i, :]) scores mean_j s(B_ji) + mean_j s(A_ij), with s = Ī · Ū of abs(w · ∂L/∂w). Those that lose
    have both vectors set to zero. Their gradients are then zero too: a doublet that is lost never comes back.

    Args:
        rank: initial rank of every matrix.
        target_rank: average rank in the end.
        alpha: α of LoRA's scale α/r, with the rank at the start.
        warmup: t_i.
        final: t_f.
        interval: ΔT.
        beta1: β1 of Ī.
        beta2: β2 of Ū.
    """
    return lrkit.Method(
        parameterization=LoRA(rank=rank, alpha=alpha),
        metric=lrkit.metrics.SensitivityUncertainty(beta1=beta1, beta2=beta2),
        scheduler=lrkit.schedulers.Cubic(target=target_rank, warmup=warmup, final=final, interval=interval),
        action=lrkit.actions.Zero(once=True),
    )


def lora_regu(
    *,
    rank: Rank = 8,
    alpha: float = 16.0,
    orthogonality: float = 0.1,
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """LoRA_regu (arXiv 2303.10512, section 4.4, Table 5): LoRA at a fixed rank with the orthogonality penalty.

    Args:
        rank: r.
        alpha: α.
        orthogonality: γ.
        variant: ``"paper"``: Eq. 4; ``"released"``: the mean abs(cosine) of the released code.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'lora_regu variant must be "paper" or "released", not {variant!r}')
    norm: Literal["squared", "cosine"] = "squared" if variant == "paper" else "cosine"
    return lrkit.Method(
        parameterization=RegularisedLoRA(rank=rank, alpha=alpha, orthogonality=orthogonality, orthogonality_norm=norm)
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """LoRA with a penalty."""
    return {"lora-regu": RegularisedLoRA}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """Both."""
    return {"prune-lora": prune_lora, "lora-regu": lora_regu}


@lrkit.hookimpl
def lrkit_studies() -> Mapping[str, Any]:
    """Tables of papers that need these methods."""
    return files_in(__name__)


__all__ = ["RegularisedLoRA", "lora_regu", "mean_cosine", "prune_lora"]

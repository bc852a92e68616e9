"""SoRA for lrkit: gated LoRA, a proximal step on the gates, a threshold that rises in stages. See README.md."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lrkit
from lrkit.ranks import Rank
from lrkit.settings import Time
from lrkit.study.shipped import files_in
from lrkit_sora.gates import GatedLoRA, SoftThreshold, Staged


def sora(
    *,
    rank: Rank = 4,
    alpha: float = 16.0,
    strength: float | None = None,
    stages: int = 6,
    warmup: Time = 0.3,
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """SoRA (Ding et al., arXiv 2311.11696): gated LoRA whose gates are soft-thresholded after every step.

    ΔW x = (α/r) B (g ∘ A x). After the optimizer's step g ← sign(g) max(abs(g) - ξ, 0) with ξ = η λ (section 3.2). λ rises
    in stages (Algorithm 1). Gates at zero can be cut at the end: ``adapted.compact()``.

    Args:
        rank: r_max, the rank of every matrix at first.
        alpha: α.
        strength: λ in the last stage, 0.6 by default; in the released variant ξ itself, 7e-4 by default.
        stages: how many stages λ rises in, after one without a threshold; 1 for none: the same λ from `warmup` to the end.
        warmup: how long the gates train without a threshold.
        variant: ``"paper"``; or ``"released"``: ξ = λ whatever the learning rate, and zero below 2 ξ.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'sora variant must be "paper" or "released", not {variant!r}')
    strength = {"paper": 0.6, "released": 7e-4}[variant] if strength is None else strength
    return lrkit.Method(
        parameterization=GatedLoRA(rank=rank, alpha=alpha),
        metric=lrkit.metrics.Magnitude(),
        scheduler=Staged(target=0.0, stages=stages, warmup=warmup, ending="open"),
        action=SoftThreshold(strength=strength, variant=variant),
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """LoRA with gates."""
    return {"gated-lora": GatedLoRA}


@lrkit.hookimpl
def lrkit_schedulers() -> Mapping[str, type[lrkit.Scheduler]]:
    """Equal stages."""
    return {"staged": Staged}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """The proximal step."""
    return {"soft-threshold": SoftThreshold}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """SoRA."""
    return {"sora": sora}


@lrkit.hookimpl
def lrkit_studies() -> Mapping[str, Any]:
    """Tables of papers that need these methods."""
    return files_in(__name__)


__all__ = ["GatedLoRA", "SoftThreshold", "Staged", "sora"]

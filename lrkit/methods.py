"""Named compositions: the published methods, each a long docstring over a short body.

Every one returns a frozen `lrkit.Method`; swap a part with ``attrs.evolve(method, metric=...)``. Defaults are the
paper's text, but for AdaLoRA's and SVD-LoRA's penalty. If released code does otherwise, the setting that reproduces it
is named.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NoReturn

from lrkit.actions import Freeze, Prune
from lrkit.errors import LrkitError
from lrkit.hookspecs import hookimpl
from lrkit.method import Method
from lrkit.metrics import GradientUncertainty, SensitivityUncertainty
from lrkit.parameterizations import SVD, DoRA, Full, LoRA, VectorScaled
from lrkit.parameterizations.starts import Init
from lrkit.ranks import Rank, Scale
from lrkit.schedulers import Cubic
from lrkit.settings import Time


def full() -> Method:
    """Full fine-tuning: every parameter of the model trains. Source: the baseline of arXiv 2106.09685, section 5.1."""
    return Method(parameterization=Full())


def lora(
    *, rank: Rank = 8, alpha: float = 16.0, dropout: float = 0.0, scale: Scale = "rank", init: Init = "kaiming"
) -> Method:
    """LoRA (Hu et al., arXiv 2106.09685): ΔW = (α/r) B A at a fixed rank.

    Args:
        rank: r, or a table of layer or pattern to rank, such as a `lrkit.Allocation`.
        alpha: α.
        dropout: on the adapter's input, while training.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r (rsLoRA, arXiv 2312.03732).
        init: ``"kaiming"``, or from the base's weight: ``"pissa"``, ``"pissa-fast"`` or ``"olora"``; or ``"orthogonal"``.
    """
    return Method(parameterization=LoRA(rank=rank, alpha=alpha, dropout=dropout, scale=scale, init=init))


def dora(*, rank: Rank = 8, alpha: float = 16.0, dropout: float = 0.0, scale: Scale = "rank") -> Method:
    """DoRA (Liu et al., arXiv 2402.09353): a magnitude per output beside LoRA's ΔW, W' = m ∘ (W + ΔW) / ‖W + ΔW‖.

    Args:
        rank: r, or a table of layer or pattern to rank, such as a `lrkit.Allocation`.
        alpha: α.
        dropout: on the adapter's input, while training.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r (rsLoRA, arXiv 2312.03732).
    """
    return Method(parameterization=DoRA(rank=rank, alpha=alpha, dropout=dropout, scale=scale))


def svd_lora(
    *,
    rank: Rank = 8,
    alpha: float | None = None,
    orthogonality: float = 0.1,
    variant: Literal["default", "paper"] = "default",
) -> Method:
    """SVD-LoRA: AdaLoRA's form P Λ Q at a fixed rank, without allocation (arXiv 2303.10512, Table 5).

    Args:
        rank: r, or a table of layer or pattern to rank, such as a `lrkit.Allocation`.
        alpha: None for no scale, as in the paper; else α/(r + 1e-5).
        orthogonality: γ, weight of the penalty.
        variant: ``"default"``: the penalty is the mean norm, as the released code has it; ``"paper"``: Eq. 4.

    Raises:
        LrkitError: no such variant.
    """
    if variant not in ("default", "paper"):
        raise LrkitError(f'svd_lora variant must be "default" or "paper", not {variant!r}')
    return Method(
        parameterization=SVD(
            rank=rank,
            alpha=alpha,
            orthogonality=orthogonality,
            orthogonality_norm="squared" if variant == "paper" else "mean",
        )
    )


def elora(*, rank: Rank = 1024, shared: bool = False) -> Method:
    """ELoRA / VeRA (Kopiczko et al., arXiv 2310.11454): frozen random A and B, trained vectors d and b.

    Args:
        rank: r, or a table; 1024 for base-size encoders.
        shared: False: a pair of its own for each layer, AFLoRA's ELoRA baseline. True: one pair for all layers, cut to
            each, VeRA.
    """
    return Method(parameterization=VectorScaled(rank=rank, train="none", shared=shared))


def adalora(
    *,
    rank: Rank = 12,
    target_rank: int = 8,
    warmup: Time = 0.15,
    final: Time = 0.5,
    interval: Time = 0.002,
    beta1: float = 0.85,
    beta2: float = 0.85,
    alpha: float | None = None,
    orthogonality: float = 0.1,
    variant: Literal["default", "paper", "released", "peft"] = "default",
) -> Method:
    """AdaLoRA (Zhang et al., arXiv 2303.10512): SVD + sensitivity x uncertainty + cubic budget + prune.

    Each increment is P Λ Q with an orthogonality penalty (Eq. 3 and 4). Triplets are scored by S_i = s(λ_i) +
    mean_j s(P_ji) + mean_j s(Q_ij) with s = Ī · Ū (Eq. 7 to 11), measured at the gradient, before the update (Algorithm
    1). Only the best b(t) over all layers keep their λ; b(t) falls cubically from b_0 to b_T between t_i and T - t_f
    (Eq. 14) and stays. Masked triplets go on training and can come back until T - t_f.

    Args:
        rank: initial rank of every matrix (4, 6, 12 in the paper), or a table of layer or pattern to rank.
        target_rank: average rank in the end (2, 4, 8 in the paper).
        warmup: t_i. The default is about the mean share over the paper's eight GLUE tasks (0.09 to 0.18).
        final: t_f, likewise (0.44 to 0.58).
        interval: ΔT. The default gives the paper's 1 (short runs) to 100 (50,000 steps).
        beta1: β1 of Ī.
        beta2: β2 of Ū.
        alpha: None for no scale, as in the paper; the released code has α/(r + 1e-5).
        orthogonality: γ (0.1 to 0.5 in the paper).
        variant: ``"paper"``: the text to the letter. ``"default"``: the text but for the penalty, which is the mean of the
            un-squared norms: Eq. 4's sum of squares at a Gaussian start outweighs the task in a short run. ``"released"`` or
            ``"peft"``: their choices if these differ (see the ledger in the documentation): sensitivity after the
            step, steps numbered from 0, the mean un-squared penalty, ties that lose, and the last decision. The scale
            `alpha` is left to you.

    Raises:
        LrkitError: no such variant, or settings that do not fit together.
    """
    if variant not in ("default", "paper", "released", "peft"):
        raise LrkitError(f'adalora variant must be "default", "paper", "released" or "peft", not {variant!r}')
    parameterization = SVD(
        rank=rank,
        alpha=alpha,
        orthogonality=orthogonality,
        orthogonality_norm="squared" if variant == "paper" else "mean",
    )
    if variant == "default" or variant == "paper":
        return Method(
            parameterization=parameterization,
            metric=SensitivityUncertainty(beta1=beta1, beta2=beta2),
            scheduler=Cubic(target=target_rank, warmup=warmup, final=final, interval=interval),
            action=Prune(),
        )
    return Method(
        parameterization=parameterization,
        metric=SensitivityUncertainty(beta1=beta1, beta2=beta2, measure="after-step"),
        scheduler=Cubic(
            target=target_rank, warmup=warmup, final=final, interval=interval, first_step=0, ending=variant
        ),
        action=Prune(ties="threshold"),
    )


def aflora(
    *,
    rank: Rank = 4,
    train: Literal["ffn", "attention", "both"] = "ffn",
    warmup: Time = 0.05,
    final: Time = 0.7,
    interval: Time = 1,
    beta1: float = 0.85,
    beta2: float = 0.95,
    together: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> Method:
    """AFLoRA (Liu et al., arXiv 2403.13269): vector-scaled LoRA + abs(grad) x uncertainty + cubic fraction + freeze.

    ΔW = Λ_b B Λ_d A (Eq. 1). The vectors train throughout; the projection matrices A and B freeze one by one, those with
    the lowest mean of s = Ī · Ū first (Eq. 2 to 4), where I = abs(∂L/∂w). The fraction frozen is 1 - (1 - u)³ with u =
    (t - t_i)/(T - t_i - t_f): everything is frozen at T - t_f.

    Args:
        rank: r, or a table of layer or pattern to rank, such as a `lrkit.Allocation`.
        train: whose matrices train at first: ``"ffn"`` is the paper's choice (Table 3).
        warmup: t_i: one epoch in the paper, which is 0.05 of 20 epochs.
        final: t_f: 0.7 in the paper.
        interval: steps between decisions.
        beta1: β1 of Ī.
        beta2: β2 of Ū.
        together: freeze A and B of a layer together (Table 6) rather than each on its own.
        variant: ``"paper"``, or the released GLUE code's choices: I over windows of 10 steps, of gradients before they
            are clipped, steps numbered from 0, and an element-wise quantile over what still trains. Its decisions are 10
            steps apart: give ``interval=10``.
    """
    if variant not in ("paper", "released"):
        raise LrkitError(f'aflora variant must be "paper" or "released", not {variant!r}')
    released = variant == "released"
    return Method(
        parameterization=VectorScaled(rank=rank, train=train),
        metric=GradientUncertainty(
            beta1=beta1,
            beta2=beta2,
            window=10 if released else 1,
            measure="before-clipping" if released else "before-step",
        ),
        scheduler=Cubic(
            target=0.0,
            warmup=warmup,
            final=final,
            interval=interval,
            first_step=0 if released else 1,
            ending="released" if released else "fixed",
        ),
        action=Freeze(together=together, rule="quantile" if released else "rank"),
    )


@hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., Method]]:
    """Offer the built-in methods."""
    return {
        "full": full,
        "lora": lora,
        "dora": dora,
        "svd-lora": svd_lora,
        "elora": elora,
        "adalora": adalora,
        "aflora": aflora,
    }


if not TYPE_CHECKING:  # a type checker knows what is missing

    def __getattr__(name: str) -> NoReturn:
        """Say where methods of plug-ins are to be had. Raise AttributeError."""
        raise AttributeError(
            f"lrkit.methods has no {name}: a plug-in's method is a function of its package, such as lrkit_calibrated.eva, "
            f'and lrkit.registry.current().method("NAME") makes any'
        )

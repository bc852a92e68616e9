"""PLATON's metric and LoSparse for lrkit. See README.md for what is known and what is not."""

from collections.abc import Callable, Mapping
from typing import Literal

import lrkit
from lrkit.settings import Amount, Time
from lrkit_platon.losparse import LoSparse, LowRankPlusRows
from lrkit_platon.platon import Platon, ZeroBelow


def losparse(
    *,
    ratio: float = 0.05,
    target: Amount = 0.15,
    warmup: Time = 0.055,
    final: Time = 0.275,
    window: int = 10,
    beta1: float = 0.85,
    beta2: float | None = None,
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """LoSparse (Li et al., arXiv 2306.11222): W = U V + S, with S pruned row by row by PLATON's score.

    U V is the best approximation of the weight of its rank, S what is left of it; all three train. The share of S's rows, of
    all layers together, that may be other than zero falls cubically from 1 to `target`.

    Args:
        ratio: parameters of U and V as a share of the weight's.
        target: rows of S that are kept in the end, as a share; an int is rows a layer.
        warmup: t_i. The default is the released script's 675 of about 12,270 steps on MNLI.
        final: t_f, five times as long.
        window: steps that PLATON's sensitivity is averaged over, and between decisions.
        beta1: β1 of Ī.
        beta2: β2 of Ū; None for PLATON's 0.95, and in the released variant for 1, by which Ī alone is the score.
        variant: ``"paper"``; or ``"released"``: sensitivity measured after the step, Ī alone, a threshold over entries that
            keeps ties, momentum that is kept, and in the last phase scores that go on and a decision at every step.

    Raises:
        lrkit.LrkitError: no such variant, or settings that do not fit together.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'losparse variant must be "paper" or "released", not {variant!r}')
    released = variant == "released"
    beta2 = (1.0 if released else 0.95) if beta2 is None else beta2
    return lrkit.Method(
        parameterization=LoSparse(ratio=ratio),
        metric=Platon(beta1=beta1, beta2=beta2, window=window, measure="after-step" if released else "before-step"),
        # Numbered from 0, as in the code: a decision then comes at the step at which a window has just been taken in.
        scheduler=lrkit.schedulers.Cubic(
            target=target,
            warmup=warmup,
            final=final,
            interval=window,
            first_step=0,
            ending="every-step" if released else "fixed",
        ),
        action=ZeroBelow() if released else lrkit.actions.Zero(),
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """A low-rank part and the rows of what is left."""
    return {"losparse": LoSparse}


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """PLATON's."""
    return {"platon": Platon}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """PLATON's threshold."""
    return {"zero-below": ZeroBelow}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """LoSparse."""
    return {"losparse": losparse}


__all__ = ["LoSparse", "LowRankPlusRows", "Platon", "ZeroBelow", "losparse"]

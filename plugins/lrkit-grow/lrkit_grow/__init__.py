"""Ranks that grow or move, and a norm's shares, for lrkit. See README.md for what is known and what is not."""

from collections.abc import Callable, Mapping
from typing import Literal

import lrkit
from lrkit.ranks import Rank
from lrkit.settings import Amount, Time
from lrkit_grow.actions import Exchange, Grow
from lrkit_grow.norm_share import LateCubic, NormShare
from lrkit_grow.pool import PoolExchange, ProjectedSVD


def increlora(
    *,
    rank: Rank = 1,
    target_rank: int = 8,
    modules: int | None = None,
    warmup: Time = 0.1,
    final: Time = 0.4,
    interval: Time = 0.01,
    beta1: float = 0.85,
    beta2: float = 0.85,
    core: float = 1e-5,
    alpha: float | None = None,
    orthogonality: float = 0.1,
) -> lrkit.Method:
    """IncreLoRA (Zhang et al., arXiv 2308.12043): ranks start at 1, and every ν steps the best layers get one more.

    Args:
        rank: initial rank of every matrix, or a `lrkit.Allocation` with sizes.
        target_rank: average rank in the end.
        modules: h, layers that get a component at each decision, as in the paper. None: the budget rises linearly, and at
            each decision as many layers get one as bring it to `target_rank` at T - t_f.
        warmup: t_i, steps before the first decision.
        final: t_f, steps at the end without growth.
        interval: ν.
        beta1: β1 of Ī.
        beta2: β2 of Ū.
        core: λ of a new component.
        alpha: None for no scale; else α/(rank + 1e-5).
        orthogonality: γ, weight of the penalty.
    """
    pace = lrkit.schedulers.Linear if modules is None else lrkit.schedulers.Constant
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=rank, alpha=alpha, orthogonality=orthogonality),
        metric=lrkit.metrics.SensitivityUncertainty(beta1=beta1, beta2=beta2),
        scheduler=pace(
            start=_start(rank, target_rank), target=target_rank, warmup=warmup, final=final, interval=interval
        ),
        action=Grow(modules=modules, core=core),
    )


def _start(rank: Rank, target_rank: int) -> Amount:
    """Return all components that there are at first as an amount: per layer, or as a share of the target's."""
    if isinstance(rank, int):
        return rank
    if not isinstance(rank, lrkit.Allocation) or rank.sizes is None:
        raise lrkit.LrkitError(
            "increlora's budget begins with all components that there are, and this table does not know its layers: give a "
            "lrkit.Allocation with sizes, such as lrkit.Allocation(table).on(model)"
        )
    most = target_rank * len(rank.sizes)
    if rank.total > most:
        raise lrkit.LrkitError(f"increlora: rank begins with {rank.total} components, above the target of {most}")
    return rank.total / most


def elalora(
    *,
    rank: Rank = 8,
    count: int = 4,
    warmup: Time = 0.1,
    final: Time = 0.4,
    interval: Time = 0.02,
    beta1: float = 0.85,
    beta2: float = 0.85,
    core: float | None = None,
    alpha: float | None = None,
    orthogonality: float = 0.1,
    variant: Literal["simple", "released"] = "simple",
    pool: int = 2,
    taper: bool = False,
) -> lrkit.Method:
    """ElaLoRA (Chang et al., arXiv 2504.00254): warm-up; then at each decision b components are cut and b added; then rest.

    Args:
        rank: average rank, from the start to the end.
        count: b.
        warmup: steps of the first phase.
        final: steps of the third phase.
        interval: steps between decisions.
        beta1: β1 of Ī.
        beta2: β2 of Ū.
        core: λ of a new component; None for 1e-5, or 1e-13 in the released variant.
        alpha: None for no scale; else α/(rank + 1e-5).
        orthogonality: γ, weight of the penalty.
        variant: ``"simple"``: the b lowest components of all layers go, and the b best layers gain (`Exchange`).
            ``"released"``: the code's pool, its start of new components, its optimizer that begins anew, scores after the
            step, and steps that are numbered from 0 (`PoolExchange`, `ProjectedSVD`).
        pool: k, how many of its lowest components each matrix puts into the pool.
        taper: whether b falls as round(b₀ (1 - u³)), as in all of the released scripts.
    """
    if variant not in ("simple", "released"):
        raise lrkit.LrkitError(f'elalora variant must be "simple" or "released", not {variant!r}')
    if variant == "simple":
        if taper or pool != 2:
            raise lrkit.LrkitError('elalora: pool and taper are settings of variant="released"')
        return lrkit.Method(
            parameterization=lrkit.parameterizations.SVD(rank=rank, alpha=alpha, orthogonality=orthogonality),
            metric=lrkit.metrics.SensitivityUncertainty(beta1=beta1, beta2=beta2),
            scheduler=lrkit.schedulers.Constant(target=1.0, warmup=warmup, final=final, interval=interval),
            action=Exchange(count=count, core=1e-5 if core is None else core),
        )
    pace, target = (LateCubic, 0.0) if taper else (lrkit.schedulers.Constant, 1.0)
    return lrkit.Method(
        parameterization=ProjectedSVD(rank=rank, alpha=alpha, orthogonality=orthogonality),
        metric=lrkit.metrics.SensitivityUncertainty(beta1=beta1, beta2=beta2, measure="after-step"),
        scheduler=pace(target=target, warmup=warmup, final=final, interval=interval, first_step=0),
        action=PoolExchange(count=count, pool=pool, taper=taper, core=1e-13 if core is None else core),
    )


def dynamic_dora(
    *,
    rank: Rank = 12,
    target_rank: int = 8,
    warmup: Time = 0.15,
    final: Time = 0.5,
    interval: Time = 0.002,
    alpha: float | None = None,
) -> lrkit.Method:
    """Dynamic DoRA (Mao et al., arXiv 2405.17357): components with the smallest share in their layer's norm are masked.

    Args:
        rank: initial rank of every matrix.
        target_rank: average rank in the end.
        warmup: t_i.
        final: t_f.
        interval: ΔT.
        alpha: None for no scale; else α/(rank + 1e-5).
    """
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=rank, alpha=alpha, orthogonality=0),
        metric=NormShare(),
        scheduler=LateCubic(target=target_rank, warmup=warmup, final=final, interval=interval),
        action=lrkit.actions.Prune(),
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """The form of ElaLoRA's released code."""
    return {"projected-svd": ProjectedSVD}


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """Dynamic DoRA's score."""
    return {"norm-share": NormShare}


@lrkit.hookimpl
def lrkit_schedulers() -> Mapping[str, type[lrkit.Scheduler]]:
    """Dynamic DoRA's budget."""
    return {"late-cubic": LateCubic}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """IncreLoRA's and ElaLoRA's."""
    return {"grow": Grow, "exchange": Exchange, "pool-exchange": PoolExchange}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """The three methods."""
    return {"increlora": increlora, "elalora": elalora, "dynamic-dora": dynamic_dora}


__all__ = [
    "Exchange",
    "Grow",
    "LateCubic",
    "NormShare",
    "PoolExchange",
    "ProjectedSVD",
    "dynamic_dora",
    "elalora",
    "increlora",
]

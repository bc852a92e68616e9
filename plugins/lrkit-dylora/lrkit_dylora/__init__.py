"""DyLoRA for lrkit: each step trains another rank, so that one training gives every rank. See README.md."""

from collections.abc import Callable, Mapping

import lrkit
from lrkit.ranks import Rank, most_of
from lrkit.settings import Time
from lrkit_dylora.parts import AtEachStep, Draw, Nested, NestedLoRA, Position, Updates, truncate


def dylora(
    *,
    rank: Rank = 8,
    alpha: float = 16.0,
    least: int = 1,
    updates: Updates = "all",
    interval: Time = 1,
    final_rank: int | None = None,
) -> lrkit.Method:
    """DyLoRA (Valipour et al., arXiv 2210.07558): each step a rank b is drawn, and the first b components alone act.

    ΔW x = (α/b) B[:, :b] A[:b] x, with b uniform from `least` to `rank`, the same for all layers (Algorithm 1). After the
    last step all components act, and `lrkit_dylora.truncate` gives the model of any rank.

    Args:
        rank: r_max.
        alpha: α.
        least: r_min.
        updates: which components train: ``"all"`` first b; or the b-th ``"row"`` alone, the paper's frozen mode.
        interval: steps between draws.
        final_rank: the rank of the model after training; None for r_max.

    Raises:
        LrkitError: `least` or `final_rank` is above r_max.
    """
    for name, given in (("least", least), ("final_rank", final_rank)):
        if isinstance(given, int) and given > most_of(rank):
            raise lrkit.LrkitError(f"dylora: {name} {given} is above the highest rank, {most_of(rank)}")
    return lrkit.Method(
        parameterization=NestedLoRA(rank=rank, alpha=alpha, updates=updates),
        metric=Position(),
        scheduler=AtEachStep(interval=interval),
        action=Draw(least=least, rank=final_rank),
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """LoRA behind gates."""
    return {"nested-lora": NestedLoRA}


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """The score by place."""
    return {"position": Position}


@lrkit.hookimpl
def lrkit_schedulers() -> Mapping[str, type[lrkit.Scheduler]]:
    """Step 0, and every step."""
    return {"at-each-step": AtEachStep}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """The draw."""
    return {"draw": Draw}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """DyLoRA."""
    return {"dylora": dylora}


__all__ = ["AtEachStep", "Draw", "Nested", "NestedLoRA", "Position", "dylora", "truncate"]

"""L1RA for lrkit: LoRA whose ranks shrink by an L1 step, and go to the layers that need them. See README.md."""

from collections.abc import Callable, Mapping

import lrkit
from lrkit.ranks import Rank
from lrkit.settings import Time
from lrkit_l1ra.parts import RankVectorLoRA, Reassign, Shrink


def l1ra(
    *,
    rank: Rank = 8,
    alpha: float = 8.0,
    strength: float = 0.1,
    pace: float = 20.0,
    interval: Time = 0.1,
    exclude_pruned: bool = True,
    restart: bool = True,
    dropout: float = 0.0,
) -> lrkit.Method:
    """L1RA (Singh et al., arXiv 2509.04884): an L1 step shrinks a rank vector; what is zero moves to other layers.

    ΔW x = (α/r) B (c ∘ A x). After each optimizer step c ← min(max(c - η λ, 0), 1). Every `interval` components with c = 0
    are cut, and the layers without any such, from the highest smallest c, get one fresh one each in turn.

    Args:
        rank: r, the rank of every matrix at first, and on average throughout.
        alpha: α.
        strength: λ. Over a run the L1 term takes λ Σ η off c, which begins at one, with the rates η of all steps of c. Far
            below 1 no rank moves: of 120 steps of `lrkit run` (Σ η = 1.2) 0.1 moves none, and 0.7 some.
        pace: how many times as fast as A and B c learns; 1 if c has a parameter group of its own, with the rate η.
        interval: steps between moves of ranks; there is none in the last interval of the run.
        exclude_pruned: whether layers that had a component to cut get none.
        restart: whether the adapters' optimizer state is dropped when ranks move.
        dropout: of the adapter's input.
    """
    largest = 1 / RankVectorLoRA(pace=pace).pace
    return lrkit.Method(
        parameterization=RankVectorLoRA(rank=rank, alpha=alpha, pace=pace, dropout=dropout),
        metric=lrkit.metrics.Magnitude(),
        scheduler=lrkit.schedulers.Constant(target=1.0, ending="open"),
        action=Shrink(strength=strength, most=largest),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.Magnitude(),
                scheduler=lrkit.schedulers.Constant(target=1.0, interval=interval, final=interval),
                action=Reassign(core=largest, exclude_pruned=exclude_pruned, restart=restart),
            ),
        ),
    )


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """LoRA with a rank vector."""
    return {"rank-vector-lora": RankVectorLoRA}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """The L1 step, and the move of ranks."""
    return {"shrink": Shrink, "reassign": Reassign}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """L1RA."""
    return {"l1ra": l1ra}


__all__ = ["RankVectorLoRA", "Reassign", "Shrink", "l1ra"]

"""LISA and AdaGradSelect for lrkit: blocks of the transformer that train in turn. See README.md."""

from collections.abc import Callable, Mapping
from typing import Literal

import lrkit
from lrkit.settings import Amount, Time
from lrkit_blocks.adagradselect import EpsilonGreedy, GradientNorm
from lrkit_blocks.lisa import Coins, Periodic


def lisa(
    *,
    active: Amount = 2,
    interval: Time = 20,
    draw: Literal["number", "probability"] = "number",
    state: Literal["new", "kept"] = "new",
) -> lrkit.Method:
    """LISA (Pan et al., arXiv 2403.17919): full fine-tuning in which a few blocks train, drawn anew every K steps.

    The first draw is before the first step. Embeddings, head, and all else that is in no block train in every step. With
    adapters it is ``attrs.evolve(lisa(), parameterization=lrkit.parameterizations.LoRA(rank=8))``.

    Args:
        active: γ, how many blocks train at a time; or a share of them.
        interval: K, steps between draws.
        draw: ``"number"``: just γ blocks. ``"probability"``: each with probability γ/N, as the paper's first version has it.
        state: the optimizer's state of a block that stops (`lrkit.actions.Switch`).
    """
    if draw not in ("number", "probability"):
        raise lrkit.LrkitError(f'lisa draw must be "number" or "probability", not {draw!r}')
    return lrkit.Method(
        parameterization=lrkit.parameterizations.Full(),
        metric=lrkit.metrics.Random(),
        scheduler=Periodic(target=active, interval=interval),
        action=lrkit.actions.Switch(state=state) if draw == "number" else Coins(state=state),
    )


def adagradselect(
    *,
    active: Amount = 2,
    interval: Time = 1,
    exploration: int = 100,
    epsilon: float = 1.0,
    decay: float = 0.05,
    delta: float = 1.0,
    draw: Literal["chance", "largest"] = "chance",
    state: Literal["new", "kept"] = "kept",
) -> lrkit.Method:
    """AdaGradSelect (Kumar et al., arXiv 2512.15764): blocks with large gradients at first, then those chosen most often.

    At each decision of the first phase, with probability ε: the blocks with the largest gradient norms. Otherwise, and
    always after that phase: blocks by probabilities p from a Dirichlet distribution of how often each was chosen. README.md
    says where the paper's text was not at hand.

    Args:
        active: how many blocks train at a time, or a share of them, rounded.
        interval: steps between decisions.
        exploration: how many decisions the first phase has: those of the first epoch.
        epsilon: ε at first.
        decay: ε falls by this rate at each decision: ε exp(-decay · t).
        delta: added to every count, so that a block that was never chosen may be.
        draw: how blocks are chosen by p: by ``"chance"``, without replacement; or those with the ``"largest"`` p.
        state: the optimizer's state of a block that stops (`lrkit.actions.Switch`).
    """
    return lrkit.Method(
        parameterization=lrkit.parameterizations.Full(),
        metric=GradientNorm(),
        scheduler=lrkit.schedulers.Constant(target=active, interval=interval, ending="open"),
        action=EpsilonGreedy(
            exploration=exploration, epsilon=epsilon, decay=decay, delta=delta, draw=draw, state=state
        ),
    )


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """Offer norms of gradients."""
    return {"gradient-norm": GradientNorm}


@lrkit.hookimpl
def lrkit_schedulers() -> Mapping[str, type[lrkit.Scheduler]]:
    """Offer a decision before the first step, and one every K."""
    return {"periodic": Periodic}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """Offer two ways to draw blocks."""
    return {"coins": Coins, "epsilon-greedy": EpsilonGreedy}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """Offer LISA and AdaGradSelect."""
    return {"lisa": lisa, "adagradselect": adagradselect}


__all__ = ["Coins", "EpsilonGreedy", "GradientNorm", "Periodic", "adagradselect", "lisa"]

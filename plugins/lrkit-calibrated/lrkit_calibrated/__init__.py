"""Methods that look at some batches before the first step, for lrkit. See README.md."""

from collections.abc import Callable, Mapping

import lrkit
from lrkit.ranks import Rank
from lrkit_calibrated.fisher import Apportion, Fisher, shared


def fim_lora(
    *,
    rank: Rank = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    calibration: int = 8,
    least: int = 1,
    most: int | None = None,
) -> lrkit.Method:
    """FIM-LoRA (arXiv 2605.16800): each layer's rank in proportion to its mean squared gradient over eight batches.

    Args:
        rank: r, the rank at first, and on average afterwards.
        alpha: α; the increment is scaled by α/r, with the r at first in every layer.
        dropout: probability of dropping an entry of the adapter's input while training.
        calibration: batches that a Trainer takes for it.
        least: r_min.
        most: r_max; None for 2 r.
    """
    return lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=rank, alpha=alpha, dropout=dropout),
        metric=Fisher(),
        scheduler=lrkit.schedulers.Once(target=1.0, calibration=calibration),
        action=Apportion(least=least, most=most),
    )


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """The mean squared gradient."""
    return {"fisher": Fisher}


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """Ranks in proportion to scores."""
    return {"apportion": Apportion}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """FIM-LoRA."""
    return {"fim-lora": fim_lora}


__all__ = ["Apportion", "Fisher", "fim_lora", "shared"]

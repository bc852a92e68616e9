"""A plug-in of lrkit: the method ``example-name``."""

from collections.abc import Callable, Mapping

import lrkit


def example_name(*, rank: int = 8, target_rank: int = 4) -> lrkit.Method:
    """AdaLoRA's form and schedule, with components ranked by their gradients alone.

    Source: arXiv 2303.10512, with the score of arXiv 2403.13269, Eq. 2 to 4.

    Args:
        rank: initial rank of every matrix.
        target_rank: average rank in the end.
    """
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=rank),
        metric=lrkit.metrics.GradientUncertainty(),
        scheduler=lrkit.schedulers.Cubic(target=target_rank, warmup=0.15, final=0.5, interval=0.002),
        action=lrkit.actions.Prune(),
    )


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """Offer the method of this package."""
    return {"example-name": example_name}
